"""Which methods can use rows: for each the ways in which its rows may be laid out, tried on a sample of them.

The formats of `actors/formats` decide, as they do when a job prepares its rows: a layout fits when they can encode the
rows. A new layout is a line in LAYOUTS; those of a method stand in the order in which they are preferred. Prompts of
rl: grpo are in prompt_rows.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from actors.formats.base import FormatSpec
from actors.formats.markup import MARKUPS
from actors.preparing import PrepareSpec, RowEncoder, sequences
from actors.reading import BadRow, SourceSpec
from orchestrator.row_sample import MOST, Sample

FIRST = 20  # rows, of which half must fit before all of a sample are tried
UNBOUNDED = 2**31  # tokens: no row is too long to be looked at

QUESTIONS = ("prompt", "question", "instruction", "input")  # columns that pairs and judged answers may answer
ANSWERS = ("completion", "response", "answer", "output")
LABELS = ("label", "liked", "thumbs_up")


@dataclass(frozen=True)
class Layout:
    """Columns that rows of a method may have, and the keys of a dataset entry that read them."""

    columns: tuple[str, ...]
    type: Any  # {markup} stands for chatml or llama3, whichever the model knows
    keys: Mapping[str, Any] = field(default_factory=dict)

    def entry(self, path: str) -> dict[str, Any]:
        """The dataset entry, as a job file has it."""
        return {"path": path} | ({"type": self.type} if self.type is not None else {}) | dict(self.keys)


@dataclass(frozen=True)
class Fit:
    """A sample read by a layout."""

    layout: Layout
    lengths: tuple[int, ...]  # tokens of each row that it can read, sorted; of rl: grpo those of the prompt
    bad: tuple[BadRow, ...]  # rows that it cannot

    @property
    def good(self) -> bool:
        """Whether it can read most of the rows."""
        return len(self.lengths) >= MOST * (len(self.lengths) + len(self.bad)) > 0


def _pairs() -> Iterator[Layout]:
    yield Layout(("messages", "chosen", "rejected"), "chat_template.default")
    yield Layout(("system", "chosen", "rejected"), "chat_template.argilla")
    yield Layout(("chosen", "rejected"), "chat_template.argilla_chat")
    for name, rows in (("prompt", "prompt_pairs"), ("question", "intel"), ("input", "icr")):
        yield Layout(("system", name, "chosen", "rejected"), f"{{markup}}.{rows}")
    yield Layout(("system", "instruction", "chosen_response", "rejected_response"), "{markup}.argilla")
    renamed = {"field_chosen": "chosen_response", "field_rejected": "rejected_response"}
    for name in QUESTIONS:
        yield Layout((name, "chosen", "rejected"), "chat_template.default", {"field_messages": name})
        yield Layout((name, *renamed.values()), "chat_template.default", {"field_messages": name, **renamed})
    yield Layout(("prompt", "answers"), "zephyr.nectar")


def _ranked() -> Iterator[Layout]:
    yield Layout(("input", "chosen", "rejected"), "bradley_terry.chat_template")
    for name in QUESTIONS:
        yield Layout((name, "chosen", "rejected"), "bradley_terry.chat_template", {"field_input": name})
    yield Layout(("chosen", "rejected"), "bradley_terry.chat_template")


def _judged() -> Iterator[Layout]:
    for label in LABELS:
        named = {} if label == "label" else {"field_label": label}
        for name, rows in (("prompt", "prompt_pairs"), ("question", "intel"), ("instruction", "argilla")):
            yield Layout(("system", name, "completion", label), f"{{markup}}.{rows}", named)
        for answer in ANSWERS:
            keys = named if answer == "completion" else {**named, "field_completion": answer}
            yield Layout(("messages", answer, label), "chat_template.default", keys)
            for name in QUESTIONS:
                asked = {} if name == "prompt" else {"field_prompt": name}
                yield Layout((name, answer, label), "chat_template.default", {**asked, **keys})


def _answered() -> Iterator[Layout]:
    from_value = {"message_property_mappings": {"role": "from", "content": "value"}}
    yield Layout(("messages",), "chat_template")
    for name in ("conversations", "conversation", "dialogue", "dialog", "chat"):
        yield Layout((name,), "chat_template", {"field_messages": name})
        yield Layout((name,), "chat_template", {"field_messages": name, **from_value})
    yield Layout(("segments",), "input_output")
    yield Layout(("system", "instruction", "output"), "alpaca_w_system.load_instruct")
    yield Layout(("instruction", "output"), "alpaca")
    yield Layout(("instruction", "response"), "gpteacher")
    yield Layout(("system_prompt", "question", "response"), "alpaca_w_system.load_open_orca_chatml")
    yield Layout(("question", "answer"), "alpaca_chat.load_qa")
    yield Layout(("article", "summary"), "summarizetldr")
    for name in QUESTIONS:
        for answer in ANSWERS:
            yield Layout((name, answer), {"field_instruction": name, "field_output": answer, "no_input_format": "{markup}"})
    yield Layout(("text",), "completion")
    yield Layout(("content",), "completion", {"field": "content"})


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "dpo": tuple(_pairs()),
    "reward_trainer": tuple(_ranked()),
    "kto": tuple(_judged()),
    "sft": tuple(_answered()),
}


def fits_of(method: str, sample: Sample, tokenizer: Any) -> list[Fit]:
    """How the layouts of a method whose columns the rows have read them: the first good one, or all where none is."""
    tried = []
    for layout in LAYOUTS[method]:
        if sample.have(layout.columns):
            tried.append(_tried(method, _of_model(layout, tokenizer), sample, tokenizer))
            if tried[-1].good:
                return tried[-1:]
    return tried


def template_for(tokenizer: Any) -> str | None:
    """The chat_template that a job must name; None where the model has its own."""
    if tokenizer.chat_template:
        return None
    return markup_of(tokenizer) or "alpaca"  # whose turns are plain text, and which ends with the tokenizer's own EOS


def markup_of(tokenizer: Any) -> str | None:
    """chatml | llama3: the one whose ending is a token of the model."""
    return next((name for name, markup in MARKUPS.items() if len(tokenizer.tokenize(markup.end)) == 1), None)


def _of_model(layout: Layout, tokenizer: Any) -> Layout:
    """A layout with the model's own markup in it; where it has none, chatml's, and for single questions alpaca's."""
    name = markup_of(tokenizer)
    if isinstance(layout.type, str):
        return replace(layout, type=layout.type.replace("{markup}", name or "chatml"))
    turn = "### Instruction:\n{instruction}\n\n### Response:\n"
    if name is not None:
        markup = MARKUPS[name]
        turn = markup.turn.format(role="user", content="{instruction}") + markup.generation_prompt
    return replace(layout, type={**layout.type, "no_input_format": turn})


def _tried(method: str, layout: Layout, sample: Sample, tokenizer: Any) -> Fit:
    source = SourceSpec(FormatSpec(type=layout.type, chat_template=template_for(tokenizer), **layout.keys))
    encoder = RowEncoder(PrepareSpec(method, (source,), "", UNBOUNDED), source, tokenizer)
    lengths: list[int] = []
    bad: list[BadRow] = []
    for index, (place, row) in enumerate(zip(sample.places, sample.rows, strict=True), 1):
        encoded = encoder.rows(place, row)
        if isinstance(encoded, BadRow):
            bad.append(encoded)
        else:
            lengths.append(max(max(sequences(one)) for one in encoded))
        if index == FIRST and len(bad) > index / 2:
            break
    return Fit(layout, tuple(sorted(lengths)), (*sample.bad, *bad))
