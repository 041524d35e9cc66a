"""Transforms of rows for `rl: grpo` that come with Eagleray, named in a dataset's `type` as `actors.prompts.NAME`.

Axolotl's form: `fn(config)` returns a function of a row, which gives the row a `prompt` and leaves its other columns to
the reward functions.
"""

from collections.abc import Callable, Mapping
from typing import Any

# The first of these that a row has is its prompt; an instruction has its input after it.
QUESTIONS = ("prompt", "question", "problem", "instruction", "input", "text", "messages")
SYSTEMS = ("system", "system_prompt")

Row = Mapping[str, Any]
Transform = Callable[[Row], dict[str, Any]]


def chat(config: object) -> Transform:
    """The question as a message of the user, after the row's system prompt; one that is a conversation stays as it is."""

    def transform(row: Row) -> dict[str, Any]:
        asked = question_of(row)
        if isinstance(asked, str):
            system = next((row[name] for name in SYSTEMS if row.get(name)), None)
            before = [{"role": "system", "content": system}] if system else []
            asked = [*before, {"role": "user", "content": asked}]
        return {**row, "prompt": asked}

    return transform


def text(config: object) -> Transform:
    """The question as it stands, for models without a chat template."""
    return lambda row: {**row, "prompt": question_of(row)}


def question_of(row: Row) -> Any:
    """Text, or the messages of a conversation. Raises ValueError for a row without any of QUESTIONS."""
    for name in QUESTIONS:
        if asked := row.get(name):
            more = row.get("input") if name == "instruction" else None
            return f"{asked}\n\n{more}" if more else asked
    raise ValueError(f"has none of {', '.join(QUESTIONS)}; its fields are {', '.join(map(str, row)) or 'none'}")
