"""KTO rows: a prompt, one answer and whether it was liked, to ids.

A new type is a line in JUDGED_FORMATS; if its rows have fields of their own, it also needs a shape, a function here.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.formats.base import Encode, FormatSpec, JudgedRow, Row, RowError, value_of
from actors.formats.markup import (
    MARKUPS,
    Dialogue,
    Format,
    Shape,
    answer_of,
    answer_text_of,
    conversation_of,
    first_present,
    format_of,
    ids_of,
    in_chat_template,
    in_markup,
    messages_of,
    prompt_of,
    question_of,
    tools_of,
    user_defined,
)


def build_judged(spec: FormatSpec, tokenizer: Any) -> Encode:
    """A function of a raw row to its JudgedRow. Raises ConfigError for a type that is none of JUDGED_FORMATS."""
    row_format = judged_format(spec)
    given = spec.type.get("field_label") if isinstance(spec.type, Mapping) else spec.field_label
    label_field = given or "label"
    write = row_format.writer(spec, tokenizer)

    def encode(row: Row) -> JudgedRow:
        label = label_of(row, label_field)
        prompt_ids, (completion_ids,) = ids_of(write(row_format.shape(row, spec)), tokenizer)
        return JudgedRow(prompt_ids=prompt_ids, completion_ids=completion_ids, label=label)

    return encode


def judged_format(spec: FormatSpec) -> Format:
    """The format of an entry's type. Raises ConfigError for one that is none of JUDGED_FORMATS."""
    if isinstance(spec.type, Mapping):
        return user_defined(spec.type, answers=("completion",), also=("field_label",))
    return format_of(spec, JUDGED_FORMATS)


def label_of(row: Row, field: str) -> bool:
    """True, 1 and "true" are a liked answer, False, 0 and "false" one that was not. Raises RowError for all else."""
    value = value_of(row, field)
    if isinstance(value, str) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    if not isinstance(value, int | np.integer | np.bool_) or value not in (0, 1):
        raise RowError(f"`{field}` is {value!r}, not true or false (1 and 0 will do)")
    return bool(value)


def _field(prompt: str) -> Shape:
    """Rows of one question and one answer, both text."""

    def shape(row: Row, spec: FormatSpec) -> Dialogue:
        return Dialogue(question_of(row, prompt), [answer_text_of(row, "completion")])

    return shape


def _conversation(row: Row, spec: FormatSpec) -> Dialogue:
    """A whole conversation in `completion`; or only the answer there, and what came before it in `chosen`."""
    if len(messages_of(row, "completion", spec)) == 1 and row.get("chosen") is not None:
        return Dialogue(prompt_of(row, "chosen", spec), [answer_of(row, "completion", spec)])
    history, last = conversation_of(row, "completion", spec)
    return Dialogue(history, [last])


def _messages_and_answer(row: Row, spec: FormatSpec) -> Dialogue:
    """The conversation so far in `messages` or `prompt`, as messages or as the user's text, and the answer beside it."""
    names = (spec.field_messages or "messages", spec.field_prompt or "prompt")
    history = prompt_of(row, first_present(row, names), spec)
    return Dialogue(history, [answer_of(row, spec.field_completion or "completion", spec)], tools_of(row, spec))


MARKUP_SHAPES: dict[str, Shape] = {
    "argilla": _field("instruction"),
    "argilla_chat": _conversation,
    "intel": _field("question"),
    "prompt_pairs": _field("prompt"),
    "ultra": _field("prompt"),
}

JUDGED_FORMATS: dict[str, Format] = {
    "chat_template.default": Format(_messages_and_answer, in_chat_template),
    **{f"{markup}.{name}": Format(shape, in_markup(markup)) for markup in MARKUPS for name, shape in MARKUP_SHAPES.items()},
}
