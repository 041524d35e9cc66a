"""A judge and what it is asked, over HTTP with a server of this test's."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.errors import RewardError
from actors.judge import JudgeWorker, question, reward_of, text_of
from actors.specs import JudgeSpec
from actors.types import RolloutGroup, Scores
from tests.chat_server import ChatServer, chat_server

SPEC = JudgeSpec(
    path="judge.kind",
    name="kind",
    url="",
    model="org/judge",
    prompt="Rate {completion} for {prompt}, as {0} or {}.",
    api_key_env="KIND_KEY",
    max_tokens=7,
    temperature=0.0,
    timeout_s=5.0,
    limit_s=10.0,
    concurrency=16,
    scale=(0.0, 10.0),
)


def group(*texts: str) -> RolloutGroup:
    count = len(texts)
    ids, logprobs = (np.zeros(1, np.int32),) * count, (np.zeros(1, np.float32),) * count
    return RolloutGroup(0, np.zeros(1, np.int32), ids, logprobs, (False,) * count, texts)


def scored(server: ChatServer, groups: Sequence[RolloutGroup], prompt: Any = "p", **changes: Any) -> list[Scores]:
    """Of one worker, the groups at once."""

    async def ask() -> list[Scores]:
        worker = JudgeWorker(replace(SPEC, url=server.url, **changes), "the key")
        return await asyncio.gather(*(worker.score(prompt, {}, one) for one in groups))

    return asyncio.run(ask())


def test_a_question_is_the_prompt_and_each_completion_asked_all_at_once() -> None:
    grades = {"good": "Grade: 9", "bad": "2.5 of 10... no: 2.5", "fair": "5/10"}
    with chat_server(lambda text, _: grades[text.split()[1]], takes_s=0.3) as server:
        assert scored(server, [group("good", "bad", "fair")]) == [Scores("judge.kind", (0.9, 0.25, 0.5), None)]
    assert sorted(server.questions) == [f"Rate {text} for p, as {{0}} or {{}}." for text in ("bad", "fair", "good")]
    assert server.most_busy == 3
    assert {tuple(request["messages"][0]) for request in server.requests} == {("role", "content")}
    assert {(r["model"], r["max_tokens"], r["temperature"]) for r in server.requests} == {("org/judge", 7, 0.0)}
    assert set(server.keys) == {"Bearer the key"}


def test_a_completion_of_several_turns_says_who_speaks() -> None:
    turns = [{"role": "assistant", "content": "2 + 2"}, {"role": "tool", "content": "4"}]
    with chat_server(lambda *_: "10") as server:
        scored(server, [replace(group("2 + 2\ntool\n4"), messages=(turns,))], prompt=[{"role": "user", "content": "p"}])
    assert server.questions == ["Rate assistant: 2 + 2\n\ntool: 4 for p, as {0} or {}."]


def test_no_more_questions_than_concurrency_are_out() -> None:
    with chat_server(lambda *_: "1", takes_s=0.1) as server:
        scored(server, [group("a", "b", "c"), group("d", "e", "f")], concurrency=2)
    assert len(server.requests) == 6 and server.most_busy == 2


def test_braces_stay_as_they_are() -> None:
    text = '{"a": {completion}} {prompt} {0} {{}} \\1 \\g<0>'
    assert question("1 {completion} 2 {prompt} 3 {x} {{}}", text, "{prompt}") == f"1 {{prompt}} 2 {text} 3 {{x}} {{{{}}}}"
    with chat_server(lambda *_: "10") as server:
        assert scored(server, [group(text)], prompt=[{"role": "user", "content": text}])[0].rewards == (1.0,)
    assert server.questions == [f"Rate {text} for {text}, as {{0}} or {{}}."]


def test_a_prompt_of_several_messages_says_who_speaks() -> None:
    assert text_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]) == (
        "system: Be brief.\n\nuser: Hi"
    )


def test_equal_questions_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with chat_server(lambda text, count: str(count), takes_s=0.1) as server:
        same, other = scored(server, [group("a", "a", "b", "a"), group("b", "c", "a")])
        assert same.rewards == (0.1,) * 4 and other.rewards == (0.1,) * 3
    assert len(server.requests) == 3

    monkeypatch.setattr("actors.judge.REMEMBERED", 2)
    with chat_server(lambda *_: "1") as server:

        async def ask() -> None:
            worker = JudgeWorker(replace(SPEC, url=server.url), None)
            for text in ("a", "b", "a", "c", "a", "b"):  # b is the one not asked for longest when c comes
                await worker.score("p", {}, group(text))

        asyncio.run(ask())
    assert [text.split()[1] for text in server.questions] == ["a", "b", "c", "b"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_the_server_refuses_for_the_moment_is_asked_again(status: int) -> None:
    with chat_server(lambda text, count: status if count < 3 else "10") as server:
        assert scored(server, [group("a", "b")])[0].rewards == (1.0, 1.0)
    assert len(server.requests) == 6


def test_an_answer_that_does_not_come_is_asked_for_again() -> None:
    with chat_server(lambda *_: "10", takes_s=1.0) as server:
        ended = scored(server, [group("a")], timeout_s=0.3, limit_s=2.5)[0]
    assert ended.rewards == () and ended.failure == "the judge did not answer within 2.5 s, however often it was asked"
    assert len(server.requests) >= 2


def test_what_the_server_refuses_for_good_fails_the_group_and_is_not_remembered() -> None:
    def answer(text: str, count: int) -> Any:
        return 400 if "bad" in text and count == 1 else "4"

    with chat_server(answer) as server:

        async def ask() -> list[Scores]:
            worker = JudgeWorker(replace(SPEC, url=server.url), None)
            return [await worker.score("p", {}, group("good", "bad")) for _ in range(2)]

        first, second = asyncio.run(ask())
    assert first.rewards == () and "BadRequestError: Error code: 400" in (first.failure or "")
    assert second.rewards == (0.4, 0.4)


def test_no_number_is_no_reward_and_none_at_all_is_a_failure() -> None:
    with chat_server(lambda text, _: "I cannot say." if "odd" in text else "7") as server:
        some, none = scored(server, [group("odd", "even"), group("odd", "odder")])
    assert some == Scores("judge.kind", (None, 0.7), None)
    assert none == Scores("judge.kind", (), "no answer of the judge holds a number from 0 to 10")


def test_an_answer_that_was_cut_is_none() -> None:
    with chat_server(lambda *_: "I think 1", finish="length") as server:
        assert "no answer" in (scored(server, [group("a")])[0].failure or "")


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("7", 0.7),
        ("**Score:** 7.5.", 0.75),
        ("First 3, then 8/10.", 0.8),
        ("8 out of 10", 0.8),
        ("8 / 10 points", 0.8),
        ("2.5 of 10.00", 0.25),
        ("7 points out of 10", 0.7),
        ("3 on politeness; overall a score of 10", 1.0),
        ("8/10.5", None),
        ("10/10", 1.0),
        ("score-4", 0.4),
        ("0", 0.0),
        ("-1", None),
        ("11", None),
        ("8/100", None),
        ("", None),
        ("none", None),
    ],
)
def test_the_last_number_of_an_answer_is_the_grade(answer: str, reward: float | None) -> None:
    assert reward_of(answer, 0.0, 10.0) == reward


def test_a_scale_may_begin_below_zero() -> None:
    assert [reward_of(text, -1.0, 1.0) for text in ("-1", "I say 0", "1", "-0.5", "2")] == [0.0, 0.5, 1.0, 0.25, None]


def ready(url: str, **changes: Any) -> None:
    asyncio.run(JudgeWorker(replace(SPEC, url=url, **changes), "the key").ready())


def test_a_judge_that_answers_is_ready_whatever_it_says() -> None:
    with chat_server(lambda *_: "yes") as server:
        ready(server.url)
    assert server.questions == ["Rate yes for Say yes., as {0} or {}."]


def test_a_server_that_is_not_there_is_one_message() -> None:
    with chat_server(lambda *_: "yes") as server:
        url = server.url
    with pytest.raises(RewardError, match=f"^ray.judges.kind.url: {url} cannot be reached .*; start it, or correct the url$"):
        ready(url)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"ray\.judges\.kind\.api_key_env: http.* refuses the key of KIND_KEY .*name a variable with one"),
        (404, r"ray\.judges\.kind: http.* does not answer org/judge \(Error code: 404 .*correct url"),
    ],
)
def test_a_server_that_refuses_is_one_message_without_the_key(status: int, message: str) -> None:
    with chat_server(lambda *_: status) as server, pytest.raises(RewardError, match=message) as caught:
        ready(server.url)
    assert "the key" not in str(caught.value).replace("refuses the key", "")
