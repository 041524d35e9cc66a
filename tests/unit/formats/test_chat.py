"""Conversations to ids and labels. What is trained is written out by hand; the ids must be the chat template's own."""

import copy
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from actors.errors import ConfigError
from actors.formats.base import IGNORED, FormatSpec, RowError
from actors.formats.sft import build_sft

CAPITALS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And of Italy?"},
    {"role": "assistant", "content": "Rome"},
]
ENDED = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"


def encode(tokenizer: Any, row: dict[str, Any], **keys: Any) -> Any:
    return build_sft(FormatSpec(**{"type": "chat_template", **keys}), tokenizer)(row)


def runs(tokenizer: Any, row: Any) -> list[str]:
    """The text of each unbroken run of trained tokens."""
    groups: list[list[int]] = [[]]
    assert len(row["input_ids"]) == len(row["labels"])
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if label == IGNORED:
            groups.append([])
        else:
            assert label == token
            groups[-1].append(token)
    return [tokenizer.decode(group) for group in groups if group]


def trained(tokenizer: Any, messages: list[dict[str, Any]], **keys: Any) -> list[str]:
    return runs(tokenizer, encode(tokenizer, {"messages": messages}, **keys))


def template_ids(tokenizer: Any, messages: list[dict[str, Any]], **keys: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **keys)["input_ids"])


def test_ids_and_labels_are_those_written_out_by_hand() -> None:
    vocab = {"[U]": 0, "[A]": 1, "</s>": 2, "[UNK]": 3, "what": 4, "now": 5, "nothing": 6, "much": 7, "ok": 8}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    small = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]")
    template = (
        "{% for m in messages %}{{ ('[U] ' if m['role'] == 'user' else '[A] ') + m['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[A] ' }}{% endif %}"
    )
    messages = [("user", "what now"), ("assistant", "nothing much"), ("user", "now ok"), ("assistant", "ok")]
    row = encode(
        small, {"messages": [{"role": role, "content": text} for role, text in messages]}, chat_template_jinja=template
    )
    assert row["input_ids"] == [0, 4, 5, 2, 1, 6, 7, 2, 0, 5, 8, 2, 1, 8, 2]
    assert row["labels"] == [-100, -100, -100, -100, -100, 6, 7, 2, -100, -100, -100, -100, -100, 8, 2]


def test_the_loss_is_on_the_assistants_turns_of_a_conversation(tokenizer: Any) -> None:
    row = encode(tokenizer, {"messages": CAPITALS})
    assert row["input_ids"] == template_ids(tokenizer, CAPITALS)
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nCapital of France?<|im_end|>\n"
        "<|im_start|>assistant\nParis<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n"
        "<|im_start|>assistant\nRome<|im_end|>\n"
    )
    assert runs(tokenizer, row) == ["Paris<|im_end|>", "Rome<|im_end|>"]


def test_the_same_words_of_the_user_are_not_trained(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Paris"}, {"role": "assistant", "content": "Paris"}]
    row = encode(tokenizer, {"messages": messages})
    at = [i for i, label in enumerate(row["labels"]) if label != IGNORED]
    # … <|im_start|>assistant\nParis<|im_end|>\n : the newline is the last token, the answer's two are before it.
    length = len(row["labels"])
    assert at == list(range(length - len(tokenizer.encode("Paris")) - 2, length - 1))


def test_the_templates_own_system_prompt_is_kept_and_not_trained(tokenizer: Any) -> None:
    row = encode(tokenizer, {"messages": CAPITALS[1:3]}, train_on_inputs=True)
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert runs(tokenizer, row) == ["Capital of France?<|im_end|>", "Paris<|im_end|>"]


def test_train_on_inputs_trains_every_turn(tokenizer: Any) -> None:
    assert trained(tokenizer, CAPITALS[:3], train_on_inputs=True) == [
        "Be brief.<|im_end|>",
        "Capital of France?<|im_end|>",
        "Paris<|im_end|>",
    ]


def test_roles_to_train(tokenizer: Any) -> None:
    assert trained(tokenizer, CAPITALS, roles_to_train=("user",)) == ["Capital of France?<|im_end|>", "And of Italy?<|im_end|>"]
    assert trained(tokenizer, CAPITALS[:3], roles_to_train=("system", "gpt")) == ["Be brief.<|im_end|>", "Paris<|im_end|>"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("turn", ["Paris<|im_end|>", "Rome<|im_end|>"]),
        ("last", ["Paris", "Rome<|im_end|>"]),
        ("all", ["<|im_end|>", "<|im_end|>", "Paris<|im_end|>", "<|im_end|>", "Rome<|im_end|>"]),
    ],
)
def test_train_on_eos(tokenizer: Any, where: str, expected: list[str]) -> None:
    assert trained(tokenizer, CAPITALS, train_on_eos=where) == expected


def test_train_on_eot_speaks_of_eos_where_no_eot_tokens_are_named(tokenizer: Any) -> None:
    assert trained(tokenizer, CAPITALS[1:3], train_on_eot="all") == ["<|im_end|>", "Paris<|im_end|>"]


def test_the_last_eos_is_that_of_the_last_trained_turn(tokenizer: Any) -> None:
    assert trained(tokenizer, CAPITALS[:4], train_on_eos="last") == ["Paris<|im_end|>"]


@pytest.fixture(scope="module")
def llama(tokenizer: Any) -> Any:
    """The tokenizer with the tokens of Llama 3 that its template writes."""
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    more.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    return more


def test_llama3_ends_its_turns_with_a_token_that_is_not_eos(llama: Any) -> None:
    spoken = [{**message, "content": f" {message['content']}\n"} for message in CAPITALS[1:]]
    row = encode(llama, {"messages": spoken}, chat_template="llama3", eot_tokens=("<|eot_id|>",))
    assert llama.decode(row["input_ids"]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nCapital of France?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nParis<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd of Italy?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nRome<|eot_id|>"
    )
    assert runs(llama, row) == ["Paris<|eot_id|>", "Rome<|eot_id|>"]


def test_eos_and_eot_are_trained_each_where_it_is_said(llama: Any) -> None:
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|eot_id|>' + eos_token }}{% endfor %}"
    keys = {"chat_template_jinja": template, "eot_tokens": ("<|eot_id|>",)}
    assert trained(llama, CAPITALS[1:], **keys, train_on_eot="turn", train_on_eos="last") == [
        "Paris<|eot_id|>",
        "Rome<|eot_id|><|end_of_text|>",
    ]
    assert trained(llama, CAPITALS[1:3], **keys, train_on_eot="all", train_on_eos="turn") == [
        "<|eot_id|>",
        "Paris<|eot_id|><|end_of_text|>",
    ]


def test_the_ending_of_another_turn_is_not_taken_for_this_ones(tokenizer: Any) -> None:
    # As with Mistral, the user's turn has no ending of its own, and the answer's comes soon after it.
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a"}]
    assert trained(tokenizer, messages, chat_template_jinja=template, roles_to_train=("user",)) == [" Hi"]
    assert trained(tokenizer, messages, chat_template_jinja=template) == ["a<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        (
            "chatml",
            "<|im_start|>user\nCapital of France?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>\n"
            "<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\nRome<|im_end|>\n",
            ["Paris<|im_end|>", "Rome<|im_end|>"],
        ),
        (
            "alpaca",
            "<|im_start|>### Instruction:\nCapital of France?\n\n### Response:\nParis<|im_end|>\n\n"
            "### Instruction:\nAnd of Italy?\n\n### Response:\nRome<|im_end|>",
            ["Paris<|im_end|>", "Rome<|im_end|>"],
        ),
        (
            "gemma",
            "<|im_start|><start_of_turn>user\nCapital of France?<end_of_turn>\n<start_of_turn>model\nParis<end_of_turn>\n"
            "<start_of_turn>user\nAnd of Italy?<end_of_turn>\n<start_of_turn>model\nRome<end_of_turn>\n",
            ["Paris", "Rome"],  # <end_of_turn> is no token of this tokenizer
        ),
        (
            "phi_3",
            "<|im_start|><|user|>\nCapital of France?<|end|>\n<|assistant|>\nParis<|end|>\n"
            "<|user|>\nAnd of Italy?<|end|>\n<|assistant|>\nRome<|end|>\n",
            ["Paris", "Rome"],
        ),
    ],
)
def test_named_templates(tokenizer: Any, name: str, text: str, expected: list[str]) -> None:
    row = encode(tokenizer, {"messages": CAPITALS[1:]}, chat_template=name)
    assert tokenizer.decode(row["input_ids"]) == text
    assert runs(tokenizer, row) == expected


def test_message_field_training_goes_before_the_role(tokenizer: Any) -> None:
    messages = [
        {"role": "user", "content": "One", "train": True},
        {"role": "assistant", "content": "Two", "train": False},
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four"},
    ]
    assert trained(tokenizer, messages, message_field_training="train") == ["One<|im_end|>", "Four<|im_end|>"]
    assert trained(tokenizer, messages, message_field_training="train", roles_to_train=()) == ["One<|im_end|>"]


def test_message_field_training_detail_names_characters_first_and_last(tokenizer: Any) -> None:
    text = "I'm doing very well, thank you!"
    detail = [
        {"begin_offset": 0, "end_offset": 8, "train": False},
        {"begin_offset": 9, "end_offset": 18, "train": True},
        {"begin_offset": 19, "end_offset": 30, "train": False},
    ]
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": text, "detail": detail},
        {"role": "assistant", "content": f"{text} {text}", "detail": []},
    ]
    keys = {"message_field_training_detail": "detail"}
    assert trained(tokenizer, messages, **keys) == [" very well", "<|im_end|>"]
    # llama3 trims a message, which moves its characters.
    messages[1] = {
        "role": "assistant",
        "content": f"  {text}",
        "detail": [{"begin_offset": 12, "end_offset": 15, "train": True}],
    }
    assert trained(tokenizer, messages, **keys, chat_template="llama3") == [" very"]


def test_a_custom_template_given_as_text_or_as_a_file(tokenizer: Any, tmp_path: Any) -> None:
    file = tmp_path / "template.jinja"
    file.write_text(ENDED)
    for given in (ENDED, str(file)):
        row = encode(tokenizer, {"messages": CAPITALS[1:3]}, chat_template="jinja", chat_template_jinja=given)
        assert row["input_ids"] == template_ids(tokenizer, CAPITALS[1:3], chat_template=ENDED)
        # No generation prompt in this template: its header must stay out of the loss all the same.
        assert runs(tokenizer, row) == ["Paris<|im_end|>"]


def test_a_token_over_the_edge_of_an_answer_is_trained(tokenizer: Any) -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    assert trained(tokenizer, CAPITALS[1:3], chat_template_jinja=template) == [" Paris<|im_end|>"]


def test_an_answer_of_tokens_that_are_parts_of_characters(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "🥳 日本"}, {"role": "assistant", "content": "日本 🥳"}]
    row = encode(tokenizer, {"messages": messages})
    assert runs(tokenizer, row) == ["日本 🥳<|im_end|>"]
    assert row["input_ids"] == template_ids(tokenizer, messages)


def test_a_template_that_writes_the_last_turn_otherwise(tokenizer: Any) -> None:
    # As with Qwen 3: thoughts are kept in the last answer only, and it has empty ones where there are none.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}"
        "{{ '<think>' + (m['reasoning_content'] or '') + '</think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    thinking = [{**CAPITALS[2], "thoughts": "Easy."}, CAPITALS[3], {**CAPITALS[4], "thoughts": "Of course."}]
    keys = {"chat_template_jinja": template, "field_thinking": "thoughts"}
    assert trained(tokenizer, [CAPITALS[1], *thinking], **keys) == [
        "Paris<|im_end|>",
        "<think>Of course.</think>Rome<|im_end|>",
    ]
    assert trained(tokenizer, CAPITALS[1:], **keys) == ["Paris<|im_end|>", "<think></think>Rome<|im_end|>"]


def test_a_generation_prompt_that_the_answers_do_not_begin_with(tokenizer: Any) -> None:
    # As with DeepSeek R1: the prompt opens the thoughts, and the template cuts them out of an answer that it is given.
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'].split('</think>')[-1] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant><think>' }}{% endif %}"
    )
    messages = [CAPITALS[1], {"role": "assistant", "content": "<think>Easy.</think>Paris"}]
    row = encode(tokenizer, {"messages": messages}, chat_template_jinja=template)
    assert tokenizer.decode(row["input_ids"]) == "<user>Capital of France?<|im_end|><assistant>Paris<|im_end|>"
    assert runs(tokenizer, row) == ["Paris<|im_end|>"]


def test_a_conversation_that_the_assistant_opens(tokenizer: Any) -> None:
    greeting = {"role": "assistant", "content": "Hello"}
    assert trained(tokenizer, [greeting, *CAPITALS[1:3]]) == ["Hello<|im_end|>", "Paris<|im_end|>"]


def test_calls_of_tools_are_trained_and_their_json_is_read(tokenizer: Any) -> None:
    template = (
        "{% if tools %}{{ 'tools: ' + tools[0]['function']['parameters']['type'] + '\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% for call in m['tool_calls'] %}{{ '<call>' + call['function']['arguments']['city'] + '</call>' }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = {
        "messages": [
            {"role": "user", "content": "Weather?", "tool_calls": None},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}],
            },
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Rain.", "tool_calls": None},
        ],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": '{"type": "object"}'}}],
    }
    before = copy.deepcopy(row)
    encoded = encode(tokenizer, row, chat_template_jinja=template)
    assert row == before, "the row was changed"
    assert tokenizer.decode(encoded["input_ids"]).startswith("tools: object\n<|im_start|>user\nWeather?<|im_end|>")
    assert runs(tokenizer, encoded) == ["<call>Oslo</call><|im_end|>", "Rain.<|im_end|>"]


SHARED = [{"from": "human", "value": "Capital of France?"}, {"from": "gpt", "value": "Paris"}]


def test_sharegpt_is_chat_template_with_its_own_names(tokenizer: Any) -> None:
    row = encode(tokenizer, {"conversations": [{"from": "system", "value": "Be brief."}, *SHARED]}, type="sharegpt")
    assert row["input_ids"] == template_ids(tokenizer, CAPITALS[:3])
    assert runs(tokenizer, row) == ["Paris<|im_end|>"]


@pytest.mark.parametrize(
    "names",
    [
        {"message_property_mappings": {"role": "from", "content": "value"}},
        {"message_field_role": "from", "message_field_content": "value"},
    ],
)
def test_fields_by_other_names(tokenizer: Any, names: dict[str, Any]) -> None:
    row = encode(tokenizer, {"talk": SHARED}, field_messages="talk", **names)
    assert row["input_ids"] == template_ids(tokenizer, CAPITALS[1:3])
    assert runs(tokenizer, row) == ["Paris<|im_end|>"]


def test_a_familys_name_means_the_models_own_template(tokenizer: Any) -> None:
    row = encode(tokenizer, {"messages": CAPITALS[1:3]}, chat_template="qwen_25")
    assert row["input_ids"] == template_ids(tokenizer, CAPITALS[1:3])


def test_roles_of_ones_own(tokenizer: Any) -> None:
    messages = [{"role": "customer", "content": "Hi"}, {"role": "agent", "content": "Hello"}]
    row = encode(tokenizer, {"messages": messages}, roles={"user": ["customer"], "assistant": ["agent"]})
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello" in tokenizer.decode(row["input_ids"])
    assert runs(tokenizer, row) == ["Hello<|im_end|>"]


def test_the_system_prompt_may_be_a_column_and_may_be_dropped(tokenizer: Any) -> None:
    row = {"messages": CAPITALS[1:3], "system": "Be brief.", "rules": "Lie."}
    assert encode(tokenizer, row)["input_ids"] == template_ids(tokenizer, CAPITALS[:3])
    lied = [{"role": "system", "content": "Lie."}, *CAPITALS[1:3]]
    assert encode(tokenizer, row, field_system="rules")["input_ids"] == template_ids(tokenizer, lied)
    own = template_ids(tokenizer, CAPITALS[1:3])
    assert encode(tokenizer, {"messages": CAPITALS[:3]}, drop_system_message=True)["input_ids"] == own
    # A conversation that has one keeps it.
    assert encode(tokenizer, {**row, "messages": CAPITALS[:3], "system": "No."})["input_ids"] == template_ids(
        tokenizer, CAPITALS[:3]
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has no `messages`; its fields are text"),
        ({"messages": "a"}, "`messages` is a str, not a list of messages"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": ["a"]}, r"`messages\[0\]` is a str, not a message"),
        ({"messages": [{"content": "a"}]}, r"`messages\[0\]` has no `role`.*its fields are content"),
        ({"messages": [{"role": 3, "content": "a"}]}, r"`messages\[0\]` has 3 as its `role`, which must be text"),
        ({"messages": [*CAPITALS[:2], {"role": "assistant"}]}, r"`messages\[2\]` has no `content`; its fields are role"),
        ({"messages": [{"role": "user", "content": 3}]}, r"`content` of `messages\[0\]` is a int, not text"),
        ({"messages": [*CAPITALS[:2], {"role": "assistant", "content": ""}]}, r"`content` of `messages\[2\]` is empty"),
        ({"messages": CAPITALS[:2]}, "`messages` has nothing to train: its roles are system, user; trained are assistant"),
        ({"messages": CAPITALS, "tools": "a"}, "`tools` is a str, not a list"),
        ({"messages": CAPITALS[1:], "system": 3}, "`system` is a int, not text"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        encode(tokenizer, row)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"train": "yes"}, r"`train` of `messages\[1\]` is 'yes', neither true nor false"),
        (
            {"detail": [{"begin_offset": 0, "train": True}]},
            r"`detail` of `messages\[1\]` is no list of objects with begin_offset",
        ),
        ({"detail": [{"begin_offset": 0, "end_offset": 5, "train": True}]}, "characters 0 to 5 are not in a text of 5"),
    ],
)
def test_fields_of_training_that_cannot_be_used(tokenizer: Any, message: dict[str, Any], expected: str) -> None:
    messages = [CAPITALS[1], {**CAPITALS[2], **message}]
    with pytest.raises(RowError, match=expected):
        trained(tokenizer, messages, message_field_training="train", message_field_training_detail="detail")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        # What stands around an answer changes with it, so a place found by its surroundings would be a wrong one.
        (
            "{% for m in messages %}{{ m['content'] + '|' + (m['content'] | length | string) }}{% endfor %}",
            "does not tell where `messages",
        ),
        (
            "{% for m in messages %}{{ (m['content'] | length | string) + '|' + m['content'] }}{% endfor %}",
            "does not tell where `messages",
        ),
        ("{% for m in messages %}{{ m['content'] + ' ' + m['content'] }}{% endfor %}", "does not tell where `messages"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}", "the chat template does not write it"),
        ("{{ raise_exception('only Latin') }}", "the chat template cannot take `messages` .*only Latin"),
    ],
)
def test_a_turn_that_cannot_be_found_is_refused(tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(RowError, match=message):
        trained(tokenizer, CAPITALS[1:3], chat_template_jinja=template)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"chat_template": "chatlm"}, "chat_template: there is no 'chatlm'; choose one of tokenizer_default, .*chatml"),
        ({"chat_template": "llama4"}, r"llama4 is what models of that family have of their own, .*; this one has another"),
        ({"chat_template": "jinja"}, "chat_template: jinja needs the template"),
        ({"chat_template_jinja": "/no/such/file"}, "/no/such/file is neither a template nor a file"),
        ({"chat_template_jinja": "{% for m in messages %}"}, "chat_template_jinja: is no Jinja template, line 1"),
        ({"eot_tokens": ("<|no such|>",)}, r"eot_tokens: '<\|no such\|>' is \d+ tokens"),
        (
            {"eot_tokens": ("<|im_end|>",), "train_on_eos": "last", "train_on_eot": "all"},
            "train_on_eos: last and train_on_eot: all speak of one token",
        ),
    ],
)
def test_configs_that_cannot_be_used(tokenizer: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_sft(FormatSpec(type="chat_template", **keys), tokenizer)


def test_a_tokenizer_without_a_template(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has none of its own; choose one of alpaca, chatml"):
        build_sft(FormatSpec(type="chat_template"), bare)
    row = encode(bare, {"messages": CAPITALS}, chat_template="tokenizer_default_fallback_chatml")
    assert row["input_ids"] == template_ids(tokenizer, CAPITALS)
    default = encode(tokenizer, {"messages": CAPITALS[1:]}, chat_template="tokenizer_default_fallback_alpaca")
    assert default["input_ids"] == template_ids(tokenizer, CAPITALS[1:])


def test_a_template_that_never_ends_a_turn_is_warned_of(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    build_sft(FormatSpec(type="chat_template", chat_template="llama3"), tokenizer)
    assert "writes no EOS token" in caplog.text
    caplog.clear()
    build_sft(FormatSpec(type="chat_template"), tokenizer)
    build_sft(FormatSpec(type="chat_template", chat_template="alpaca"), tokenizer)
    assert caplog.text == ""
