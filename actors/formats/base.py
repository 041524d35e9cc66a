"""What the dataset formats share: what they are built from, what they make, and how they read fields."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

Row = Mapping[str, Any]
IGNORED = -100  # the label of a token that is not trained, as torch's cross entropy has it


class RowError(ValueError):
    """Why a row cannot be used, for a person: it goes to quarantine with this text."""


class SftRow(TypedDict):
    """One document; labels[i] is input_ids[i] where the token is trained and IGNORED elsewhere."""

    input_ids: list[int]
    labels: list[int]


class PairRow(TypedDict):
    """A prompt and two answers, the better one first. Ids of the answers begin where the prompt's end."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class JudgedRow(TypedDict):
    """A prompt and an answer that was liked or not."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool


@dataclass(frozen=True)
class FormatSpec:
    """The keys of one dataset entry, and of the job, that decide how its rows become tokens. Names are Axolotl's."""

    type: str | Mapping[str, Any] | None = None
    field: str | None = None  # column of a completion dataset
    field_messages: str | None = None
    field_tools: str | None = None
    field_thinking: str | None = None
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    field_prompt: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    field_completion: str | None = None
    field_label: str | None = None
    message_property_mappings: Mapping[str, str] | None = None
    message_field_role: str | None = None
    message_field_content: str | None = None
    message_field_training: str | None = None
    message_field_training_detail: str | None = None
    roles: Mapping[str, list[str]] | None = None
    roles_to_train: tuple[str, ...] | None = None
    train_on_eos: str | None = None  # all | turn | last
    train_on_eot: str | None = None  # all | turn | last
    drop_system_message: bool = False
    chat_template: str | None = None  # the entry's, else the job's; None = the tokenizer's own
    chat_template_jinja: str | None = None
    train_on_inputs: bool = False  # the job's
    eot_tokens: tuple[str, ...] = ()  # the job's


Encode = Callable[[Row], Any]  # to SftRow, PairRow or JudgedRow; raises RowError


def value_of(row: Row, name: str) -> Any:
    """A field that must be there, of any type. Raises RowError."""
    value = row.get(name)
    if value is None:
        raise RowError(f"has no `{name}`; its fields are {', '.join(map(str, row)) or 'none'}")
    return value


def text_of(row: Row, name: str) -> str:
    """A field that must be text with something in it. Raises RowError."""
    value = value_of(row, name)
    if not isinstance(value, str):
        raise RowError(f"`{name}` is a {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"`{name}` is empty")
    return value


def optional_text_of(row: Row, name: str) -> str:
    """A field that may be missing or empty: "" then. Raises RowError when it is something other than text."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"`{name}` is a {type(value).__name__}, not text")
    return value


def without_nulls(value: Any) -> Any:
    """A copy without the nulls that a columnar file has where other rows have a key; templates take them for values."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def with_parsed(function: Any, key: str, place: str) -> Any:
    """A tool, or a call of one, with the JSON that datasets keep as text made an object. Raises RowError."""
    inner = function.get("function") if isinstance(function, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get(key), str):
        return function
    try:
        parsed = json.loads(inner[key])
    except ValueError as error:
        raise RowError(f"`{place}`: `{key}` is text that is not JSON ({error})") from error
    return {**function, "function": {**inner, key: parsed}}
