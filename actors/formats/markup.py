"""What the preference, KTO and reward formats share: reading messages, writing them as text, and text to ids.

A format is two functions, and its table has a line for each type: a shape reads a row into a Dialogue of messages or
into Texts, and a writer makes of that the text the model is prompted with and the text of each whole conversation.
A new markup is a line in MARKUPS; the named chat templates are in templates.py.
"""

import difflib
import json
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from os.path import commonprefix  # of lists as well as of text
from typing import Any

from actors.errors import ConfigError
from actors.formats.base import (
    FormatSpec,
    PairRow,
    Row,
    RowError,
    optional_text_of,
    text_of,
    value_of,
    with_parsed,
    without_nulls,
)
from actors.formats.chat import ROLES, THINKING, Message
from actors.formats.templates import template_of


@dataclass(frozen=True)
class Dialogue:
    """What was said before the answer, and the answers to it."""

    history: list[Message]
    answers: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Texts:
    """A prompt that is complete as it is, and the answers to it."""

    prompt: str
    answers: list[str]


@dataclass(frozen=True)
class Rendered:
    """What the model is prompted with, and the whole conversation with each answer."""

    prompt: str
    wholes: list[str]
    has_bos: bool  # a chat template writes the BOS token itself, or leaves it out on purpose


Shape = Callable[[Row, FormatSpec], Any]  # to a Dialogue or Texts, whichever the writer takes; raises RowError
Writer = Callable[[FormatSpec, Any], Callable[[Any], Rendered]]  # (spec, tokenizer) to a writer of that job's rows


@dataclass(frozen=True)
class Format:
    """How rows of one type are read, and how they become text."""

    shape: Shape
    writer: Writer


def format_of(spec: FormatSpec, formats: Mapping[str, Format]) -> Format:
    """The table's line for a named type; a name without a dot means its `.default`. Raises ConfigError."""
    if not isinstance(spec.type, str):
        given = "is missing" if spec.type is None else "is a mapping"
        raise ConfigError(f"datasets: type {given}; this method takes {', '.join(formats)}")
    name = spec.type if "." in spec.type else f"{spec.type}.default"
    if name == "user_defined.default":
        raise ConfigError("datasets: type: user_defined is written as a mapping with field_prompt, prompt_format, …")
    if name not in formats:
        raise ConfigError(f"datasets: type: this method has no '{spec.type}'; {_meant(spec.type, formats)}")
    return formats[name]


def pair_encoder(row_format: Format, spec: FormatSpec, tokenizer: Any) -> Callable[[Row], PairRow]:
    """Rows whose shape has two answers, the better one first, to ids."""
    write = row_format.writer(spec, tokenizer)

    def encode(row: Row) -> PairRow:
        prompt_ids, (chosen_ids, rejected_ids) = ids_of(write(row_format.shape(row, spec)), tokenizer)
        if chosen_ids == rejected_ids:
            raise RowError("chosen and rejected are equal")
        return PairRow(prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids)

    return encode


# Text to ids.


def ids_of(rendered: Rendered, tokenizer: Any) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt and of each answer; joined, they are the ids of the whole conversation.

    Where the prompt's last token merges with an answer's first ("\\n" and "\\n" to "\\n\\n"), or where the template's
    generation prompt has more than an answered turn ("<think>"), the answers begin at the first id that differs.
    """
    bos = [] if rendered.has_bos else _bos(tokenizer)

    def ids(text: str) -> list[int]:
        plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return plain if plain[: len(bos)] == bos else bos + plain

    wholes = [ids(whole) for whole in rendered.wholes]
    prompt = list(commonprefix([ids(rendered.prompt), *wholes]))
    answers = [whole[len(prompt) :] for whole in wholes]
    if not all(answers):
        raise RowError("nothing is left of an answer once it is rendered; does the chat template write answers?")
    return prompt, answers


def _bos(tokenizer: Any) -> list[int]:
    """The BOS token, if the tokenizer is one that puts it before a text."""
    first: list[int] = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


# Writers: what a shape gives, to text.


def plain_text(spec: FormatSpec, tokenizer: Any) -> Callable[[Texts], Rendered]:
    """Texts as they stand; an answer that does not end with the EOS token gets it."""
    eos = tokenizer.eos_token
    if not eos:
        raise ConfigError("special_tokens: the tokenizer has no eos_token to end answers with; set special_tokens.eos_token")

    def write(texts: Texts) -> Rendered:
        ended = [answer if answer.endswith(eos) else answer + eos for answer in texts.answers]
        return Rendered(texts.prompt, [texts.prompt + answer for answer in ended], has_bos=False)

    return write


@dataclass(frozen=True)
class Markup:
    """How a turn is written, and what marks the assistant's turn at the end of a prompt."""

    turn: str
    generation_prompt: str
    end: str  # the token that ends an answer


MARKUPS = {
    "chatml": Markup("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"),
    "llama3": Markup(
        "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}


def in_markup(name: str) -> Writer:
    """A writer in one of MARKUPS, whatever the model's own chat template."""
    return partial(_in_markup, MARKUPS[name])


def _in_markup(markup: Markup, spec: FormatSpec, tokenizer: Any) -> Callable[[Dialogue], Rendered]:
    def write(dialogue: Dialogue) -> Rendered:
        turns = (markup.turn.format(role=said["role"], content=said["content"]) for said in dialogue.history)
        prompt = "".join(turns) + markup.generation_prompt
        return Rendered(prompt, [prompt + answer["content"] + markup.end for answer in dialogue.answers], has_bos=False)

    return write


def in_chat_template(spec: FormatSpec, tokenizer: Any) -> Callable[[Dialogue], Rendered]:
    """A writer in the entry's chat template, else the job's, else the tokenizer's own."""
    template = template_of(spec, tokenizer)

    def write(dialogue: Dialogue) -> Rendered:
        history = [said for said in dialogue.history if not (spec.drop_system_message and said["role"] == "system")]

        def text(messages: list[Message], add_generation_prompt: bool = False) -> str:
            rendered: str = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tools=dialogue.tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
            return rendered

        try:
            opening, prompt = text(history), text(history, add_generation_prompt=True)
            wholes = [text([*history, answer]) for answer in dialogue.answers]
        except Exception as error:  # a template is a program of its own, and a row may be none that it foresees
            raise RowError(f"the chat template cannot take the row ({type(error).__name__}: {error})") from error
        # Prompt and whole may differ in how the assistant's turn begins, not in what comes before it: such a template
        # rewrites history, and the answers would begin somewhere within it.
        before_answer = commonprefix([opening, prompt])
        if not all(whole.startswith(before_answer) for whole in wholes):
            raise RowError("the chat template writes the prompt otherwise once an answer follows, so it cannot be split")
        return Rendered(prompt, wholes, has_bos=True)

    return write


# Shapes: fields and messages that several formats read.


def first_present(row: Row, names: tuple[str, ...]) -> str:
    """The first of several names under which rows of one type may have a field; the first of all if none is there."""
    return next((name for name in names if row.get(name) is not None), names[0])


def question_of(row: Row, field: str, system_field: str = "system") -> list[Message]:
    """A single question as messages, after the system prompt if the row has one."""
    system = optional_text_of(row, system_field)
    asked: Message = {"role": "user", "content": text_of(row, field)}
    return [{"role": "system", "content": system}, asked] if system else [asked]


def answer_text_of(row: Row, field: str) -> Message:
    """A field that must be text, as the assistant's message."""
    return {"role": "assistant", "content": text_of(row, field)}


def answer_of(row: Row, field: str, spec: FormatSpec) -> Message:
    """An answer that may be text, a message, or messages of which it is the last."""
    value = value_of(row, field)
    if isinstance(value, str):
        return answer_text_of(row, field)
    if isinstance(value, Mapping):
        return _as_answer(_message(value, field, spec), field)
    return _as_answer(messages_of(row, field, spec)[-1], field)


def prompt_of(row: Row, field: str, spec: FormatSpec) -> list[Message]:
    """What was said before the answer: text, which is the user's, or messages."""
    if isinstance(value_of(row, field), str):
        return [{"role": "user", "content": text_of(row, field)}]
    return _unanswered(messages_of(row, field, spec), field)


def conversation_of(row: Row, field: str, spec: FormatSpec) -> tuple[list[Message], Message]:
    """A whole conversation, taken apart before its last message."""
    *history, last = messages_of(row, field, spec)
    if not history:
        raise RowError(f"`{field}` holds one message only: the question is missing, or the answer")
    return _unanswered(history, field), _as_answer(last, field)


def messages_of(row: Row, field: str, spec: FormatSpec) -> list[Message]:
    """A field that must be a list of messages, under the names that chat templates use."""
    value = value_of(row, field)
    if not isinstance(value, list | tuple):
        raise RowError(f"`{field}` is a {type(value).__name__}, not a list of messages")
    if not value:
        raise RowError(f"`{field}` is empty")
    return [_message(message, f"{field}[{index}]", spec) for index, message in enumerate(value)]


def tools_of(row: Row, spec: FormatSpec) -> list[Any] | None:
    """The tools that the row offers the assistant: a list, or a list as JSON text."""
    field = spec.field_tools or "tools"
    value = row.get(field)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(f"`{field}` is text that is not JSON ({error})") from error
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f"`{field}` is a {type(value).__name__}, not a list of tools")
    return [with_parsed(tool, "parameters", f"{field}[{index}]") for index, tool in enumerate(without_nulls(value))]


def _message(value: Any, place: str, spec: FormatSpec) -> Message:
    """Keys that no mapping names, such as tool_calls, are kept for the template."""
    if not isinstance(value, Mapping):
        raise RowError(f"`{place}` is a {type(value).__name__}, not a message with role and content")
    names = {  # what the template calls it: what the row calls it
        "role": spec.message_field_role or "role",
        "content": spec.message_field_content or "content",
        THINKING: spec.field_thinking or THINKING,
        **(spec.message_property_mappings or {}),
    }
    roles = {given: role for role, givens in spec.roles.items() for given in givens} if spec.roles else ROLES
    source = without_nulls(value)
    message = {key: kept for key, kept in source.items() if key not in names.values()}
    message |= {ours: source[theirs] for ours, theirs in names.items() if theirs in source}
    if message.get("tool_calls"):
        message["tool_calls"] = [with_parsed(call, "arguments", place) for call in message["tool_calls"]]
    try:
        given = text_of(source, names["role"])
        message["role"] = roles.get(given, given)
        # An empty system prompt is a way to turn off the template's own, and a call of a tool may stand alone.
        may_be_empty = message["role"] in ("system", "tool") or bool(message.get("tool_calls"))
        message["content"] = (optional_text_of if may_be_empty else text_of)(source, names["content"])
    except RowError as error:
        raise RowError(f"`{place}`: {error}") from error
    return message


def _unanswered(history: list[Message], field: str) -> list[Message]:
    if history[-1]["role"] == "assistant":
        raise RowError(f"`{field}` has an assistant's message where the prompt should end, so it is answered already")
    return history


def _as_answer(message: Message, field: str) -> Message:
    if message["role"] != "assistant":
        raise RowError(f"`{field}` ends with a message of role '{message['role']}', not with the assistant's answer")
    return message


# The mapping form of `type`.


def user_defined(mapping: Mapping[str, Any], answers: tuple[str, ...], also: tuple[str, ...] = ()) -> Format:
    """Axolotl's user_defined.default: field_* name the columns, and *_format how their text is put together.

    `answers` are the names of the answers, `also` keys that the mapping may have besides. Raises ConfigError.
    """
    columns = {name: mapping.get(f"field_{name}") or name for name in ("prompt", "system", *answers)}
    formats = {name: mapping.get(f"{name}_format") or f"{{{name}}}" for name in ("prompt", *answers)}
    known = [*(f"field_{name}" for name in columns), *(f"{name}_format" for name in formats), *also]
    for key, value in mapping.items():
        if value is not None and key not in known:
            raise ConfigError(f"datasets: type: a mapping has no key '{key}'; {_meant(str(key), known)}")
    _check_format("prompt", formats["prompt"], {"prompt", "system"})
    for name in answers:
        _check_format(name, formats[name], {name})

    def shape(row: Row, spec: FormatSpec) -> Texts:
        system = optional_text_of(row, columns["system"])
        prompt = formats["prompt"].format(prompt=text_of(row, columns["prompt"]), system=system)
        return Texts(prompt, [formats[name].format(**{name: text_of(row, columns[name])}) for name in answers])

    return Format(shape, plain_text)


def _check_format(name: str, text: Any, allowed: set[str]) -> None:
    where = f"datasets: type: {name}_format"
    if not isinstance(text, str):
        raise ConfigError(f"{where} is a {type(text).__name__}, not text; write it as '{{{name}}}'")
    try:
        used = {field for _, field, _, _ in string.Formatter().parse(text) if field is not None}
    except ValueError as error:
        raise ConfigError(f"{where} '{text}' is no format ({error}); write a literal brace twice") from error
    if unknown := used - allowed:
        raise ConfigError(
            f"{where} has {{{sorted(unknown)[0]}}}; it can have {', '.join(f'{{{n}}}' for n in sorted(allowed))}, "
            "and field_* say which columns they are; write a literal brace twice"
        )
    if name not in used:
        raise ConfigError(f"{where} '{text}' has no {{{name}}}, so all rows would be the same; add it")


def _meant(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
