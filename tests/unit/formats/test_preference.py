"""DPO and ORPO rows: each type against text written by hand, and ids against those of the whole conversation."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from actors.errors import ConfigError
from actors.formats.base import FormatSpec, RowError
from actors.formats.preference import PAIR_FORMATS, build_pairs
from tests.unit.formats.conftest import assistant, user

Messages = list[dict[str, Any]]

CHATML = ("<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n", "5<|im_end|>", "6<|im_end|>")
CHATML_SYSTEM = ("<|im_start|>system\nBe terse.<|im_end|>\n" + CHATML[0], *CHATML[1:])
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 3.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "5<|eot_id|>",
    "6<|eot_id|>",
)
LLAMA3_SYSTEM = ("<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>" + LLAMA3[0], *LLAMA3[1:])
# SmolLM2's own template has a system prompt of its own and a line break after every turn.
OWN_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
OWN = (OWN_SYSTEM + CHATML[0], "5<|im_end|>\n", "6<|im_end|>\n")
OWN_TERSE = (CHATML_SYSTEM[0], "5<|im_end|>\n", "6<|im_end|>\n")


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any, llama: Any) -> dict[str, Any]:
    return {"chatml": tokenizer, "llama3": llama}


def texts(spec: FormatSpec, row: Mapping[str, Any], tokenizer: Any) -> tuple[str, str, str]:
    pair = build_pairs(spec, tokenizer)(row)
    return (
        tokenizer.decode(pair["prompt_ids"]),
        tokenizer.decode(pair["chosen_ids"]),
        tokenizer.decode(pair["rejected_ids"]),
    )


ASKED = user("Add 2 and 3.")
ROWS_OF_MARKUPS: list[tuple[str, dict[str, Any]]] = [
    ("default", {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}),
    ("default", {"input": "Add 2 and 3.", "chosen": "5", "rejected": "6"}),
    ("default", {"question": "Add 2 and 3.", "chosen_response": "5", "rejected_response": "6"}),
    ("default", {"instruction": "Add 2 and 3.", "prompt": None, "chosen": "5", "rejected": "6"}),
    ("argilla", {"instruction": "Add 2 and 3.", "chosen_response": "5", "rejected_response": "6"}),
    ("argilla", {"instruction": "Add 2 and 3.", "chosen": "5", "rejected": "6"}),
    ("argilla_chat", {"chosen": [ASKED, assistant("5")], "rejected": [ASKED, assistant("6")]}),
    ("icr", {"input": "Add 2 and 3.", "chosen": "5", "rejected": "6"}),
    ("intel", {"question": "Add 2 and 3.", "chosen": "5", "rejected": "6"}),
    ("prompt_pairs", {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}),
    ("ultra", {"prompt": "Add 2 and 3.", "chosen": [ASKED, assistant("5")], "rejected": [ASKED, assistant("6")]}),
]


@pytest.mark.parametrize(("name", "row"), ROWS_OF_MARKUPS)
@pytest.mark.parametrize(("markup", "expected"), [("chatml", CHATML), ("llama3", LLAMA3)])
def test_a_row_in_a_markup(
    markup: str, expected: tuple[str, str, str], name: str, row: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    spec, tokenizer = FormatSpec(type=f"{markup}.{name}"), tokenizers[markup]
    assert texts(spec, row, tokenizer) == expected
    pair = build_pairs(spec, tokenizer)(row)
    prompt, chosen, rejected = expected
    assert pair["prompt_ids"] + pair["chosen_ids"] == tokenizer(prompt + chosen, add_special_tokens=False)["input_ids"]
    assert pair["prompt_ids"] + pair["rejected_ids"] == tokenizer(prompt + rejected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("name", "row"), [case for case in ROWS_OF_MARKUPS if case[0] != "argilla_chat"])
@pytest.mark.parametrize(("markup", "expected"), [("chatml", CHATML_SYSTEM), ("llama3", LLAMA3_SYSTEM)])
def test_a_row_with_a_system_prompt_in_a_markup(
    markup: str, expected: tuple[str, str, str], name: str, row: dict[str, Any], tokenizers: dict[str, Any]
) -> None:
    spec = FormatSpec(type=f"{markup}.{name}")
    assert texts(spec, row | {"system": "Be terse."}, tokenizers[markup]) == expected


@pytest.mark.parametrize("system", [None, ""])
def test_an_empty_system_prompt_is_none(system: str | None, tokenizer: Any) -> None:
    row = {"system": system, "question": "Add 2 and 3.", "chosen": "5", "rejected": "6"}
    assert texts(FormatSpec(type="chatml.intel"), row, tokenizer) == CHATML


@pytest.mark.parametrize(("name", "expected"), [("chatml", CHATML), ("llama3", LLAMA3)])
def test_a_markup_alone_is_its_default(name: str, expected: tuple[str, str, str], tokenizers: dict[str, Any]) -> None:
    row = {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}
    assert texts(FormatSpec(type=name), row, tokenizers[name]) == expected


def test_a_tokenizer_that_parts_the_line_breaks_before_text_gives_them_to_the_answers(tokenizer: Any) -> None:
    row = {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}
    prompt, chosen, rejected = texts(FormatSpec(type="llama3"), row, tokenizer)  # "\n\n" alone, but "\n", "\n", "5"
    assert (prompt + "\n\n", chosen, rejected) == (LLAMA3[0], "\n\n5<|eot_id|>", "\n\n6<|eot_id|>")


def test_braces_in_a_row_are_text(tokenizer: Any) -> None:
    row = {"prompt": "What is {role}?", "chosen": "{}", "rejected": "{0}"}
    assert texts(FormatSpec(type="chatml.prompt_pairs"), row, tokenizer) == (
        "<|im_start|>user\nWhat is {role}?<|im_end|>\n<|im_start|>assistant\n",
        "{}<|im_end|>",
        "{0}<|im_end|>",
    )


TURNS = [{"role": "system", "content": "Be terse."}, user("Hi."), assistant("Hello."), user("Add 2 and 3.")]
TURNS_ROW = {"chosen": [*TURNS, assistant("5")], "rejected": [*TURNS, assistant("6")]}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "chatml.argilla_chat",
            (
                "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
                "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n",
                "5<|im_end|>",
                "6<|im_end|>",
            ),
        ),
        (
            "llama3.argilla_chat",
            (
                "<|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nHi.<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nAdd 2 and 3.<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "5<|eot_id|>",
                "6<|eot_id|>",
            ),
        ),
        (
            "chat_template.argilla_chat",
            (
                "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
                "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n",
                "5<|im_end|>\n",
                "6<|im_end|>\n",
            ),
        ),
    ],
)
def test_no_turn_of_a_longer_conversation_is_lost(
    name: str, expected: tuple[str, str, str], tokenizer: Any, tokenizers: dict[str, Any]
) -> None:
    assert texts(FormatSpec(type=name), TURNS_ROW, tokenizers.get(name.split(".")[0], tokenizer)) == expected


# Each with the messages of the whole conversations, written out.
CHAT_TEMPLATE_ROWS: list[tuple[str, dict[str, Any], tuple[str, str, str], Messages, Messages]] = [
    (
        "chat_template.default",
        {"messages": [ASKED], "chosen": assistant("5"), "rejected": assistant("6")},
        OWN,
        [ASKED, assistant("5")],
        [ASKED, assistant("6")],
    ),
    (
        "chat_template.default",
        {"messages": "Add 2 and 3.", "chosen": "5", "rejected": [ASKED, assistant("6")]},
        OWN,
        [ASKED, assistant("5")],
        [ASKED, assistant("6")],
    ),
    (
        "chat_template.default",
        {"messages": TURNS, "chosen": assistant("5"), "rejected": assistant("6")},
        (
            "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
            "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n",
            "5<|im_end|>\n",
            "6<|im_end|>\n",
        ),
        [*TURNS, assistant("5")],
        [*TURNS, assistant("6")],
    ),
    (
        "chat_template.argilla_chat",
        {"chosen": [ASKED, assistant("5")], "rejected": [ASKED, assistant("6")]},
        OWN,
        [ASKED, assistant("5")],
        [ASKED, assistant("6")],
    ),
    (
        "chat_template.argilla",
        {"system": "Be terse.", "chosen": [ASKED, assistant("5")], "rejected": [ASKED, assistant("6")]},
        OWN_TERSE,
        [TURNS[0], ASKED, assistant("5")],
        [TURNS[0], ASKED, assistant("6")],
    ),
    (
        "orpo.chat_template",
        {"prompt": "Add 2 and 3.", "chosen": [ASKED, assistant("5")], "rejected": [ASKED, assistant("6")]},
        OWN,
        [ASKED, assistant("5")],
        [ASKED, assistant("6")],
    ),
    (
        "chat_template.argilla",
        {"prompt": "Add 2 and 3.", "chosen": [user("?"), assistant("5")], "rejected": [user("?"), assistant("6")]},
        OWN,
        [ASKED, assistant("5")],
        [ASKED, assistant("6")],
    ),
]


@pytest.mark.parametrize(("name", "row", "expected", "chosen", "rejected"), CHAT_TEMPLATE_ROWS)
def test_a_row_in_the_chat_template(
    name: str, row: dict[str, Any], expected: tuple[str, str, str], chosen: Messages, rejected: Messages, tokenizer: Any
) -> None:
    spec = FormatSpec(type=name)
    assert texts(spec, row, tokenizer) == expected
    pair = build_pairs(spec, tokenizer)(row)
    assert pair["prompt_ids"] + pair["chosen_ids"] == tokenizer.apply_chat_template(chosen, return_dict=False)
    assert pair["prompt_ids"] + pair["rejected_ids"] == tokenizer.apply_chat_template(rejected, return_dict=False)


def test_argilla_takes_a_long_conversation_from_the_messages_not_from_prompt(tokenizer: Any) -> None:
    prompt, _, _ = texts(FormatSpec(type="chat_template.argilla"), TURNS_ROW | {"prompt": "Hi."}, tokenizer)
    assert prompt == (
        "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\nHi.<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAdd 2 and 3.<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("\n5", "6"), ("\n\n5", "\n\n6"), (" 5", "6"), ("5\n", "5"), ("5 apples", "5"), ("<|im_end|>", "5")],
)
def test_answers_that_merge_with_the_prompt_are_split_where_the_ids_part(chosen: str, rejected: str, tokenizer: Any) -> None:
    pair = build_pairs(FormatSpec(type="chat_template.default"), tokenizer)(
        {"messages": "Add 2 and 3.", "chosen": chosen, "rejected": rejected}
    )
    prompt = tokenizer.apply_chat_template([ASKED], add_generation_prompt=True, return_dict=False)
    assert pair["prompt_ids"] == prompt[: len(pair["prompt_ids"])]
    assert len(pair["prompt_ids"]) >= len(prompt) - 1  # "\n" at most
    for ids, answer in ((pair["chosen_ids"], chosen), (pair["rejected_ids"], rejected)):
        whole = tokenizer.apply_chat_template([ASKED, assistant(answer)], return_dict=False)
        assert pair["prompt_ids"] + ids == whole


def test_field_names_and_roles_of_the_entry_are_used(tokenizer: Any) -> None:
    spec = FormatSpec(
        type="chat_template.default",
        field_messages="conversation",
        field_chosen="good",
        field_rejected="bad",
        message_property_mappings={"role": "from", "content": "value"},
        roles={"user": ["customer"], "assistant": ["agent"]},
    )
    row = {
        "conversation": [{"from": "customer", "value": "Add 2 and 3."}],
        "good": {"from": "agent", "value": "5"},
        "bad": {"from": "agent", "value": "6"},
    }
    assert texts(spec, row, tokenizer) == OWN


def test_human_and_gpt_are_user_and_assistant(tokenizer: Any) -> None:
    spec = FormatSpec(type="chat_template.argilla_chat", message_field_role="from", message_field_content="value")
    asked = {"from": "human", "value": "Add 2 and 3."}
    row = {"chosen": [asked, {"from": "gpt", "value": "5"}], "rejected": [asked, {"from": "gpt", "value": "6"}]}
    assert texts(spec, row, tokenizer) == OWN


def test_drop_system_message(tokenizer: Any) -> None:
    spec = FormatSpec(type="chat_template.default", drop_system_message=True)
    row = {"messages": [TURNS[0], ASKED], "chosen": "5", "rejected": "6"}
    assert texts(spec, row, tokenizer) == OWN


def test_an_empty_system_message_turns_off_the_templates_own(tokenizer: Any) -> None:
    row = {"messages": [{"role": "system", "content": ""}, ASKED], "chosen": "5", "rejected": "6"}
    prompt, _, _ = texts(FormatSpec(type="chat_template.default"), row, tokenizer)
    assert prompt == "<|im_start|>system\n<|im_end|>\n" + CHATML[0]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("tokenizer_default", OWN),
        ("chatml", (CHATML[0], "5<|im_end|>\n", "6<|im_end|>\n")),
        ("llama3", ("<|im_start|>" + LLAMA3[0], *LLAMA3[1:])),  # SmolLM2's BOS token stands for Llama's
    ],
)
def test_a_named_chat_template(template: str, expected: tuple[str, str, str], llama: Any) -> None:
    row = {"messages": "Add 2 and 3.", "chosen": "5", "rejected": "6"}
    assert texts(FormatSpec(type="chat_template.default", chat_template=template), row, llama) == expected


TURN = "{{ '[' + m['role'] + ']\\n' + m['content'] + '<|im_end|>' }}"
EACH_TURN = "{% for m in messages %}" + TURN + "{% endfor %}"


def jinja(template: str) -> FormatSpec:
    return FormatSpec(type="chat_template.default", chat_template="jinja", chat_template_jinja=template)


def test_a_chat_template_of_the_entry(tokenizer: Any) -> None:
    spec = jinja(EACH_TURN + "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}")
    row = {"messages": "Hi.", "chosen": "5", "rejected": "6"}
    assert texts(spec, row, tokenizer) == ("[user]\nHi.<|im_end|>[assistant]\n", "5<|im_end|>", "6<|im_end|>")


def test_a_generation_prompt_that_answered_turns_lack_is_left_out(tokenizer: Any) -> None:
    spec = jinja(EACH_TURN + "{% if add_generation_prompt %}{{ '[assistant]\\n<think>' }}{% endif %}")
    row = {"messages": "Hi.", "chosen": "5", "rejected": "6"}
    assert texts(spec, row, tokenizer) == ("[user]\nHi.<|im_end|>[assistant]\n", "5<|im_end|>", "6<|im_end|>")


def test_a_template_that_ends_texts_without_a_generation_prompt(tokenizer: Any) -> None:
    spec = jinja(EACH_TURN + "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% else %}<|endoftext|>{% endif %}")
    row = {"messages": "Hi.", "chosen": "5", "rejected": "6"}
    expected = ("[user]\nHi.<|im_end|>[assistant]\n", "5<|im_end|><|endoftext|>", "6<|im_end|><|endoftext|>")
    assert texts(spec, row, tokenizer) == expected


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer: Any) -> None:
    spec = jinja("{{ messages | length }} messages: " + EACH_TURN)
    with pytest.raises(RowError, match="writes the prompt otherwise once an answer follows"):
        build_pairs(spec, tokenizer)({"messages": "Hi.", "chosen": "5", "rejected": "6"})


def test_a_template_that_leaves_out_answers_is_refused(tokenizer: Any) -> None:
    spec = jinja("{% for m in messages if m['role'] == 'user' %}" + TURN + "{% endfor %}")
    with pytest.raises(RowError, match="nothing is left of an answer"):
        build_pairs(spec, tokenizer)({"messages": "Hi.", "chosen": "5", "rejected": "6"})


def test_what_a_template_raises_is_about_the_row(tokenizer: Any) -> None:
    with pytest.raises(RowError, match="the chat template cannot take the row .*no system role"):
        build_pairs(jinja("{{ raise_exception('no system role') }}"), tokenizer)(
            {"messages": "Hi.", "chosen": "5", "rejected": "6"}
        )


def test_tools_and_their_calls_reach_the_template(tokenizer: Any) -> None:
    spec = jinja(
        "{% for t in tools or [] %}{{ t['function']['name'] + '|' }}{% endfor %}"
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}{{ c['function']['arguments']['city'] }}{% endfor %}{{ '|' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    call = {"function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    row = {
        "tools": '[{"type": "function", "function": {"name": "weather"}}]',
        "messages": [{"role": "user", "content": "Weather?", "tool_calls": None}],
        "chosen": {"role": "assistant", "content": None, "tool_calls": [call]},
        "rejected": "Sunny.",
    }
    assert texts(spec, row, tokenizer) == ("weather|user:Weather?|assistant:", "Ulm|", "Sunny.|")


def test_zephyr_nectar_prefers_rank_1(tokenizer: Any) -> None:
    answers = [{"answer": "7", "rank": 3.0}, {"answer": "5", "rank": 1.0}, {"answer": "6", "rank": 2.0}]
    assert texts(FormatSpec(type="zephyr.nectar"), {"prompt": "Add 2 and 3.", "answers": answers}, tokenizer) == (
        "<|system|>\n</s>\n<|user|>\nAdd 2 and 3.</s>\n<|assistant|>\n",
        "5<|im_end|>",
        "6<|im_end|>",
    )


@pytest.mark.parametrize("name", ["passthrough", "passthrough.default", None])
def test_passthrough_adds_the_eos_token_where_it_is_missing(name: str | None, tokenizer: Any) -> None:
    row = {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6<|im_end|>"}
    assert texts(FormatSpec(type=name), row, tokenizer) == ("2 + 3 =", " 5<|im_end|>", " 6<|im_end|>")


def test_a_prompt_that_ends_within_a_token_gives_it_to_the_answers(tokenizer: Any) -> None:
    row = {"prompt": "The sky is ", "chosen": "blue", "rejected": "green"}
    assert texts(FormatSpec(type="passthrough"), row, tokenizer) == ("The sky is", " blue<|im_end|>", " green<|im_end|>")


def test_user_defined(tokenizer: Any) -> None:
    spec = FormatSpec(
        type={
            "field_prompt": "q",
            "field_system": "rules",
            "field_chosen": "good",
            "field_rejected": "bad",
            "prompt_format": "{system}\nQ: {prompt}\nA:",
            "chosen_format": " {chosen}!",
            "rejected_format": " {rejected}?",
        }
    )
    row = {"q": "Add 2 and 3.", "rules": "Be terse.", "good": "5", "bad": "6"}
    assert texts(spec, row, tokenizer) == ("Be terse.\nQ: Add 2 and 3.\nA:", " 5!<|im_end|>", " 6?<|im_end|>")
    assert texts(spec, row | {"rules": None}, tokenizer)[0] == "\nQ: Add 2 and 3.\nA:"


def test_user_defined_by_default_is_the_text_of_the_columns(tokenizer: Any) -> None:
    row = {"q": "2 + 3 =", "chosen": " 5", "rejected": " {6}"}
    spec = FormatSpec(type={"field_prompt": "q", "chosen_format": None, "field": None})
    assert texts(spec, row, tokenizer) == ("2 + 3 =", " 5<|im_end|>", " {6}<|im_end|>")


@pytest.fixture(scope="module")
def with_bos(llama: Any) -> Any:
    """The same tokenizer, but one that puts its BOS token before a text and an EOS token after it."""
    other = copy.deepcopy(llama)
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    assert other("a")["input_ids"] == [1, *llama("a")["input_ids"], 2]
    return other


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("passthrough", {"prompt": "2 + 3 =", "chosen": " 5", "rejected": " 6"}, "<|im_start|>2 + 3 ="),
        ("passthrough", {"prompt": "<|im_start|>2 + 3 =", "chosen": " 5", "rejected": " 6"}, "<|im_start|>2 + 3 ="),
        ("llama3", {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}, "<|im_start|>" + LLAMA3[0]),
        ("chatml", {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}, CHATML[0]),
        ("chat_template", {"messages": "Add 2 and 3.", "chosen": "5", "rejected": "6"}, OWN[0]),
    ],
)
def test_there_is_one_bos_token_and_no_eos_token_within(name: str, row: dict[str, Any], expected: str, with_bos: Any) -> None:
    prompt, chosen, _ = texts(FormatSpec(type=name), row, with_bos)
    assert prompt == expected
    assert chosen.strip() in ("5<|im_end|>", "5<|eot_id|>")


def test_a_chat_template_that_writes_no_bos_token_gets_none(with_bos: Any) -> None:
    spec = jinja(EACH_TURN + "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}")
    row = {"messages": "Hi.", "chosen": "5", "rejected": "6"}
    assert texts(spec, row, with_bos)[0] == "[user]\nHi.<|im_end|>[assistant]\n"


GOOD = {"prompt": "Add 2 and 3.", "chosen": "5", "rejected": "6"}
CHAT = {"messages": [ASKED], "chosen": "5", "rejected": "6"}
BAD_ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("chatml.prompt_pairs", GOOD | {"rejected": "5"}, "chosen and rejected are equal"),
    ("chatml.prompt_pairs", {"chosen": "5", "rejected": "6"}, "has no `prompt`; its fields are chosen, rejected"),
    ("chatml.prompt_pairs", GOOD | {"chosen": None}, "has no `chosen`"),
    ("chatml.prompt_pairs", GOOD | {"chosen": 5}, "`chosen` is a int, not text"),
    ("chatml.prompt_pairs", GOOD | {"rejected": " \n"}, "`rejected` is empty"),
    ("chatml.prompt_pairs", GOOD | {"system": ["Be terse."]}, "`system` is a list, not text"),
    ("llama3.argilla", {"chosen_response": "5", "rejected_response": "6"}, "has no `instruction`"),
    ("llama3.default", {"prompt": "Add 2 and 3.", "rejected": "6"}, "has no `chosen`"),
    ("chatml.ultra", GOOD | {"rejected": [ASKED, assistant("6")]}, "`chosen` is a str, not a list of messages"),
    ("chatml.ultra", {"prompt": "Add 2 and 3."} | TURNS_ROW, "`chosen` holds 5 messages.*argilla_chat"),
    ("chatml.argilla_chat", {"chosen": [], "rejected": [ASKED, assistant("6")]}, "`chosen` is empty"),
    ("chatml.argilla_chat", {"chosen": [assistant("5")], "rejected": [assistant("6")]}, "`chosen` holds one message only"),
    (
        "chatml.argilla_chat",
        {"chosen": [ASKED, assistant("5")], "rejected": [user("?"), assistant("6")]},
        "`chosen` and `rejected` differ before their last message",
    ),
    (
        "chatml.argilla_chat",
        {"chosen": [ASKED, assistant("5"), user("Thanks.")], "rejected": [ASKED, assistant("6")]},
        "`chosen` has an assistant's message where the prompt should end",
    ),
    (
        "chat_template.argilla_chat",
        {"chosen": [ASKED, user("5")], "rejected": [ASKED, user("6")]},
        "`chosen` ends with a message of role 'user', not with the assistant's answer",
    ),
    ("chat_template.default", CHAT | {"messages": [ASKED, assistant("5")]}, "`messages` .* answered already"),
    ("chat_template.default", CHAT | {"messages": []}, "`messages` is empty"),
    ("chat_template.default", CHAT | {"messages": ["Hi."]}, r"`messages\[0\]` is a str, not a message"),
    ("chat_template.default", CHAT | {"messages": [{"content": "Hi."}]}, r"`messages\[0\]`: has no `role`; .* content"),
    ("chat_template.default", CHAT | {"messages": [user("")]}, r"`messages\[0\]`: `content` is empty"),
    ("chat_template.default", CHAT | {"messages": [{"role": "user", "content": 3}]}, r"`messages\[0\]`: `content` is a int"),
    ("chat_template.default", CHAT | {"rejected": assistant("")}, "`rejected`: `content` is empty"),
    ("chat_template.default", CHAT | {"rejected": "5"}, "chosen and rejected are equal"),
    ("chat_template.default", CHAT | {"tools": "[{"}, "`tools` is text that is not JSON"),
    ("chat_template.default", CHAT | {"tools": {"name": "weather"}}, "`tools` is a dict, not a list"),
    ("zephyr.nectar", {"prompt": "Hi."}, "has no `answers`"),
    ("zephyr.nectar", {"prompt": "Hi.", "answers": [{"answer": "5", "rank": 1}]}, "`answers` is not a list of two or more"),
    ("zephyr.nectar", {"prompt": "Hi.", "answers": [{"answer": "5", "rank": 1}, {"answer": "6"}]}, r"`answers\[1\]` .*`rank`"),
    (
        "zephyr.nectar",
        {"prompt": "Hi.", "answers": [{"answer": "5", "rank": 1}, {"answer": "6", "rank": 1}]},
        "`answers` has two of rank 1 at the top",
    ),
    ("passthrough", GOOD | {"prompt": [ASKED]}, "`prompt` is a list, not text"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD_ROWS)
def test_a_bad_row_says_which_field_is_wrong(name: str, row: dict[str, Any], reason: str, tokenizer: Any) -> None:
    encode = build_pairs(FormatSpec(type=name), tokenizer)
    with pytest.raises(RowError, match=reason):
        encode(row)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (FormatSpec(type="chatml.intell"), "no 'chatml.intell'; did you mean chatml.intel"),
        (FormatSpec(type="llama3.argila_chat"), "did you mean llama3.argilla_chat"),
        (FormatSpec(type="quux"), "no 'quux'; there are chat_template.default, "),
        (FormatSpec(type="user_defined.default"), "user_defined is written as a mapping"),
        (FormatSpec(type={"field_promt": "q"}), "has no key 'field_promt'; did you mean field_prompt"),
        (FormatSpec(type={"prompt_format": "{prompt} {input}"}), r"prompt_format has \{input\}; it can have \{prompt\}"),
        (FormatSpec(type={"chosen_format": "yes"}), r"chosen_format 'yes' has no \{chosen\}"),
        (FormatSpec(type={"rejected_format": "{rejected"}), "rejected_format '{rejected' is no format"),
        (FormatSpec(type={"prompt_format": 3}), "prompt_format is a int, not text"),
        (FormatSpec(type="chat_template.default", chat_template="chatmll"), "chat_template: there is no 'chatmll'"),
        (FormatSpec(type="chat_template.default", chat_template="jinja"), "jinja needs the template"),
    ],
)
def test_a_type_that_means_nothing_is_a_bad_config(spec: FormatSpec, reason: str, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_pairs(spec, tokenizer)


def test_a_tokenizer_without_the_tokens_a_format_needs_is_a_bad_config(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    other.eos_token, other.chat_template = None, None
    with pytest.raises(ConfigError, match="eos_token"):
        build_pairs(FormatSpec(type="passthrough"), other)
    with pytest.raises(ConfigError, match="chat_template: the tokenizer has no"):
        build_pairs(FormatSpec(type="chat_template.default"), other)


def test_each_type_has_a_row_in_these_tests() -> None:
    tested = {f"{markup}.{name}" for markup in ("chatml", "llama3") for name, _ in ROWS_OF_MARKUPS}
    tested |= {name for name, *_ in CHAT_TEMPLATE_ROWS} | {"zephyr.nectar", "passthrough.default"}
    assert set(PAIR_FORMATS) == tested
