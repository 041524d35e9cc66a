"""Reward model rows against text written by hand, and ids against those of the whole conversation."""

from typing import Any

import pytest

from actors.errors import ConfigError
from actors.formats.base import FormatSpec, RowError
from actors.formats.reward import build_reward_pairs
from tests.unit.formats.conftest import assistant, user

OWN_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TERSE = "<|im_start|>system\nBe terse.<|im_end|>\n"
PROMPT = "<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n"
ANSWERS = ("5<|im_end|>\n", "6<|im_end|>\n")
SPEC = FormatSpec(type="bradley_terry.chat_template")
ROW = {"input": "Add 2 and 3.", "chosen": "5", "rejected": "6"}


def texts(spec: FormatSpec, row: dict[str, Any], tokenizer: Any) -> tuple[str, str, str]:
    pair = build_reward_pairs(spec, tokenizer)(row)
    return (
        tokenizer.decode(pair["prompt_ids"]),
        tokenizer.decode(pair["chosen_ids"]),
        tokenizer.decode(pair["rejected_ids"]),
    )


ASKED = user("Add 2 and 3.")
SYSTEM = {"role": "system", "content": "Be terse."}
TURNS = [user("Hi."), assistant("Hello."), ASKED]


@pytest.mark.parametrize(
    ("row", "prompt", "history"),
    [
        (ROW, OWN_SYSTEM + PROMPT, [ASKED]),
        (ROW | {"system": ""}, OWN_SYSTEM + PROMPT, [ASKED]),
        (ROW | {"system": "Be terse."}, TERSE + PROMPT, [SYSTEM, ASKED]),
        (
            ROW | {"chosen": [ASKED, assistant("5")], "rejected": [ASKED, assistant("6")]},
            OWN_SYSTEM + PROMPT,
            [ASKED],
        ),
        (
            {"chosen": [SYSTEM, ASKED, assistant("5")], "rejected": [SYSTEM, ASKED, assistant("6")]},
            TERSE + PROMPT,
            [SYSTEM, ASKED],
        ),
        (
            {"chosen": [*TURNS, assistant("5")], "rejected": [*TURNS, assistant("6")]},
            OWN_SYSTEM + "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n" + PROMPT,
            TURNS,
        ),
    ],
)
def test_a_row(row: dict[str, Any], prompt: str, history: list[dict[str, Any]], tokenizer: Any) -> None:
    assert texts(SPEC, row, tokenizer) == (prompt, *ANSWERS)
    pair = build_reward_pairs(SPEC, tokenizer)(row)
    chosen = tokenizer.apply_chat_template([*history, assistant("5")], return_dict=False)
    rejected = tokenizer.apply_chat_template([*history, assistant("6")], return_dict=False)
    assert pair["prompt_ids"] + pair["chosen_ids"] == chosen
    assert pair["prompt_ids"] + pair["rejected_ids"] == rejected


def test_a_named_template_and_no_system_message(tokenizer: Any) -> None:
    spec = FormatSpec(type="bradley_terry.chat_template", chat_template="chatml", drop_system_message=True)
    assert texts(spec, ROW | {"system": "Be terse."}, tokenizer) == (PROMPT, *ANSWERS)


def test_field_names_of_the_entry_are_used(tokenizer: Any) -> None:
    spec = FormatSpec(
        type="bradley_terry.chat_template",
        field_system="rules",
        field_input="q",
        field_chosen="good",
        field_rejected="bad",
    )
    row = {"rules": "Be terse.", "q": "Add 2 and 3.", "good": "5", "bad": "6"}
    assert texts(spec, row, tokenizer) == (TERSE + PROMPT, *ANSWERS)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROW | {"rejected": "5"}, "chosen and rejected are equal"),
        (ROW | {"input": ""}, "`input` is empty"),
        (ROW | {"input": None}, "has no `input`"),
        (ROW | {"chosen": None}, "has no `chosen`"),
        (ROW | {"rejected": 6}, "`rejected` is a int, not a list of messages"),
        (ROW | {"system": 3}, "`system` is a int, not text"),
        (ROW | {"chosen": [user("5")]}, "`chosen` ends with a message of role 'user'"),
        (
            {"chosen": [ASKED, assistant("5")], "rejected": [user("?"), assistant("6")]},
            "`chosen` and `rejected` differ before their last message",
        ),
    ],
)
def test_a_bad_row_says_which_field_is_wrong(row: dict[str, Any], reason: str, tokenizer: Any) -> None:
    encode = build_reward_pairs(SPEC, tokenizer)
    with pytest.raises(RowError, match=reason):
        encode(row)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (None, "type is missing; this method takes bradley_terry.chat_template"),
        ({"field_prompt": "q"}, "type is a mapping; this method takes bradley_terry.chat_template"),
        ("bradley_terry", "no 'bradley_terry'; "),
        ("bradley_terry.chat_templat", "did you mean bradley_terry.chat_template"),
    ],
)
def test_a_type_that_means_nothing_is_a_bad_config(given: Any, reason: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_reward_pairs(FormatSpec(type=given), tokenizer)
