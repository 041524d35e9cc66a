"""KTO rows: each type against text written by hand, ids against those of the whole conversation, and labels."""

from typing import Any

import numpy as np
import pytest

from actors.errors import ConfigError
from actors.formats.base import FormatSpec, RowError
from actors.formats.kto import JUDGED_FORMATS, build_judged
from tests.unit.formats.conftest import assistant, user

CHATML = ("<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>")
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 3.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "5<|eot_id|>",
)
CHATML_SYSTEM = "<|im_start|>system\nBe terse.<|im_end|>\n"
LLAMA3_SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>"
OWN_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
OWN = (OWN_SYSTEM + CHATML[0], "5<|im_end|>\n")


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any, llama: Any) -> dict[str, Any]:
    return {"chatml": tokenizer, "llama3": llama}


def texts(spec: FormatSpec, row: dict[str, Any], tokenizer: Any) -> tuple[str, str]:
    judged = build_judged(spec, tokenizer)(row)
    return tokenizer.decode(judged["prompt_ids"]), tokenizer.decode(judged["completion_ids"])


ASKED = user("Add 2 and 3.")
SYSTEM = {"role": "system", "content": "Be terse."}
TEXT_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("argilla", {"instruction": "Add 2 and 3.", "completion": "5", "label": True}),
    ("intel", {"question": "Add 2 and 3.", "completion": "5", "label": True}),
    ("prompt_pairs", {"prompt": "Add 2 and 3.", "completion": "5", "label": True}),
    ("ultra", {"prompt": "Add 2 and 3.", "completion": "5", "label": True}),
]
CHAT_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("argilla_chat", {"completion": [ASKED, assistant("5")], "label": True}),
    ("argilla_chat", {"chosen": [ASKED], "completion": [assistant("5")], "label": True}),
]


@pytest.mark.parametrize(("name", "row"), TEXT_ROWS + CHAT_ROWS)
@pytest.mark.parametrize(("markup", "expected"), [("chatml", CHATML), ("llama3", LLAMA3)])
def test_a_row_in_a_markup(
    markup: str, expected: tuple[str, str], name: str, row: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    spec, tokenizer = FormatSpec(type=f"{markup}.{name}"), tokenizers[markup]
    assert texts(spec, row, tokenizer) == expected
    judged = build_judged(spec, tokenizer)(row)
    whole = tokenizer("".join(expected), add_special_tokens=False)["input_ids"]
    assert judged["prompt_ids"] + judged["completion_ids"] == whole


@pytest.mark.parametrize(("name", "row"), TEXT_ROWS)
@pytest.mark.parametrize(
    ("markup", "expected"),
    [("chatml", (CHATML_SYSTEM + CHATML[0], CHATML[1])), ("llama3", (LLAMA3_SYSTEM + LLAMA3[0], LLAMA3[1]))],
)
def test_a_row_with_a_system_prompt_in_a_markup(
    markup: str, expected: tuple[str, str], name: str, row: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    assert texts(FormatSpec(type=f"{markup}.{name}"), row | {"system": "Be terse."}, tokenizers[markup]) == expected


TURNS = [SYSTEM, user("Hi."), assistant("Hello."), ASKED]


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        (
            "chatml",
            (
                "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
                "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n",
                "5<|im_end|>",
            ),
        ),
        (
            "llama3",
            (
                "<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 3.<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "5<|eot_id|>",
            ),
        ),
    ],
)
def test_no_turn_of_a_longer_conversation_is_lost(markup: str, expected: tuple[str, str], tokenizers: dict[str, Any]) -> None:
    row = {"completion": [*TURNS, assistant("5")], "label": False}
    assert texts(FormatSpec(type=f"{markup}.argilla_chat"), row, tokenizers[markup]) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED], "completion": "5"},
        {"messages": [ASKED], "completion": assistant("5")},
        {"messages": [ASKED], "completion": [ASKED, assistant("5")]},
        {"prompt": [ASKED], "completion": [assistant("5")]},
        {"prompt": "Add 2 and 3.", "completion": "5"},
        {"messages": None, "prompt": "Add 2 and 3.", "completion": "5"},
    ],
)
def test_a_row_in_the_chat_template(row: dict[str, Any], tokenizer: Any) -> None:
    spec = FormatSpec(type="chat_template.default")
    assert texts(spec, row | {"label": True}, tokenizer) == OWN
    judged = build_judged(spec, tokenizer)(row | {"label": True})
    whole = tokenizer.apply_chat_template([ASKED, assistant("5")], return_dict=False)
    assert judged["prompt_ids"] + judged["completion_ids"] == whole


def test_a_longer_conversation_in_the_chat_template(tokenizer: Any) -> None:
    row = {"messages": TURNS, "completion": "\n5", "label": True}
    judged = build_judged(FormatSpec(type="chat_template"), tokenizer)(row)
    whole = tokenizer.apply_chat_template([*TURNS, assistant("\n5")], return_dict=False)
    assert judged["prompt_ids"] + judged["completion_ids"] == whole
    assert tokenizer.decode(judged["prompt_ids"] + judged["completion_ids"]) == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n"
        "<|im_start|>assistant\n\n5<|im_end|>\n"
    )


def test_field_names_and_the_template_of_the_entry_are_used(tokenizer: Any) -> None:
    spec = FormatSpec(
        type="chat_template.default",
        field_messages="conversation",
        field_completion="reply",
        field_label="liked",
        chat_template="chatml",
    )
    row = {"conversation": [ASKED], "reply": "5", "liked": False}
    assert texts(spec, row, tokenizer) == (CHATML[0], "5<|im_end|>\n")
    assert build_judged(spec, tokenizer)(row)["label"] is False


def test_user_defined(tokenizer: Any) -> None:
    spec = FormatSpec(
        type={
            "field_prompt": "q",
            "field_system": "rules",
            "field_completion": "a",
            "field_label": "liked",
            "prompt_format": "{system}\nQ: {prompt}\nA:",
            "completion_format": " {completion}!",
        }
    )
    row = {"q": "Add 2 and 3.", "rules": "Be terse.", "a": "5", "liked": 0}
    assert texts(spec, row, tokenizer) == ("Be terse.\nQ: Add 2 and 3.\nA:", " 5!<|im_end|>")
    assert build_judged(spec, tokenizer)(row)["label"] is False


def test_user_defined_by_default_is_the_text_of_the_columns(tokenizer: Any) -> None:
    row = {"prompt": "2 + 3 =", "completion": " 5<|im_end|>", "label": True}
    assert texts(FormatSpec(type={"field_prompt": None}), row, tokenizer) == ("2 + 3 =", " 5<|im_end|>")


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("true", True),
        ("False", False),
        ("TRUE ", True),
        (np.bool_(True), True),
        (np.int64(0), False),
    ],
)
def test_labels(given: Any, label: bool, tokenizer: Any) -> None:
    row = {"prompt": "Add 2 and 3.", "completion": "5", "label": given}
    assert build_judged(FormatSpec(type="chatml.ultra"), tokenizer)(row)["label"] is label


@pytest.mark.parametrize("given", [2, -1, 0.5, "yes", "1", "", [True], {"liked": True}])
def test_a_label_that_is_neither_true_nor_false_is_refused(given: Any, tokenizer: Any) -> None:
    row = {"prompt": "Add 2 and 3.", "completion": "5", "label": given}
    with pytest.raises(RowError, match="`label` is .*, not true or false"):
        build_judged(FormatSpec(type="chatml.ultra"), tokenizer)(row)


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("chatml.ultra", {"prompt": "Hi.", "completion": "5"}, "has no `label`; its fields are prompt, completion"),
        ("chatml.intel", {"prompt": "Hi.", "completion": "5", "label": True}, "has no `question`"),
        ("chatml.ultra", {"prompt": "Hi.", "completion": "", "label": True}, "`completion` is empty"),
        ("chatml.ultra", {"prompt": "Hi.", "completion": [ASKED], "label": True}, "`completion` is a list, not text"),
        ("llama3.argilla_chat", {"completion": "5", "label": True}, "`completion` is a str, not a list of messages"),
        ("llama3.argilla_chat", {"completion": [assistant("5")], "label": True}, "`completion` holds one message only"),
        ("llama3.argilla_chat", {"completion": [SYSTEM, ASKED], "label": True}, "`completion` ends with .* role 'user'"),
        ("chat_template.default", {"completion": "5", "label": True}, "has no `messages`"),
        ("chat_template.default", {"messages": [ASKED], "label": True}, "has no `completion`"),
        (
            "chat_template.default",
            {"messages": [ASKED, assistant("5")], "completion": "5", "label": True},
            "`messages` .* answered already",
        ),
    ],
)
def test_a_bad_row_says_which_field_is_wrong(name: str, row: dict[str, Any], reason: str, tokenizer: Any) -> None:
    encode = build_judged(FormatSpec(type=name), tokenizer)
    with pytest.raises(RowError, match=reason):
        encode(row)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (FormatSpec(type=None), "type is missing; this method takes chat_template.default, "),
        (FormatSpec(type="chatml.ulta"), "no 'chatml.ulta'; did you mean chatml.ultra"),
        (FormatSpec(type="user_defined"), "user_defined is written as a mapping"),
        (FormatSpec(type={"field_chosen": "a"}), "has no key 'field_chosen'"),
        (FormatSpec(type={"completion_format": "{chosen}"}), r"completion_format has \{chosen\}; it can have \{completion\}"),
    ],
)
def test_a_type_that_means_nothing_is_a_bad_config(spec: FormatSpec, reason: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_judged(spec, tokenizer)


def test_each_type_has_a_row_in_these_tests() -> None:
    tested = {f"{markup}.{name}" for markup in ("chatml", "llama3") for name, _ in TEXT_ROWS + CHAT_ROWS}
    assert set(JUDGED_FORMATS) == tested | {"chat_template.default"}
