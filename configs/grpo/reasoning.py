"""Tasks of reasoning-gym for a GRPO job: `rows` makes a prompt of a (task, seed) pair, `score` asks the task's verifier.

`python configs/grpo/reasoning.py` writes the two lists of pairs. A pair is held out or trained on, never both.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reasoning_gym

# Easy enough that a model of 135 M parameters is right now and then: without any success there is nothing to learn from.
TASKS: dict[str, dict[str, int]] = {
    "basic_arithmetic": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "leg_counting": {"min_animals": 1, "max_animals": 1, "min_instances": 1, "max_instances": 5},
}
TRAIN_SEEDS = range(100)
HELD_OUT_SEEDS = range(1000, 1012)


@functools.cache
def _dataset(task: str, seed: int) -> Any:
    return reasoning_gym.create_dataset(task, size=1, seed=seed, **TASKS[task])


def rows(config: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A dataset's `type`: returns the transform of one row."""

    def transform(row: dict[str, Any]) -> dict[str, Any]:
        question = _dataset(row["task"], row["seed"])[0]["question"]
        text = f"{question}\nReply with the answer alone."
        return {**row, "prompt": [{"role": "user", "content": text}]}

    return transform


def score(completions: list[Any], task: list[str], seed: list[int], **_: Any) -> list[float]:
    """The verifier's score, 0 to 1, of the last word, which is where a model that speaks in sentences puts its answer."""
    scores = []
    for completion, name, number in zip(completions, task, seed, strict=True):
        words = completion[-1]["content"].split()
        answer = words[-1].strip(".,!*") if words else ""
        scores.append(float(_dataset(name, number).score_answer(answer, _dataset(name, number)[0])))
    return scores


def main() -> None:
    """Writes reasoning-train.jsonl and reasoning-held-out.jsonl beside this file."""
    for name, seeds in (("train", TRAIN_SEEDS), ("held-out", HELD_OUT_SEEDS)):
        pairs = [{"task": task, "seed": seed} for task in TASKS for seed in seeds]
        text = "".join(json.dumps(pair) + "\n" for pair in pairs)
        Path(__file__).with_name(f"reasoning-{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
