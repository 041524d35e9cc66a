"""Instruction rows to ids and labels. Prompts are written out here as they must be, word for word."""

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from actors.errors import ConfigError
from actors.formats.base import IGNORED, FormatSpec, RowError
from actors.formats.sft import SFT_FORMATS, build_sft

ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
CONCISE = (
    "Below is an instruction from a USER that describes a task. The ASSISTANT writes a response that appropriately and "
    "concisely completes the request."
)
CONCISE_INPUT = (
    "Below is an instruction from a USER that describes a task, paired with an input that provides further context. "
    "The ASSISTANT writes a response that concisely and appropriately completes the request."
)
CONTEXT = "Use the following contextual information to concisely answer the question."
UNANSWERABLE = (
    "The context provided does not contain any information about your inquiry. "
    "Therefore, I'm unable to answer your question based on the given context."
)
EOS = "<|im_end|>"


def encode(tokenizer: Any, row: dict[str, Any], **keys: Any) -> Any:
    return build_sft(FormatSpec(**keys), tokenizer)(row)


def halves(tokenizer: Any, row: dict[str, Any], **keys: Any) -> tuple[str, str]:
    """The text that is not trained, and after it the text that is."""
    made = encode(tokenizer, row, **keys)
    ids, labels = made["input_ids"], made["labels"]
    masked = labels.count(IGNORED)
    assert labels == [IGNORED] * masked + ids[masked:]
    return tokenizer.decode(ids[:masked]), tokenizer.decode(ids[masked:])


def test_ids_and_labels_are_those_written_out_by_hand(tokenizer: Any) -> None:
    names = ["hello", "Ġworld", "Ġ", "yes", "<|im_end|>"]
    hello, world, space, yes, eos = tokenizer.convert_tokens_to_ids(names)
    row = {"question": "hello", "hint": "world", "reply": "yes"}
    mapping = {"field_instruction": "question", "field_input": "hint", "field_output": "reply"}
    assert encode(tokenizer, row, type=mapping) == {
        "input_ids": [hello, world, space, yes, eos],
        "labels": [-100, -100, -100, yes, eos],
    }
    assert encode(tokenizer, row, type=mapping, train_on_inputs=True)["labels"] == [hello, world, space, yes, eos]


@pytest.mark.parametrize(
    ("name", "row", "prompt", "answer"),
    [
        (
            "alpaca",
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            f"{ALPACA_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n",
            "3",
        ),
        (
            "alpaca",
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            f"{ALPACA}\n\n### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ),
        (
            "alpaca",
            {"instruction": "Greet.", "output": "Hi"},
            f"{ALPACA}\n\n### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ),
        (
            "alpaca_instruct",
            {"instruction": "Greet.", "output": "Hi"},
            f"{ALPACA}\n\n### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ),
        (
            "alpaca_instruct.load_no_prompt",
            {"instruction": "Greet.", "output": "Hi"},
            "### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ),
        (
            "alpaca:chat",
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            f"SYSTEM: {ALPACA_INPUT}\nUSER: Add.\n1 and 2\nASSISTANT:",
            "3",
        ),
        (
            "alpaca_chat",
            {"instruction": "Greet.", "response": "Hi"},
            f"SYSTEM: {ALPACA}\nUSER: Greet.\nASSISTANT:",
            "Hi",
        ),
        (
            "alpaca_chat",
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            f"SYSTEM: {ALPACA_INPUT}\nUSER: Add.\n1 and 2\nASSISTANT:",
            "3",
        ),
        (
            "alpaca_chat.load_no_prompt",
            {"instruction": "Greet.", "output": "Hi"},
            "USER: Greet.\nASSISTANT:",
            "Hi",
        ),
        (
            "alpaca_chat.load_qa",
            {"question": "Why?", "answer": "So."},
            f"SYSTEM: {CONCISE}\n\n\nUSER: Why?\nASSISTANT:",
            "So.",
        ),
        (
            "alpaca_chat.load_concise",
            {"instruction": "Add.", "input": "1 and 2", "response": "3"},
            f"SYSTEM: {CONCISE_INPUT}\n\n\nUSER: Add.\n1 and 2\nASSISTANT:",
            "3",
        ),
        (
            "alpaca_chat.load_camel_ai",
            {"message_1": "Why?", "message_2": "So."},
            f"SYSTEM: {CONCISE}\n\n\nUSER: Why?\nASSISTANT:",
            "So.",
        ),
        (
            "alpaca_w_system",
            {"system": "Be brief.", "instruction": "Add.", "input": "1 and 2", "output": "3"},
            "SYSTEM: Be brief.\nUSER: Add.\n1 and 2\nASSISTANT:",
            "3",
        ),
        (
            "alpaca_w_system.load_chat",
            {"system": "", "instruction": "Greet.", "output": "Hi"},
            "USER: Greet.\nASSISTANT:",
            "Hi",
        ),
        (
            "alpaca_w_system.load_instruct",
            {"system": "Be brief.", "instruction": "Greet.", "output": "Hi"},
            "Be brief.\n\n### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ),
        (
            "alpaca_w_system.load_open_orca",
            {"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
            "### System:\nBe brief.\n### Human:\nWhy?\n### Assistant:\n",
            "So.",
        ),
        (
            "alpaca_w_system.load_open_orca_chatml",
            {"system_prompt": "Be brief.", "question": "Why?", "response": "So."},
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            "So.",
        ),
        (
            "gpteacher",
            {"instruction": "Greet.", "input": "Ann", "response": "Hi, Ann"},
            f"{ALPACA_INPUT}\n\n### Instruction:\nGreet.\n\n### Input:\nAnn\n\n### Response:\n",
            "Hi, Ann",
        ),
        (
            "oasst",
            {"INSTRUCTION": "Greet.", "RESPONSE": "Hi"},
            f"{ALPACA}\n\n### Instruction:\nGreet.\n\n### Response:\n",
            "Hi",
        ),
        (
            "jeopardy",
            {"question": "It is blue.", "category": "NATURE", "answer": "the sky"},
            f"{ALPACA_INPUT}\n\n### Instruction:\nIt is blue.\n\n### Input:\nNATURE\n\n### Response:\n",
            "what is the sky",
        ),
        (
            "explainchoice",
            {"question": "Blue?", "choices": ["sky", "sun"], "explanation": "The sky is."},
            "Choose the answer that best answers the question. Explain your reasoning.\n\n\n"
            '### Instruction:\nBlue?\n\n### Input:\n- "sky"\n- "sun"\n\n### Response:\n',
            "The sky is.",
        ),
        (
            "concisechoice",
            {"question": "Blue?", "choices": ["sky", "sun"], "solution": "sky", "explanation": "It is."},
            "Choose the answer that best answers the question. Be concise in your response.\n\n"
            'USER: Blue?\n- "sky"\n- "sun"\nASSISTANT:',
            "sky",
        ),
        (
            "summarizetldr",
            {"article": "Long.", "summary": "Short."},
            "USER: Summarize the following article as a TL;DR.\nLong.\nASSISTANT:",
            "Short.",
        ),
        (
            "context_qa",
            {"article": "Grass is green.", "question": "Green?", "answer": "Grass"},
            f"SYSTEM: {CONTEXT}\n\nUSER: Grass is green.\n===\nGreen?\nASSISTANT:",
            "Grass",
        ),
        (
            "context_qa.load_v2",
            {"context": "Grass is green.", "question": "Green?", "answer": "Grass"},
            "Context: Grass is green.\nQuestion: Green?\n",
            "Answer: Grass",
        ),
        (
            "context_qa.load_404",
            {"article": "Grass is green.", "unanswerable_question": "Blue?"},
            f"SYSTEM: {CONTEXT}\n\nUSER: Grass is green.\n===\nBlue?\nASSISTANT:",
            UNANSWERABLE,
        ),
        ("metharme", {"prompt": "<|user|>Why?<|model|>", "generation": "So."}, "<|user|>Why?<|model|>", f"So.{EOS}{EOS}"),
    ],
)
def test_a_prompt_and_its_answer(tokenizer: Any, name: str, row: dict[str, Any], prompt: str, answer: str) -> None:
    assert halves(tokenizer, row, type=name) == (prompt, answer + EOS)


def test_every_instruction_format_has_its_prompt_above() -> None:
    mark = next(m for m in test_a_prompt_and_its_answer.pytestmark if m.name == "parametrize")  # type: ignore[attr-defined]
    others = {"chat_template", "sharegpt", "completion", "input_output"}
    assert {case[0] for case in mark.args[1]} | others == set(SFT_FORMATS)


def test_train_on_inputs_trains_the_prompt_too(tokenizer: Any) -> None:
    row = {"instruction": "Greet.", "output": "Hi"}
    _, trained = halves(tokenizer, row, type="alpaca", train_on_inputs=True)
    assert trained == f"{ALPACA}\n\n### Instruction:\nGreet.\n\n### Response:\nHi{EOS}"


def test_an_answer_that_brings_its_own_eos_gets_no_second_one(tokenizer: Any) -> None:
    assert halves(tokenizer, {"instruction": "Greet.", "output": f"Hi{EOS}"}, type="alpaca")[1] == f"Hi{EOS}"
    assert halves(tokenizer, {"prompt": "Greet.", "generation": f"Hi{EOS}"}, type="metharme")[1] == f"Hi{EOS}{EOS}{EOS}"
    assert halves(tokenizer, {"text": f"Hi{EOS}"}, type="completion")[1] == f"Hi{EOS}"


def test_bos_opens_the_document_once_where_the_tokenizer_has_it(tokenizer: Any) -> None:
    bos = "<|im_start|>"
    opening = copy.deepcopy(tokenizer)
    opening.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 1)])
    assert opening("a")["input_ids"][0] == 1, "the tokenizer adds no BOS, so this test shows nothing"
    row = {"instruction": "Greet.", "output": "Hi"}
    prompt, answer = halves(opening, row, type="alpaca_instruct.load_no_prompt")
    assert (prompt, answer) == (f"{bos}### Instruction:\nGreet.\n\n### Response:\n", f"Hi{EOS}")
    assert halves(opening, {"text": "Hi"}, type="completion") == ("", f"{bos}Hi{EOS}")
    segments = [{"text": "a", "label": False}, {"text": "b", "label": True}]
    assert halves(opening, {"segments": segments}, type="input_output") == ("a", "b")


def test_completion_trains_all_of_its_field(tokenizer: Any) -> None:
    assert halves(tokenizer, {"text": "Once upon a time"}, type="completion") == ("", f"Once upon a time{EOS}")
    assert halves(tokenizer, {"text": "no", "story": "Once"}, type="completion", field="story") == ("", f"Once{EOS}")


def test_input_output_adds_nothing_and_trains_what_is_labelled(tokenizer: Any) -> None:
    row = {
        "segments": [
            {"label": True, "text": "hello"},
            {"label": False, "text": " world "},
            {"label": True, "text": f"yes{EOS}"},
        ]
    }
    hello, world, space, yes, eos = tokenizer.convert_tokens_to_ids(["hello", "Ġworld", "Ġ", "yes", EOS])
    made = encode(tokenizer, row, type="input_output")
    assert made["input_ids"] == [hello, world, space, yes, eos]
    assert made["labels"] == [hello, -100, -100, yes, eos]
    assert encode(tokenizer, row, type="input_output", train_on_inputs=True)["labels"] == made["input_ids"]


MAPPING = {
    "system_prompt": "Be brief.",
    "system_format": "<<{system}>>\n",
    "field_system": "rules",
    "field_instruction": "question",
    "field_input": "hint",
    "field_output": "reply",
    "format": "[INST] {instruction} ({input}) [/INST]",
    "no_input_format": "[INST] {instruction} [/INST]",
}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "Why?", "hint": "Think."}, "<<Be brief.>>\n[INST] Why? (Think.) [/INST]"),
        ({"question": "Why?"}, "<<Be brief.>>\n[INST] Why? [/INST]"),
        ({"question": "Why?", "rules": "Be long."}, "<<Be long.>>\n[INST] Why? [/INST]"),
        ({"question": "Why?", "rules": ""}, "[INST] Why? [/INST]"),
        ({"question": "Why {so}?"}, "<<Be brief.>>\n[INST] Why {so}? [/INST]"),
    ],
)
def test_a_mapping_of_ones_own(tokenizer: Any, row: dict[str, Any], prompt: str) -> None:
    assert halves(tokenizer, {**row, "reply": "So."}, type=MAPPING) == (prompt, f"So.{EOS}")


def test_a_mappings_defaults(tokenizer: Any) -> None:
    row = {"system": "Be brief. ", "instruction": "Add", "input": "1 2", "output": "3"}
    assert halves(tokenizer, row, type={}) == ("Be brief. Add 1 2 ", f"3{EOS}")
    del row["input"], row["system"]
    assert halves(tokenizer, row, type={"format": None, "field": None}) == ("Add ", f"3{EOS}")
    # A format without a place for the input does for rows without one.
    assert halves(tokenizer, row, type={"format": "Q: {instruction}\n"}) == ("Q: Add\n", f"3{EOS}")
    both = {"format": "Q: {instruction}\n", "no_input_format": "{instruction}: "}
    assert halves(tokenizer, row, type=both) == ("Add: ", f"3{EOS}")
    assert halves(tokenizer, row, type={"format": "Q: {instruction} {input}\n"}) == ("Add ", f"3{EOS}")


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("alpaca", {"input": "a", "output": "b"}, "has no `instruction`; its fields are input, output"),
        ("alpaca", {"instruction": "a"}, "has no `output`; its fields are instruction"),
        ("alpaca", {"instruction": "a", "output": ["b"]}, "`output` is a list, not text"),
        ("alpaca", {"instruction": "a", "output": " "}, "`output` is empty"),
        ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "`input` is a int, not text"),
        ("alpaca_w_system", {"instruction": "a", "system": 3, "output": "b"}, "`system` is a int, not text"),
        ("explainchoice", {"question": "a", "solution": "b"}, "`choices` is no list with something in it"),
        ("explainchoice", {"question": "a", "choices": ["b"]}, "has no `explanation`"),
        ("completion", {"content": "a"}, "has no `text`; its fields are content"),
        ("completion", {"text": ""}, "`text` is empty"),
        ("input_output", {"text": "a"}, "has no `segments`; its fields are text"),
        ("input_output", {"segments": "a"}, "`segments` is no list with something in it"),
        ("input_output", {"segments": ["a"]}, r"`segments\[0\]` is a str, not an object with text and label"),
        ("input_output", {"segments": [{"label": True}]}, r"`text` of `segments\[0\]` is a NoneType, not text"),
        ("input_output", {"segments": [{"text": "a", "label": 1}]}, r"`label` of `segments\[0\]` is 1, neither true nor false"),
        ("input_output", {"segments": [{"text": "a", "label": False}]}, "`segments` has nothing to train"),
        ({"field_output": "reply"}, {"instruction": "a", "output": "b"}, "has no `reply`; its fields are instruction, output"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer: Any, kind: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        encode(tokenizer, row, type=kind)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (None, "type: is missing"),
        ("alpacca", "there is no type: alpacca; choose one of alpaca,"),
        ("chat_tmplate", "there is no type: chat_tmplate; choose one of chat_template"),
        ("reflection", "type: reflection is not implemented yet; write the rows that it would make into a file"),
        ("llama2_chat", "type: llama2_chat is not implemented yet; use chat_template, with field_messages"),
        ("zzz", "there is no type: zzz; choose one of chat_template, sharegpt, completion, input_output, alpaca,"),
        ({"field_instructon": "a"}, "type.field_instructon is no key of a mapping; did you mean field_instruction"),
        ({"field": "text"}, "type.field is no key of a mapping"),
        ({"format": 3}, "type.format takes text, not 3"),
        ({"format": "{question}"}, r"type.format takes \{instruction\} and \{input\}.*question"),
        ({"no_input_format": "{input}"}, r"type.no_input_format takes \{instruction\};"),
        ({"system_format": "{"}, r"type.system_format takes \{system\};"),
    ],
)
def test_types_that_cannot_be_used(tokenizer: Any, kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sft(FormatSpec(type=kind), tokenizer)


def test_a_tokenizer_without_an_eos_token(tokenizer: Any) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="has no EOS token"):
        build_sft(FormatSpec(type="alpaca"), endless)
