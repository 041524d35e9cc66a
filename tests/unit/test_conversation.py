"""Completions of several turns with a model that says what a test tells it: their tokens, their limits, and what a person's
function may do. The references are the chat template's own rendering of the whole, and tokens put together by hand.
"""

import asyncio
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from actors import hub
from actors.conversation import Conversation, ConversationCut, RolloutFunction, Speaker
from actors.errors import ConfigError
from actors.specs import RolloutFunctionSpec, SamplingSpec
from actors.types import RolloutGroup
from tests.tiny import SMOLLM2

PROMPT = [{"role": "user", "content": "Guess a number."}]
SEED, VERSION = 7, 3
README = Path(__file__).parents[2] / "README.md"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"
ENDS = {"llama3": "<|eot_id|>", "qwen2_5": "<|im_end|>", "gemma3": "<end_of_turn>", "phi3_5": "<|end|>"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2.name))
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(ENDS.values()))})
    return tokenizer


class Scripted:
    """A model that says its lines in turn, the last one again and again, as vLLM's engine would give them."""

    def __init__(self, tokenizer: Any, *lines: str, end: str = "<|im_end|>", stop: str | None = None) -> None:
        """end: of each line, a token. stop: that ends each, in its place. The line "broken" is an engine that fails."""
        self.tokenizer, self.lines, self.end, self.stop = tokenizer, lines, end, stop
        self.asked: list[tuple[list[int], SamplingSpec, int]] = []
        self.decoding = 0

    def speaker(self, size: int = 1, max_tokens: int = 100, **extra: Any) -> Speaker:
        self.size = size
        sampling = SamplingSpec(size, max_tokens, extra=extra)
        return Speaker(self.tokenizer, {}, sampling, lambda sampling, seed: (sampling, seed), self.output)

    async def output(self, token_ids: Sequence[int], params: tuple[SamplingSpec, int]) -> Any:
        sampling, seed = params
        self.asked.append((list(token_ids), sampling, seed))
        self.decoding += 1
        try:
            await asyncio.sleep(0.01)
        finally:
            self.decoding -= 1
        line = self.lines[min((seed - SEED) // self.size, len(self.lines) - 1)]
        if line == "broken":
            raise MemoryError("no room")
        ids = ids_of(self.tokenizer, line + (self.stop or self.end))
        said = ids[: sampling.max_tokens]
        cut = said != ids
        turn = SimpleNamespace(
            token_ids=said,
            logprobs=SimpleNamespace(token_ids=said, logprobs=[-token / 10 for token in said]),
            finish_reason="length" if cut else "stop",
            stop_reason=None if cut else self.stop,
        )
        return SimpleNamespace(outputs=[turn])


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def played(
    play: Callable[..., Any], speaker: Speaker, columns: dict[str, Any] | None = None, timeout_s: float = 60.0
) -> tuple[RolloutGroup, str | None]:
    function = RolloutFunction(RolloutFunctionSpec(f"{__name__}.{play.__name__}", (), timeout_s))
    return asyncio.run(function.group(speaker, PROMPT, columns or {}, SEED, VERSION))


def tokens(group: RolloutGroup, index: int = 0) -> list[int]:
    return [*group.prompt_ids.tolist(), *group.completion_ids[index].tolist()]


async def once(conversation: Conversation) -> None:
    await conversation.answer()


async def three_turns(conversation: Conversation) -> dict[str, Any]:
    for reply in ("Higher.", "Lower."):
        await conversation.answer()
        conversation.say("user", reply)
    return {"last": await conversation.answer()}


def test_tokens_and_mask_by_hand(tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, "Four", "Nine!", "Six")
    group, failure = played(three_turns, scripted.speaker())
    prompt = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    prompt += "<|im_start|>user\nGuess a number.<|im_end|>\n<|im_start|>assistant\n"
    parts = [
        ("Four<|im_end|>", True),
        ("\n<|im_start|>user\nHigher.<|im_end|>\n<|im_start|>assistant\n", False),
        ("Nine!<|im_end|>", True),
        ("\n<|im_start|>user\nLower.<|im_end|>\n<|im_start|>assistant\n", False),
        ("Six<|im_end|>", True),
    ]
    by_part = [(ids_of(tokenizer, text), written) for text, written in parts]
    expected = [(token, written) for ids, written in by_part for token in ids]
    assert failure is None
    assert group.prompt_ids.tolist() == ids_of(tokenizer, prompt)
    assert group.written is not None and group.messages is not None
    assert list(zip(group.completion_ids[0].tolist(), group.written[0].tolist(), strict=True)) == expected
    assert group.logprobs[0].tolist() == pytest.approx([-token / 10 if written else 0.0 for token, written in expected])
    assert (group.truncated, group.policy_version, group.columns) == ((False,), VERSION, {"last": ["Six"]})
    assert [(m["role"], m["content"]) for m in group.messages[0]] == [
        ("assistant", "Four"), ("user", "Higher."), ("assistant", "Nine!"), ("user", "Lower."), ("assistant", "Six"),
    ]  # fmt: skip
    # Each turn was sampled after just what the trainer will see before it.
    ends = [i for i in range(1, len(tokens(group))) if tokens(group)[:i] in [asked for asked, _, _ in scripted.asked]]
    assert ends == [len(group.prompt_ids) + sum(len(ids) for ids, _ in by_part[:n]) for n in (0, 2, 4)]
    assert [seed for _, _, seed in scripted.asked] == [SEED, SEED + 1, SEED + 2]


@pytest.mark.parametrize("name", ENDS)
def test_the_whole_is_what_the_template_makes_of_it(tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For templates of other models, each with its own way to end a turn: some end the last one in another way."""
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / f"{name}.jinja").read_text())
    group, failure = played(three_turns, Scripted(tokenizer, "Four", "Nine!", "Six", end=ENDS[name]).speaker())
    assert failure is None and group.messages is not None
    whole = tokenizer.apply_chat_template([*PROMPT, *group.messages[0]], tokenize=False)
    whole = whole[: whole.rindex("Six") + len("Six")] + ENDS[name]
    assert tokenizer.decode(tokens(group)) == whole


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think"])
def test_a_template_that_rewrites_earlier_turns_is_named(
    tokenizer: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / f"{name}.jinja").read_text())
    _, failure = played(three_turns, Scripted(tokenizer, "<think>\nhm\n</think>\n\nFour").speaker())
    assert failure is not None and "ValueError: the chat template changes earlier turns" in failure
    monkeypatch.setattr(tokenizer, "chat_template", (TEMPLATES / f"{name}_training.jinja").read_text())
    assert played(three_turns, Scripted(tokenizer, "<think>\nhm\n</think>\n\nFour").speaker())[1] is None


async def stops(conversation: Conversation) -> None:
    assert await conversation.answer(stop="</tool>") == "<tool>4 + 4</tool>"
    conversation.say("tool", "8", name="calculator")
    assert dict(conversation.messages[-1]) == {"role": "tool", "content": "8", "name": "calculator"}
    await conversation.answer()


def test_what_a_stop_string_ended_is_ended_by_the_template(tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, "<tool>4 + 4", stop="</tool>")
    group, failure = played(stops, scripted.speaker(stop=["END"], bad_words=["no"]))
    assert failure is None
    between = "<tool>4 + 4</tool><|im_end|>\n<|im_start|>tool\n8<|im_end|>\n<|im_start|>assistant\n<tool>4 + 4</tool>"
    assert tokenizer.decode(group.completion_ids[0]) == between
    assert group.written is not None
    unwritten = tokenizer.decode(group.completion_ids[0][~group.written[0]])
    assert unwritten == "<|im_end|>\n<|im_start|>tool\n8<|im_end|>\n<|im_start|>assistant\n"
    assert [sampling.extra for _, sampling, _ in scripted.asked] == [
        {"stop": ["END", "</tool>"], "bad_words": ["no"]},
        {"stop": ["END"], "bad_words": ["no"]},
    ]


async def in_parts(conversation: Conversation) -> dict[str, Any]:
    """A turn that is cut by the function's own limit, and goes on."""
    room = conversation.left
    await conversation.answer(max_tokens=3)
    cut = conversation.truncated
    conversation.say("user", "Go on.")
    left = conversation.left
    await conversation.answer()
    return {"room": room, "cut": cut, "left": left}


def test_a_turn_may_have_a_limit_of_its_own(tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, "one two three four five six", "done")
    group, failure = played(in_parts, scripted.speaker(max_tokens=100))
    assert failure is None and group.truncated == (False,)
    said = len(ids_of(tokenizer, "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"))
    assert group.columns == {"room": [100], "cut": [True], "left": [100 - 3 - said]}
    assert [sampling.max_tokens for _, sampling, _ in scripted.asked] == [3, 100 - 3 - said]


SAID = "\n<|im_start|>user\nAgain.<|im_end|>\n<|im_start|>assistant\n"


async def for_ever(conversation: Conversation) -> None:
    while True:
        await conversation.answer()
        conversation.say("user", "Again.")


async def until_cut(conversation: Conversation) -> dict[str, Any]:
    turns = 0
    try:
        while True:
            await conversation.answer()
            turns += 1
            conversation.say("user", "Again.")
    except ConversationCut:
        return {"turns": turns}


async def never_mind(conversation: Conversation) -> None:
    while True:
        try:
            await for_ever(conversation)
        except Exception:
            continue


@pytest.mark.parametrize("spare", [0, 1, 5])
def test_what_does_not_fit_ends_the_conversation_as_truncated(tokenizer: Any, spare: int) -> None:
    """Two turns and what is said between them, and no room for one token after what is said next: or for some."""
    turn, said = len(ids_of(tokenizer, "One two three four five six<|im_end|>")), len(ids_of(tokenizer, SAID))
    limit = 2 * turn + 2 * said + spare
    for play in (for_ever, until_cut):
        scripted = Scripted(tokenizer, "One two three four five six")
        group, failure = played(play, scripted.speaker(max_tokens=limit))
        assert failure is None and group.truncated == (True,) and group.messages is not None
        turns = 3 if spare else 2
        assert len(scripted.asked) == turns
        assert len(group.completion_ids[0]) == (limit if spare else limit - said)
        assert group.messages[0][-1]["role"] == "assistant", "what the model did not read is not in it"
        assert group.columns == ({"turns": [turns]} if play is until_cut else {})


def test_min_tokens_need_room_too(tokenizer: Any) -> None:
    scripted = Scripted(tokenizer, "One")
    turn, said = len(ids_of(tokenizer, "One<|im_end|>")), len(ids_of(tokenizer, SAID))
    group, _ = played(for_ever, scripted.speaker(max_tokens=turn + said + 2, min_tokens=3))
    assert len(scripted.asked) == 1 and group.truncated == (True,)


async def opens(conversation: Conversation, hint: str) -> None:
    conversation.say("user", hint)
    conversation.say("user", f"You are number {id(conversation)}.")
    await conversation.answer()


def test_what_all_begin_with_is_the_prompt(tokenizer: Any) -> None:
    """A prompt is computed once for its completions, whose first tokens may be others' words."""
    group, failure = played(opens, Scripted(tokenizer, "Yes").speaker(size=3), {"hint": "It is even."})
    assert failure is None and group.messages is not None
    for index in range(3):
        whole = tokenizer.apply_chat_template([*PROMPT, *group.messages[index]], tokenize=False)
        assert tokens(group, index) == ids_of(tokenizer, whole.rstrip("\n"))
    assert "It is even." in tokenizer.decode(group.prompt_ids)
    assert len({tuple(tokens(group, index)[: len(group.prompt_ids) + 1]) for index in range(3)}) > 1


async def says_nothing(conversation: Conversation) -> None:
    pass


def test_a_completion_without_a_turn_is_empty(tokenizer: Any) -> None:
    group, failure = played(says_nothing, Scripted(tokenizer, "Yes").speaker(size=2))
    assert failure is None and group.prompt_ids.tolist() == tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=True
    )["input_ids"]  # fmt: skip
    assert [len(ids) for ids in group.completion_ids] == [0, 0] and group.messages == ((), ())


async def takes_columns(conversation: Conversation, words: list[str], level: int = 2, **others: Any) -> dict[str, Any]:
    words.append(await conversation.answer())
    first = len(words) == 2 and level == 5
    return {"words": words, **({"others": others} if first and conversation.messages else {})}


async def some_return(conversation: Conversation) -> dict[str, Any] | None:
    text = await conversation.answer()
    conversation.say("user", text)
    return None if len(await conversation.answer()) > 3 else {"short": text}


def test_columns_go_in_and_out(tokenizer: Any) -> None:
    columns = {"words": ["a"], "level": 5, "conversation": "a column of that name", "answer": 4}
    group, failure = played(takes_columns, Scripted(tokenizer, "Yes").speaker(size=2), columns)
    assert failure is None and columns["words"] == ["a"]
    assert group.columns == {"words": [["a", "Yes"]] * 2, "others": [{"answer": 4}] * 2}
    assert played(some_return, Scripted(tokenizer, "Yes", "maybe").speaker())[0].columns == {}


def test_the_readmes_function_plays(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(next(block for block in blocks if "async def play" in block), namespace)
    monkeypatch.setattr(sys.modules[__name__], "play", namespace["play"], raising=False)
    for lines, turns, found in ((("12", "17"), 2, True), (("12",), 5, False)):
        group, failure = played(namespace["play"], Scripted(tokenizer, *lines).speaker(), {"secret": 17, "other": 1})
        assert failure is None and group.messages is not None
        assert sum(message["role"] == "assistant" for message in group.messages[0]) == turns
        assert group.columns == {"found": [found]}


async def raises(conversation: Conversation) -> None:
    await conversation.answer()
    raise ZeroDivisionError("no such luck")


async def exits(conversation: Conversation) -> None:
    sys.exit("enough")


async def a_list(conversation: Conversation) -> Any:
    return [await conversation.answer()]


async def needs(conversation: Conversation, secret: int) -> None:
    await conversation.answer()


async def rewrites(conversation: Conversation) -> None:
    conversation.messages.append({})  # type: ignore[attr-defined]


async def sleeps(conversation: Conversation) -> None:
    await conversation.answer()
    await asyncio.sleep(600)


async def sleeps_in_a_thread(conversation: Conversation) -> None:
    await conversation.answer()
    await asyncio.to_thread(time.sleep, 0.8)


async def will_not_end(conversation: Conversation) -> None:
    with suppress(asyncio.CancelledError):
        await sleeps(conversation)
    await conversation.answer()


async def gives_up_and_sleeps(conversation: Conversation) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(conversation.answer(), 0.001)
    await sleeps(conversation)


async def asks_again(conversation: Conversation) -> dict[str, Any]:
    with suppress(TimeoutError):
        await asyncio.wait_for(conversation.answer(), 0.001)
    return {"said": await conversation.answer()}


async def two_at_once(conversation: Conversation) -> None:
    await asyncio.gather(conversation.answer(), conversation.answer())


@pytest.mark.parametrize(
    ("play", "reason"),
    [
        (raises, "ZeroDivisionError: no such luck"),
        (exits, "RuntimeError: SystemExit: enough"),
        (a_list, "TypeError: it returned a list, not a dict or None"),
        (needs, "TypeError: needs() missing 1 required positional argument: 'secret'"),
        (rewrites, "AttributeError: 'tuple' object has no attribute 'append'"),
        (two_at_once, "RuntimeError: conversation.answer() came while the model writes a turn of it"),
        (gives_up_and_sleeps, "TimeoutError: it took longer than ray.reward_timeout_s = 0.3 s between two turns of the model"),
        (sleeps, "TimeoutError: it took longer than ray.reward_timeout_s = 0.3 s between two turns of the model"),
        (sleeps_in_a_thread, "TimeoutError: it took longer than ray.reward_timeout_s = 0.3 s between two turns of the model"),
        (will_not_end, "TimeoutError: it took longer than ray.reward_timeout_s = 0.3 s between two turns of the model"),
        (never_mind, "TimeoutError: it took longer than ray.reward_timeout_s = 0.3 s between two turns of the model"),
    ],
)
def test_a_function_that_fails_costs_its_group(
    tokenizer: Any, play: Callable[..., Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.conversation.CLEAN_UP_S", 0.5)
    scripted = Scripted(tokenizer, "Yes")
    started = time.monotonic()

    async def both() -> Any:
        """And no other group, which is played meanwhile."""
        speaker = scripted.speaker(size=2, max_tokens=20)
        functions = [RolloutFunction(RolloutFunctionSpec(f"{__name__}.{f.__name__}", (), 0.3)) for f in (play, once)]
        found = await asyncio.gather(*(f.group(speaker, PROMPT, {}, SEED, VERSION) for f in functions))
        asked, waited = len(scripted.asked), time.monotonic() - started
        await asyncio.sleep(0.05)
        assert (len(scripted.asked), scripted.decoding) == (asked, 0), "the model goes on for nobody"
        return *found, waited

    (group, failure), (_, other), waited = asyncio.run(both())
    assert failure == reason and other is None and waited < 1.5
    assert (len(group.texts), group.columns) == (2, {})


def test_a_function_may_give_up_waiting_and_ask_again(tokenizer: Any) -> None:
    group, failure = played(asks_again, Scripted(tokenizer, "Yes").speaker(size=2))
    assert failure is None and group.columns == {"said": ["Yes", "Yes"]}
    assert group.messages is not None and [len(said) for said in group.messages] == [1, 1]


def test_a_group_that_is_cancelled_leaves_nobody_behind(tokenizer: Any) -> None:
    """Its policy may be gone from the engine in the next moment."""
    scripted = Scripted(tokenizer, "Yes")

    async def cancelled() -> None:
        function = RolloutFunction(RolloutFunctionSpec(f"{__name__}.three_turns", (), 60.0))
        group = asyncio.create_task(function.group(scripted.speaker(size=2), PROMPT, {}, SEED, VERSION))
        await asyncio.sleep(0.015)
        group.cancel()
        with pytest.raises(asyncio.CancelledError):
            await group
        asked = len(scripted.asked)
        assert asked and asyncio.all_tasks() == {asyncio.current_task()}
        await asyncio.sleep(0.05)
        assert (len(scripted.asked), scripted.decoding) == (asked, 0)

    asyncio.run(cancelled())


async def swallows(conversation: Conversation) -> None:
    with suppress(Exception):
        await conversation.answer()


def test_what_the_engine_raises_is_no_failure_of_the_function(tokenizer: Any) -> None:
    with pytest.raises(MemoryError, match="no room"):
        played(swallows, Scripted(tokenizer, "broken").speaker(size=2))


def test_the_time_of_the_model_is_not_the_functions(tokenizer: Any) -> None:
    class Slow(Scripted):
        async def output(self, token_ids: Sequence[int], params: Any) -> Any:
            await asyncio.sleep(0.2)
            return await super().output(token_ids, params)

    assert played(three_turns, Slow(tokenizer, "Yes").speaker(size=2), timeout_s=0.15)[1] is None


def of_trl(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    return {}


async def of_trl_async(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    return {}


def not_async(conversation: Conversation) -> None:
    pass


async def without_arguments() -> None:
    pass


@pytest.mark.parametrize("function", [of_trl, of_trl_async, not_async, without_arguments])
def test_other_signatures_are_answered_with_what_to_write(function: Callable[..., Any]) -> None:
    name = function.__name__
    message = rf"^trl\.rollout_func: .*{name} is no `async def {name}\(conversation, \*\*columns\)`.*trainer.*answer"
    with pytest.raises(ConfigError, match=message):
        RolloutFunction(RolloutFunctionSpec(f"{__name__}.{name}", (), 1.0))


def test_a_function_that_is_not_there(tmp_path: Path) -> None:
    looked = re.escape(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"^trl\.rollout_func: nowhere\.play cannot be imported .*; looked in {looked}"):
        RolloutFunction(RolloutFunctionSpec("nowhere.play", (str(tmp_path),), 1.0))
