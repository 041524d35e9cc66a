"""Instruction rows to token ids: the alpaca family, a mapping of one's own, `completion` and `input_output`.

A new instruction format is an entry of INSTRUCT_FORMATS: the fields it reads and the text that it puts around them.
Prompt and answer are tokenized each for itself, BOS before where the tokenizer has it, EOS after; the loss is on the
answer and its EOS, or on all with train_on_inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any

from actors.errors import ConfigError
from actors.formats.base import IGNORED, Encode, FormatSpec, Row, RowError, SftRow, optional_text_of, text_of, value_of


@dataclass(frozen=True)
class Style:
    """The text around an instruction, with and without an input, and around what is said before it."""

    system: str  # takes {system}
    turn: str  # takes {instruction} and {input}
    turn_no_input: str  # takes {instruction}


INSTRUCT = Style(
    system="{system}\n\n",
    turn="### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    turn_no_input="### Instruction:\n{instruction}\n\n### Response:\n",
)
CHAT = Style(
    system="SYSTEM: {system}\n",
    turn="USER: {instruction}\n{input}\nASSISTANT:",
    turn_no_input="USER: {instruction}\nASSISTANT:",
)
CHATML = Style(
    system="<|im_start|>system\n{system}<|im_end|>\n",
    turn="<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    turn_no_input="<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
)
OPEN_ORCA = Style(
    system="### System:\n{system}\n",
    turn="### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    turn_no_input="### Human:\n{instruction}\n### Assistant:\n",
)
PLAIN = Style(system="{system}", turn="{instruction}\n{input}", turn_no_input="{instruction}")
BARE_CHAT = replace(CHAT, system="{system}")
TLDR = Style(
    system="{system}",
    turn="USER: Summarize the following article as a TL;DR.\n{instruction}\n{input}\nASSISTANT:",
    turn_no_input="USER: Summarize the following article as a TL;DR.\n{instruction}\nASSISTANT:",
)


@dataclass(frozen=True)
class InstructFormat:
    """Which fields a row has and what text goes around them. The defaults are alpaca's."""

    style: Style = INSTRUCT
    system_prompt: str = (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
    )
    system_prompt_no_input: str = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    instruction: Callable[[Row], str] = lambda row: text_of(row, "instruction")
    input: Callable[[Row], str] = lambda row: optional_text_of(row, "input")
    output: Callable[[Row], str] = lambda row: text_of(row, "output")
    system_field: str | None = None  # a row's own system prompt, before the format's
    eos_count: int = 1


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: text_of(row, name)


def _first_of(*names: str) -> Callable[[Row], str]:
    """The first of several names that the row has; the last one's absence is what a person reads of."""
    return lambda row: text_of(row, next((name for name in names if row.get(name) is not None), names[-1]))


def _none(row: Row) -> str:
    return ""


def _choices(row: Row) -> str:
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices:
        raise RowError("`choices` is no list with something in it")
    return "\n".join(f'- "{choice}"' for choice in choices)


def _article_and(question: str) -> Callable[[Row], str]:
    return lambda row: f"{text_of(row, 'article')}\n===\n{text_of(row, question)}"


ALPACA = InstructFormat()
ALPACA_CHAT = replace(ALPACA, style=CHAT, output=_first_of("output", "response"))
NO_PROMPT = replace(ALPACA, system_prompt="", system_prompt_no_input="")
CONCISE = replace(
    ALPACA_CHAT,
    system_prompt="Below is an instruction from a USER that describes a task, paired with an input that provides further "
    "context. The ASSISTANT writes a response that concisely and appropriately completes the request.\n\n",
    system_prompt_no_input="Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that "
    "appropriately and concisely completes the request.\n\n",
)
QUESTION_ANSWER = replace(CONCISE, instruction=_field("question"), input=_none, output=_field("answer"))
MULTIPLE_CHOICE = replace(ALPACA, instruction=_field("question"), input=_choices, output=_first_of("solution", "explanation"))
WITH_SYSTEM = replace(NO_PROMPT, system_field="system")
OPEN_ORCA_ROWS = replace(
    NO_PROMPT, instruction=_field("question"), input=_none, output=_field("response"), system_field="system_prompt"
)
CONTEXT = "Use the following contextual information to concisely answer the question.\n"
CONTEXT_QA = replace(
    ALPACA,
    style=CHAT,
    system_prompt_no_input=CONTEXT,
    instruction=_article_and("question"),
    input=_none,
    output=_field("answer"),
)

INSTRUCT_FORMATS: dict[str, InstructFormat] = {
    "alpaca": ALPACA,
    "alpaca:chat": replace(ALPACA, style=CHAT),
    "alpaca_instruct": ALPACA,
    "alpaca_instruct.load_no_prompt": NO_PROMPT,
    "alpaca_chat": ALPACA_CHAT,
    "alpaca_chat.load_qa": QUESTION_ANSWER,
    "alpaca_chat.load_concise": CONCISE,
    "alpaca_chat.load_camel_ai": replace(QUESTION_ANSWER, instruction=_field("message_1"), output=_field("message_2")),
    "alpaca_chat.load_no_prompt": replace(NO_PROMPT, style=CHAT, output=_first_of("output", "response")),
    "alpaca_w_system": replace(WITH_SYSTEM, style=CHAT),
    "alpaca_w_system.load_chat": replace(WITH_SYSTEM, style=CHAT),
    "alpaca_w_system.load_instruct": WITH_SYSTEM,
    "alpaca_w_system.load_open_orca": replace(OPEN_ORCA_ROWS, style=OPEN_ORCA),
    "alpaca_w_system.load_open_orca_chatml": replace(OPEN_ORCA_ROWS, style=CHATML),
    "gpteacher": replace(ALPACA, output=_field("response")),
    "oasst": replace(ALPACA, instruction=_field("INSTRUCTION"), input=_none, output=_field("RESPONSE")),
    "jeopardy": replace(
        ALPACA,
        instruction=_field("question"),
        input=_field("category"),
        output=lambda row: "what is " + text_of(row, "answer"),
    ),
    "explainchoice": replace(
        MULTIPLE_CHOICE, system_prompt="Choose the answer that best answers the question. Explain your reasoning.\n"
    ),
    "concisechoice": replace(
        MULTIPLE_CHOICE,
        style=BARE_CHAT,
        system_prompt="Choose the answer that best answers the question. Be concise in your response.\n\n",
    ),
    "summarizetldr": replace(NO_PROMPT, style=TLDR, instruction=_field("article"), input=_none, output=_field("summary")),
    "context_qa": CONTEXT_QA,
    "context_qa.load_v2": replace(
        NO_PROMPT,
        style=PLAIN,
        instruction=lambda row: f"Context: {text_of(row, 'context')}\nQuestion: {text_of(row, 'question')}\n",
        input=_none,
        output=lambda row: "Answer: " + text_of(row, "answer"),
    ),
    "context_qa.load_404": replace(
        CONTEXT_QA,
        instruction=_article_and("unanswerable_question"),
        output=lambda row: (
            "The context provided does not contain any information about your inquiry. "
            "Therefore, I'm unable to answer your question based on the given context."
        ),
    ),
    "metharme": replace(
        NO_PROMPT, style=PLAIN, instruction=_field("prompt"), input=_none, output=_field("generation"), eos_count=3
    ),
}

MAPPING_DEFAULTS = {
    "system_prompt": "",
    "system_format": "{system}",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
    "format": "{instruction} {input} ",
    "no_input_format": "{instruction} ",
}
PLACES = {"system_format": ("system",), "format": ("instruction", "input"), "no_input_format": ("instruction",)}


def instruct(form: InstructFormat, spec: FormatSpec, tokenizer: Any) -> Encode:
    """A prompt made of an instruction and perhaps an input, and its answer."""
    pieces = Pieces(tokenizer)

    def encode(row: Row) -> SftRow:
        prompt = pieces.opening + pieces.ids(_prompt(form, row))
        answer = pieces.closed(pieces.ids(form.output(row)), form.eos_count)
        masked = prompt if spec.train_on_inputs else [IGNORED] * len(prompt)
        return {"input_ids": prompt + answer, "labels": masked + answer}

    return encode


def user_defined(mapping: Mapping[str, Any]) -> Callable[[FormatSpec, Any], Encode]:
    """`type:` as a mapping: the fields and the text around them, in the config itself."""
    keys = _mapping(mapping)
    form = InstructFormat(
        style=Style(keys["system_format"], keys["format"], keys["no_input_format"]),
        system_prompt=keys["system_prompt"],
        system_prompt_no_input=keys["system_prompt"],
        instruction=_field(keys["field_instruction"]),
        input=lambda row: optional_text_of(row, keys["field_input"]),
        output=_field(keys["field_output"]),
        system_field=keys["field_system"],
    )
    return partial(instruct, form)


def completion(spec: FormatSpec, tokenizer: Any) -> Encode:
    """One field of text, all of it trained."""
    pieces = Pieces(tokenizer)

    def encode(row: Row) -> SftRow:
        ids = pieces.closed(pieces.opening + pieces.ids(text_of(row, spec.field or "text")), 1)
        return {"input_ids": ids, "labels": list(ids)}

    return encode


def input_output(spec: FormatSpec, tokenizer: Any) -> Encode:
    """Segments of text, each trained or not. BOS, EOS and white space are the row's own; nothing is added."""
    pieces = Pieces(tokenizer)

    def encode(row: Row) -> SftRow:
        input_ids: list[int] = []
        labels: list[int] = []
        for text, trained in _segments(row):
            ids = pieces.ids(text)
            input_ids += ids
            labels += ids if trained or spec.train_on_inputs else [IGNORED] * len(ids)
        if all(label == IGNORED for label in labels):
            raise RowError("`segments` has nothing to train: no text in it has label true")
        return {"input_ids": input_ids, "labels": labels}

    return encode


class Pieces:
    """Token ids of parts of a document, and what opens and closes it."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError("special_tokens: the tokenizer has no EOS token to end a document; add eos_token")
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        opens = tokenizer.bos_token_id is not None and list(tokenizer("")["input_ids"])[:1] == [tokenizer.bos_token_id]
        self.opening = [int(tokenizer.bos_token_id)] if opens else []

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def closed(self, ids: list[int], eos_count: int) -> list[int]:
        """The ids and EOS, one fewer where the text brings its own."""
        return ids + [self.eos] * (eos_count - (ids[-1:] == [self.eos]))


def _prompt(form: InstructFormat, row: Row) -> str:
    instruction, added = form.instruction(row), form.input(row)
    system = form.system_prompt if added else form.system_prompt_no_input
    if form.system_field is not None:
        system = optional_text_of(row, form.system_field) if row.get(form.system_field) is not None else system
    before = form.style.system.format(system=system) if system else ""
    if added:
        return before + form.style.turn.format(instruction=instruction, input=added)
    return before + form.style.turn_no_input.format(instruction=instruction)


def _segments(row: Row) -> list[tuple[str, bool]]:
    segments = value_of(row, "segments")
    if not isinstance(segments, list) or not segments:
        raise RowError("`segments` is no list with something in it")
    read = []
    for index, segment in enumerate(segments):
        if not isinstance(segment, Mapping):
            raise RowError(f"`segments[{index}]` is a {type(segment).__name__}, not an object with text and label")
        text, label = segment.get("text"), segment.get("label")
        if not isinstance(text, str):
            raise RowError(f"`text` of `segments[{index}]` is a {type(text).__name__}, not text")
        if not isinstance(label, bool):
            raise RowError(f"`label` of `segments[{index}]` is {label!r}, neither true nor false")
        read.append((text, label))
    return read


def _mapping(given: Mapping[str, Any]) -> dict[str, str]:
    for key, value in given.items():
        if value is None:
            continue
        if key not in MAPPING_DEFAULTS:
            near = get_close_matches(str(key), MAPPING_DEFAULTS, n=3) or list(MAPPING_DEFAULTS)
            raise ConfigError(f"datasets: type.{key} is no key of a mapping; did you mean {', '.join(near)}?")
        if not isinstance(value, str):
            raise ConfigError(f"datasets: type.{key} takes text, not {value!r}")
    keys = MAPPING_DEFAULTS | {key: value for key, value in given.items() if value is not None}
    if given.get("no_input_format") is None and given.get("format") and "{input}" not in keys["format"]:
        keys["no_input_format"] = keys["format"]  # one format for all rows, or it would be used for none
    for key, names in PLACES.items():
        try:
            keys[key].format(**dict.fromkeys(names, ""))
        except (LookupError, ValueError) as error:
            places = " and ".join(f"{{{name}}}" for name in names)
            raise ConfigError(
                f"datasets: type.{key} takes {places}; write other braces twice ({type(error).__name__}: {error})"
            ) from error
    return keys
