"""Products that a small model cannot find, and a calculator that can: what plays a completion, its rewards, and
`python configs/grpo/calculator.py` to write the two datasets. A product is held out or trained on, never both.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from actors.conversation import Conversation

FACTORS = range(12, 100)
TRAIN, HELD_OUT = 400, 32
CALLS = 2  # in one completion
TURN_TOKENS = 12
PRODUCT = re.compile(r"(\d+)\s*[*x×]\s*(\d+)")
SYSTEM = "Reply with x * y to use the calculator, or with a number."


async def play(conversation: Conversation, **_: Any) -> dict[str, int]:
    """Whenever the model writes a product it is told what it is; what it writes then, without another one, is its answer."""
    calls = 0
    while found := PRODUCT.search(await conversation.answer(max_tokens=TURN_TOKENS)):
        if calls == CALLS:
            break
        calls += 1
        product = int(found[1]) * int(found[2])
        conversation.say("user", f"The calculator says {product}. What is the answer?")
    return {"calls": calls}


def correct(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """1 where the model's last turn is the product and nothing else, else 0."""
    return [float(last_turn(turns).strip(".") == str(right)) for turns, right in zip(completions, answer, strict=True)]


def brief(completions: list[Any], answer: list[int], **_: Any) -> list[float]:
    """Where the product is in the last turn, 1 for one of at most 4 characters, falling to 0 at 40; else 0."""
    brevity = [min(1.0, max(0.0, 1.0 - (len(last_turn(turns)) - 4) / 36)) for turns in completions]
    return [
        share if str(right) in last_turn(turns) else 0.0
        for share, turns, right in zip(brevity, completions, answer, strict=True)
    ]


def asked(completions: list[Any], calls: list[int | None], **_: Any) -> list[float]:
    """1 where the calculator was asked, else 0."""
    return [float(bool(count)) for count in calls]


def last_turn(turns: list[Any]) -> str:
    return str(turns[-1]["content"]).strip()


def main() -> None:
    """Writes calculator-train.jsonl and calculator-held-out.jsonl beside this file."""
    pairs = random.Random(0).sample([(a, b) for a in FACTORS for b in FACTORS], TRAIN + HELD_OUT)
    for name, part in (("held-out", pairs[:HELD_OUT]), ("train", pairs[HELD_OUT:])):
        rows = [
            {
                "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What is {a} * {b}?"}],
                "answer": a * b,
            }
            for a, b in part
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        Path(__file__).with_name(f"calculator-{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
