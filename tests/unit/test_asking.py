"""Conversations without an engine, and what is refused before one starts."""

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from actors.errors import ActorError
from orchestrator import chat
from orchestrator.chat import Conversation, talk
from orchestrator.cli import main
from orchestrator.data import Prompt
from orchestrator.display import Display
from orchestrator.results import Result, Weights
from orchestrator.schema import JobConfig

Turn = dict[str, Any]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def lines(monkeypatch: pytest.MonkeyPatch, *said: str) -> None:
    """What a person types before Ctrl-D."""
    waiting = iter(said)

    def read(_: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


@pytest.fixture
def told() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def display(told: io.StringIO) -> Display:
    return Display(Console(file=told))


def test_each_turn_is_asked_with_all_before_it() -> None:
    asked: list[Prompt] = []

    def ask(prompt: Prompt) -> str:
        asked.append(prompt)
        return f"answer {len(asked)}"

    conversation = Conversation(ask, templated=True)
    assert [conversation.say("one"), conversation.say("two")] == ["answer 1", "answer 2"]
    assert asked == [[user("one")], [user("one"), assistant("answer 1"), user("two")]]


def test_a_model_without_a_template_gets_each_text_as_it_is() -> None:
    asked: list[Prompt] = []
    conversation = Conversation(lambda prompt: asked.append(prompt) or "and on", templated=False)  # type: ignore[func-returns-value]
    assert [conversation.say("Once"), conversation.say("Twice")] == ["and on", "and on"]
    assert asked == ["Once", "Twice"]


def test_talk_until_the_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], display: Display) -> None:
    lines(monkeypatch, "one", "  ", "two")
    talk(Conversation(lambda prompt: f"{len(prompt)} messages", templated=True), display)
    assert capsys.readouterr().out == "1 messages\n3 messages\n\n"


def test_a_conversation_that_got_too_long_begins_anew(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], display: Display, told: io.StringIO
) -> None:
    def ask(prompt: Prompt) -> str:
        if len(prompt) > 1:
            raise ActorError("longer than the maximum model length")
        return "fine"

    lines(monkeypatch, "one", "two", "three")
    talk(Conversation(ask, templated=True), display)
    assert capsys.readouterr().out == "fine\nfine\n\n"
    assert "longer than the maximum model length" in told.getvalue() and "begins anew" in told.getvalue()


def test_an_engine_that_is_gone_ends_it(monkeypatch: pytest.MonkeyPatch, display: Display) -> None:
    def ask(_: Prompt) -> str:
        raise ActorError("engine 0 died")

    lines(monkeypatch, "one")
    with pytest.raises(ActorError, match="engine 0 died"):
        talk(Conversation(ask, templated=True), display)


def test_sigterm_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged = tmp_path / ".merged-1"

    @contextmanager
    def loadable(*_: Any) -> Iterator[Weights]:
        merged.mkdir()
        try:
            yield Weights("m", None)
        finally:
            merged.rmdir()

    result = Result(tmp_path, tmp_path, JobConfig(rl="grpo", base_model="m"), adapted=True)
    monkeypatch.setattr(chat, "find", lambda *_: result)
    monkeypatch.setattr(chat, "tokenizer_of", lambda _: None)
    monkeypatch.setattr(chat, "loadable", loadable)
    monkeypatch.setattr(chat.cluster, "connected", lambda: os.kill(os.getpid(), signal.SIGTERM))
    unheard = lambda *_: pytest.fail("it went elsewhere")  # noqa: E731
    before = signal.signal(signal.SIGTERM, unheard)
    try:
        assert main(["chat", str(tmp_path), "Hello"]) == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is unheard and not merged.exists()
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("arguments", [(), ("   ",)])
def test_no_question_is_one_message(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert main(["chat", str(tmp_path), *arguments]) == 1
    assert "there is no question" in capsys.readouterr().err


def test_a_folder_without_a_run_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    for command in (["chat", str(tmp_path), "Hello"], ["eval", str(tmp_path)], ["serve", str(tmp_path)]):
        assert main(command) == 1
        message = capsys.readouterr().err
        assert message.count("eagleray: ") == 1 and f"{tmp_path} is no output_dir of a run" in message
