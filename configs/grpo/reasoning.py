"""Tasks of reasoning-gym for a GRPO job: `rows` makes a prompt of a (task, seed) pair, `score` looks at the last word.

`python configs/grpo/reasoning.py` writes the two lists of pairs. A pair is held out or trained on, never both.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reasoning_gym

from actors import verifiers

# Easy enough that a model of 135 M parameters is right now and then: without any success there is nothing to learn from.
TASKS: dict[str, dict[str, int]] = {
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 1, "max_animals": 1, "min_instances": 1, "max_instances": 5},
}
TRAIN_SEEDS = range(100)
HELD_OUT_SEEDS = range(1000, 1012)


def rows(config: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A dataset's `type`: returns the transform of one row."""

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        entry = reasoning_gym.create_dataset(row["task"], size=1, seed=row["seed"], **TASKS[row["task"]])[0]
        text = f"{entry['question']}\nReply with the answer alone."
        return {**entry, "prompt": [{"role": "user", "content": text}]}

    return transform


def score(completions: list[Any], answer: list[str], metadata: list[Any], **_: Any) -> list[float]:
    """The verifier's score of the last word, which is where a model that speaks in sentences puts its answer."""
    words = [completion[-1]["content"].split() or [""] for completion in completions]
    return verifiers.reasoning_gym([last.strip(".,!*") for *_, last in words], answer, metadata)


def main() -> None:
    """Writes reasoning-train.jsonl and reasoning-held-out.jsonl beside this file."""
    for name, seeds in (("train", TRAIN_SEEDS), ("held-out", HELD_OUT_SEEDS)):
        pairs = [{"task": task, "seed": seed} for task in TASKS for seed in seeds]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        Path(__file__).with_name(f"reasoning-{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
