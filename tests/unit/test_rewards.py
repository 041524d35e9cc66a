"""Reward functions as people write them: what they get, and what becomes of what they return."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.errors import ConfigError
from actors.functions import load_function
from actors.rewards import RewardWorker
from actors.specs import RewardSpec
from actors.types import RolloutGroup, Scores

GROUP = RolloutGroup(
    policy_version=0,
    prompt_ids=np.array([1, 2], dtype=np.int32),
    completion_ids=(np.array([5, 6], dtype=np.int32), np.array([7], dtype=np.int32), np.array([8], dtype=np.int32)),
    logprobs=tuple(np.zeros(n, dtype=np.float32) for n in (2, 1, 1)),
    truncated=(False, False, True),
    texts=("four", "5", "six six"),
)
CHAT = [{"role": "user", "content": "2 + 2?"}]
COLUMNS = {"answer": "4", "level": 2}

SOURCE = """
import asyncio
import sys
import numpy as np
import torch

SEEN = []

def by_name(completions, answer):
    SEEN.append({"completions": completions, "answer": answer})
    return [float(len(c)) for c in completions]

def everything(**kwargs):
    SEEN.append(kwargs)
    return [0.0] * len(kwargs["completions"])

def some(prompts, completion_ids, **columns):
    SEEN.append({"prompts": prompts, "completion_ids": completion_ids, **columns})
    return [1, 2, 3]

def defaults(completions, missing="default", level=None):
    SEEN.append({"missing": missing, "level": level})
    return [1.0, 2.0, 3.0]

async def waits(completions):
    await asyncio.sleep(0)
    return [await one(c) for c in completions]

async def one(completion):
    await asyncio.sleep(0)
    return len(completion) / 2

class Callable:
    def __call__(self, completions, level):
        return [level[0]] * len(completions)

an_object = Callable()

def none(completions): return [None, 1, None]
def array(completions): return np.array([0.5, 1.5, 2.5])
def tensor(completions): return torch.tensor([0.5, 1.5, 2.5])
def truth(completions): return [True, False, True]
def raises(completions): raise ZeroDivisionError("no such luck")
def exits(completions): sys.exit("enough")
async def raises_later(completions): raise KeyError("answer")
def short(completions): return [1.0, 2.0]
def number(completions): return 1.0
def nothing(completions): return None
def nan(completions): return [1.0, float("nan"), 2.0]
def infinite(completions): return [1.0, 2.0, float("inf")]
def text(completions): return "abc"
def words(completions): return ["good", "bad", "ugly"]
def needs(completions, not_a_column): return [1.0, 2.0, 3.0]
NOT_A_FUNCTION = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "my_rewards.py").write_text(SOURCE)
    (folder / "broken_rewards.py").write_text("import no_such_module_anywhere\n")
    (folder / "exiting_rewards.py").write_text("raise SystemExit('no main guard')\n")
    return str(folder)


def spec(folder: str, name: str) -> RewardSpec:
    return RewardSpec(name, (folder,))


def scored(folder: str, name: str, prompt: Any = "2 + 2?", columns: dict[str, Any] = COLUMNS) -> Scores:
    return RewardWorker(spec(folder, f"my_rewards.{name}")).score(prompt, columns, GROUP)


def seen(folder: str, name: str, prompt: Any = "2 + 2?", columns: dict[str, Any] = COLUMNS) -> dict[str, Any]:
    assert scored(folder, name, prompt, columns).failure is None
    return load_function("k", f"my_rewards.{name}", (folder,)).__globals__["SEEN"][-1]


def test_a_function_gets_what_it_names(folder: str) -> None:
    assert seen(folder, "by_name") == {"completions": ["four", "5", "six six"], "answer": ["4", "4", "4"]}
    assert scored(folder, "by_name") == Scores("my_rewards.by_name", (4.0, 1.0, 7.0), None)


def test_kwargs_get_everything(folder: str) -> None:
    assert seen(folder, "everything") == {
        "prompts": ["2 + 2?"] * 3,
        "completions": ["four", "5", "six six"],
        "completion_ids": [[5, 6], [7], [8]],
        "answer": ["4"] * 3,
        "level": [2] * 3,
    }


def test_named_arguments_and_kwargs_go_together(folder: str) -> None:
    assert seen(folder, "some") == {
        "prompts": ["2 + 2?"] * 3,
        "completion_ids": [[5, 6], [7], [8]],
        "completions": ["four", "5", "six six"],
        "answer": ["4"] * 3,
        "level": [2] * 3,
    }


def test_an_argument_with_a_default_needs_no_column(folder: str) -> None:
    assert seen(folder, "defaults") == {"missing": "default", "level": [2, 2, 2]}


def test_a_conversation_is_answered_by_messages(folder: str) -> None:
    found = seen(folder, "everything", prompt=CHAT)
    assert found["prompts"] == [CHAT] * 3
    assert found["completions"] == [[{"role": "assistant", "content": t}] for t in ("four", "5", "six six")]


def test_a_played_completion_is_all_its_messages_and_what_its_function_returned(folder: str) -> None:
    turns = tuple([{"role": "assistant", "content": text}, {"role": "tool", "content": "8"}] for text in GROUP.texts)
    group = replace(GROUP, messages=turns, columns={"level": [1, None, 3], "calls": [0, 1, 2]})
    worker = RewardWorker(spec(folder, "my_rewards.everything"))
    assert worker.score(CHAT, COLUMNS, group).failure is None
    found = load_function("k", "my_rewards.everything", (folder,)).__globals__["SEEN"][-1]
    assert found["completions"] == list(turns)
    assert (found["answer"], found["level"], found["calls"]) == (["4"] * 3, [1, None, 3], [0, 1, 2])


def test_a_column_does_not_take_the_place_of_the_completions(folder: str) -> None:
    columns = {"completions": "of the dataset", "prompts": "too", "completion_ids": 0}
    found = seen(folder, "everything", columns=columns)
    assert found == {
        "prompts": ["2 + 2?"] * 3,
        "completions": ["four", "5", "six six"],
        "completion_ids": [[5, 6], [7], [8]],
    }


@pytest.mark.parametrize(
    ("name", "rewards"),
    [
        ("waits", (2.0, 0.5, 3.5)),
        ("an_object", (2.0, 2.0, 2.0)),
        ("none", (None, 1.0, None)),
        ("array", (0.5, 1.5, 2.5)),
        ("tensor", (0.5, 1.5, 2.5)),
        ("truth", (1.0, 0.0, 1.0)),
    ],
)
def test_rewards_become_floats(folder: str, name: str, rewards: tuple[float | None, ...]) -> None:
    found = scored(folder, name)
    assert (found.rewards, found.failure) == (rewards, None)
    assert all(reward is None or type(reward) is float for reward in found.rewards)


@pytest.mark.parametrize(
    ("name", "failure"),
    [
        ("raises", "ZeroDivisionError: no such luck"),
        ("raises_later", "KeyError: 'answer'"),
        ("exits", "SystemExit: enough"),
        ("short", "ValueError: returned 2 rewards for 3 completions"),
        ("number", "ValueError: returned a float, not a list of 3 numbers"),
        ("nothing", "ValueError: returned a NoneType, not a list of 3 numbers"),
        ("nan", "ValueError: returned nan for completion 1; use None where there is no reward"),
        ("infinite", "ValueError: returned inf for completion 2; use None where there is no reward"),
        ("text", "ValueError: returned a str, not a list of 3 numbers"),
        ("words", "ValueError: could not convert string to float: 'good'"),
    ],
)
def test_a_failure_is_a_failure_and_no_zero(folder: str, name: str, failure: str) -> None:
    assert scored(folder, name) == Scores(f"my_rewards.{name}", (), failure)


def test_a_column_that_is_not_there_is_a_failure_that_names_it(folder: str) -> None:
    found = scored(folder, "needs")
    assert found.rewards == () and found.failure is not None and "not_a_column" in found.failure


def test_a_worker_goes_on_after_a_failure(folder: str) -> None:
    worker = RewardWorker(spec(folder, "my_rewards.by_name"))
    assert worker.score(CHAT, {}, GROUP).failure is not None  # answer is missing
    assert worker.score("2 + 2?", COLUMNS, GROUP).rewards == (4.0, 1.0, 7.0)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_file.reward", "ModuleNotFoundError"),
        ("my_rewards.no_such_function", "AttributeError"),
        ("broken_rewards.reward", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("exiting_rewards.reward", "SystemExit: no main guard"),
        ("reward", "ValueError"),
    ],
)
def test_an_import_that_fails_names_the_path_and_where_it_looked(folder: str, path: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"{path} cannot be imported .*{reason}.*; looked in {folder}"):
        RewardWorker(spec(folder, path))


def test_what_is_no_function_is_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match=r"my_rewards\.NOT_A_FUNCTION is a int, not a function"):
        RewardWorker(spec(folder, "my_rewards.NOT_A_FUNCTION"))


def test_the_first_search_path_wins(tmp_path: Path) -> None:
    for name, value in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ordered_rewards.py").write_text(f"def f(completions): return [{value}] * len(completions)")
    worker = RewardWorker(RewardSpec("ordered_rewards.f", (str(tmp_path / "first"), str(tmp_path / "second"))))
    assert worker.score("", {}, GROUP).rewards == (1.0, 1.0, 1.0)
