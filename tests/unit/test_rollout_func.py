"""trl.rollout_func before a job starts: what it cannot go with, and how the engines get it."""

import re
from pathlib import Path

import pytest

from actors.errors import ConfigError
from actors.specs import RolloutFunctionSpec
from orchestrator.config import load
from orchestrator.conversations import ensure_playable, rollout_function_spec
from orchestrator.data import Row
from orchestrator.description import describe
from orchestrator.plan import Node, make_plan
from tests.job_files import GRPO, grpo, write

CHAT = Row([{"role": "user", "content": "Hi"}], {}, "rows.jsonl:1")
TEXT = Row("Hi", {}, "rows.jsonl:2")
PLAYS = "  rollout_func: game.play\n"
GAME = """
async def play(conversation, **columns): ...
def of_trl(prompts, trainer): ...
"""


def test_a_function_that_looks_at_one_message_cannot_judge_several(tmp_path: Path) -> None:
    text = GRPO.replace("sums.exact", "trl.rewards.accuracy_reward") + PLAYS
    with pytest.raises(ConfigError, match="trl.rewards.accuracy_reward looks at the first message of a completion"):
        load(write(tmp_path, text))
    load(write(tmp_path, text.replace(PLAYS, "")))


def test_engines_get_the_function_its_folders_and_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    config = grpo(tmp_path, PLAYS, "ray.reward_timeout_s=7")
    assert rollout_function_spec(config) == RolloutFunctionSpec("game.play", ("/", str(tmp_path)), 7.0)
    assert rollout_function_spec(grpo(tmp_path)) is None
    told = describe(config, make_plan(config, [Node("a", {"CPU": 2.0})], 8))
    assert "rollouts    game.play plays them, in the engines' processes" in told


def test_what_cannot_be_played_is_one_message_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "game_of_this_test.py").write_text(GAME)

    def ensure(name: str, *rows: Row) -> None:
        ensure_playable(grpo(tmp_path, f"  rollout_func: {name}\n"), rows)

    ensure("game_of_this_test.play", CHAT)
    ensure_playable(grpo(tmp_path), [TEXT])
    message = "job.yaml:14: trl.rollout_func: plays conversations, but the prompt of rows.jsonl:2 is plain text; give messages"
    with pytest.raises(ConfigError, match=re.escape(message)):
        ensure("game_of_this_test.play", CHAT, TEXT)
    with pytest.raises(ConfigError, match=r"^trl\.rollout_func: game_of_this_test\.nothing cannot be imported \(Attribute"):
        ensure("game_of_this_test.nothing", CHAT)
    with pytest.raises(ConfigError, match=r"TRL's of_trl\(prompts, trainer\) cannot run in an engine's process"):
        ensure("game_of_this_test.of_trl", CHAT)
