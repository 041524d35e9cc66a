"""Short sums: the task of the demo. Rewards for a GRPO job, and `python configs/grpo/sums.py` to write its two datasets.

A sum is held out or trained on, never both.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

LARGEST = 20
HELD_OUT = 64
NUMBER = re.compile(r"-?\d+")


def correct(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """1 where the last number in the completion is the sum, else 0."""
    numbers = [NUMBER.findall(text_of(completion)) for completion in completions]
    return [float(bool(found) and int(found[-1]) == right) for found, right in zip(numbers, answer, strict=True)]


def brief(completions: list[Any], **_: Any) -> list[float]:
    """1 for a completion of at most 4 characters, falling to 0 at 40: an answer, not an essay."""
    return [min(1.0, max(0.0, 1.0 - (len(text_of(completion).strip()) - 4) / 36)) for completion in completions]


def text_of(completion: Any) -> str:
    """The text of a completion, plain or as chat messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def main() -> None:
    """Writes sums-train.jsonl and sums-held-out.jsonl beside this file."""
    pairs = [(a, b) for a in range(1, LARGEST + 1) for b in range(1, LARGEST + 1)]
    random.Random(0).shuffle(pairs)
    for name, part in (("sums-held-out", pairs[:HELD_OUT]), ("sums-train", pairs[HELD_OUT:])):
        rows = [
            {"prompt": [{"role": "user", "content": f"What is {a} + {b}? Reply with the number."}], "answer": a + b}
            for a, b in part
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(__file__).with_name(f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
