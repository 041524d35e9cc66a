"""DPO and ORPO rows: a prompt with a better and a worse answer, to ids.

A new type is a line in PAIR_FORMATS; if its rows have fields of their own, it also needs a shape, a function here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from actors.formats.base import Encode, FormatSpec, Row, RowError, optional_text_of, text_of, value_of
from actors.formats.markup import (
    MARKUPS,
    Dialogue,
    Format,
    Shape,
    Texts,
    answer_of,
    answer_text_of,
    conversation_of,
    first_present,
    format_of,
    in_chat_template,
    in_markup,
    messages_of,
    pair_encoder,
    plain_text,
    prompt_of,
    question_of,
    tools_of,
    user_defined,
)


def build_pairs(spec: FormatSpec, tokenizer: Any) -> Encode:
    """A function of a raw row to its PairRow. Raises ConfigError for a type that is none of PAIR_FORMATS."""
    return pair_encoder(pair_format(spec), spec, tokenizer)


def pair_format(spec: FormatSpec) -> Format:
    """The format of an entry's type. Raises ConfigError for one that is none of PAIR_FORMATS.

    No type means that prompt, chosen and rejected are text that needs nothing done to it.
    """
    if isinstance(spec.type, Mapping):
        return user_defined(spec.type, answers=("chosen", "rejected"))
    return format_of(replace(spec, type="passthrough") if spec.type is None else spec, PAIR_FORMATS)


def _fields(prompt: tuple[str, ...], chosen: tuple[str, ...], rejected: tuple[str, ...]) -> Shape:
    """Rows of one question and two answers, all text, each under the first of its names that the row has."""

    def shape(row: Row, spec: FormatSpec) -> Dialogue:
        answers = [answer_text_of(row, first_present(row, names)) for names in (chosen, rejected)]
        return Dialogue(question_of(row, first_present(row, prompt)), answers)

    return shape


def _ultra(row: Row, spec: FormatSpec) -> Dialogue:
    """The question as text, and each answer at the end of a conversation that repeats the question."""
    for field in ("chosen", "rejected"):
        if (count := len(messages_of(row, field, spec))) > 2:
            raise RowError(
                f"`{field}` holds {count} messages, but ultra's rows are one question and one answer; "
                "for longer conversations use type argilla_chat"
            )
    return Dialogue(question_of(row, "prompt"), [answer_of(row, "chosen", spec), answer_of(row, "rejected", spec)])


def conversations(row: Row, spec: FormatSpec) -> Dialogue:
    """Two whole conversations that differ in the last message."""
    chosen, rejected = spec.field_chosen or "chosen", spec.field_rejected or "rejected"
    history, better = conversation_of(row, chosen, spec)
    other_history, worse = conversation_of(row, rejected, spec)
    if history != other_history:
        raise RowError(f"`{chosen}` and `{rejected}` differ before their last message, so they answer no common prompt")
    return Dialogue(history, [better, worse], tools_of(row, spec))


def _messages_and_answers(row: Row, spec: FormatSpec) -> Dialogue:
    """The conversation so far in one field, and the answers beside it."""
    history = prompt_of(row, spec.field_messages or "messages", spec)
    answers = [answer_of(row, field, spec) for field in (spec.field_chosen or "chosen", spec.field_rejected or "rejected")]
    return Dialogue(history, answers, tools_of(row, spec))


def _argilla(row: Row, spec: FormatSpec) -> Dialogue:
    """Two whole conversations; `system` and, if there was a single question, `prompt` win over what they hold."""
    dialogue = conversations(row, spec)
    system = [said for said in dialogue.history if said["role"] == "system"]
    turns = [said for said in dialogue.history if said["role"] != "system"]
    if content := optional_text_of(row, "system"):
        system = [{"role": "system", "content": content}]
    if len(turns) == 1 and (content := optional_text_of(row, "prompt")):
        turns = [{"role": "user", "content": content}]
    return replace(dialogue, history=[*system, *turns])


def _nectar(row: Row, spec: FormatSpec) -> Texts:
    """The two best of many ranked answers; rank 1 is the best."""
    answers = value_of(row, "answers")
    if not isinstance(answers, list) or len(answers) < 2:
        raise RowError("`answers` is not a list of two or more answers")
    for index, ranked in enumerate(answers):
        if not isinstance(ranked, Mapping) or not isinstance(ranked.get("rank"), int | float):
            raise RowError(f"`answers[{index}]` is not a mapping with an `answer` and a `rank` that is a number")
    best, second = sorted(answers, key=lambda ranked: float(ranked["rank"]))[:2]
    if best["rank"] == second["rank"]:
        raise RowError(f"`answers` has two of rank {best['rank']} at the top, so neither is the better one")
    prompt = f"<|system|>\n</s>\n<|user|>\n{text_of(row, 'prompt')}</s>\n<|assistant|>\n"
    return Texts(prompt, [text_of(best, "answer"), text_of(second, "answer")])


def _passthrough(row: Row, spec: FormatSpec) -> Texts:
    return Texts(text_of(row, "prompt"), [text_of(row, "chosen"), text_of(row, "rejected")])


MARKUP_SHAPES: dict[str, Shape] = {
    "default": _fields(
        ("prompt", "input", "question", "instruction"), ("chosen", "chosen_response"), ("rejected", "rejected_response")
    ),
    "argilla": _fields(
        ("instruction", "prompt", "input", "question"), ("chosen_response", "chosen"), ("rejected_response", "rejected")
    ),
    "argilla_chat": conversations,
    "icr": _fields(("input",), ("chosen",), ("rejected",)),
    "intel": _fields(("question",), ("chosen",), ("rejected",)),
    "prompt_pairs": _fields(("prompt",), ("chosen",), ("rejected",)),
    "ultra": _ultra,
}

PAIR_FORMATS: dict[str, Format] = {
    "chat_template.default": Format(_messages_and_answers, in_chat_template),
    "chat_template.argilla_chat": Format(conversations, in_chat_template),
    "chat_template.argilla": Format(_argilla, in_chat_template),
    "orpo.chat_template": Format(_argilla, in_chat_template),  # its older name
    **{f"{markup}.{name}": Format(shape, in_markup(markup)) for markup in MARKUPS for name, shape in MARKUP_SHAPES.items()},
    "zephyr.nectar": Format(_nectar, plain_text),
    "passthrough.default": Format(_passthrough, plain_text),
}
