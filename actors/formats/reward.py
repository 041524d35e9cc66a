"""Reward model rows: a question with a better and a worse answer, to ids.

A new type is a line in REWARD_FORMATS; if its rows have fields of their own, it also needs a shape, a function here.
"""

from typing import Any

from actors.formats.base import Encode, FormatSpec, Row
from actors.formats.markup import (
    Dialogue,
    Format,
    answer_of,
    format_of,
    in_chat_template,
    pair_encoder,
    question_of,
)
from actors.formats.preference import conversations


def build_reward_pairs(spec: FormatSpec, tokenizer: Any) -> Encode:
    """A function of a raw row to its PairRow. Raises ConfigError for a type that is none of REWARD_FORMATS."""
    return pair_encoder(reward_format(spec), spec, tokenizer)


def reward_format(spec: FormatSpec) -> Format:
    """The format of an entry's type. Raises ConfigError for one that is none of REWARD_FORMATS."""
    return format_of(spec, REWARD_FORMATS)


def _input_and_answers(row: Row, spec: FormatSpec) -> Dialogue:
    """`input` and two answers; or no `input`, and two whole conversations."""
    asked, chosen, rejected = spec.field_input or "input", spec.field_chosen or "chosen", spec.field_rejected or "rejected"
    if row.get(asked) is None and isinstance(row.get(chosen), list | tuple):
        return conversations(row, spec)
    answers = [answer_of(row, chosen, spec), answer_of(row, rejected, spec)]
    return Dialogue(question_of(row, asked, spec.field_system or "system"), answers)


REWARD_FORMATS: dict[str, Format] = {
    "bradley_terry.chat_template": Format(_input_and_answers, in_chat_template),
}
