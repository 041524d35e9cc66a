"""Reward calls in real processes: one that fails, hangs or dies costs its own group and nothing else."""

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification

from actors.errors import ConfigError, RewardError
from actors.specs import JudgeSpec, ModelSpec, RewardModelSpec, RewardSpec, SandboxSpec
from actors.types import RolloutGroup
from orchestrator.dashboard import STARTED_AGAIN
from orchestrator.data import Row
from orchestrator.plan import Node, make_plan
from orchestrator.schema import JobConfig
from orchestrator.scoring import Call, Scorer
from tests.chat_server import chat_server
from tests.tiny import save_reward_llama

PLAN = make_plan(JobConfig(rl="grpo", base_model="m", learning_rate=1.0, micro_batch_size=8, bf16=False), [Node("a", {})], 8)
GROUP = RolloutGroup(
    0,
    np.zeros(1, np.int32),
    (np.zeros(1, np.int32),) * 2,
    (np.zeros(1, np.float32),) * 2,
    (False, False),
    ("a 1", "b 2"),
)


def scorer(path: str, timeout_s: float) -> Scorer:
    made = Scorer(PLAN, None, [RewardSpec(path, ())], timeout_s)
    made.wait_ready()
    return made


def submit(made: Scorer, rows: Sequence[Row], refs: Sequence[Any]) -> list[list[Call]]:
    return [made.submit(row, ref) for row, ref in zip(rows, refs, strict=True)]


def rows(*kinds: str) -> list[Row]:
    return [Row("p", {"kind": kind}, "") for kind in kinds]


def test_a_failing_call_costs_its_group_alone(cluster: None) -> None:
    made = scorer("tests.cluster.fakes.hangs_on_bad", 3.0)
    ref = ray.put(GROUP)
    kinds = ["good", "raise", "good", "hang", "good", "exit", "good", "short"]
    later = ["good", "good"]  # of the next batch, queued behind the call that hangs
    first = submit(made, rows(*kinds), [ref] * len(kinds))
    second = submit(made, rows(*later), [ref] * len(later))
    scores = [group[0] for group in made.collect(first)]
    assert [score.rewards for score in scores[::2]] == [(1.0, 1.0)] * 4
    assert [score.rewards for score in scores[1::2]] == [()] * 4
    reasons = [score.failure or "" for score in scores[1::2]]
    assert "RuntimeError: no idea" in reasons[0]
    assert "did not return within ray.reward_timeout_s = 3 s" in reasons[1]
    assert "ended its process" in reasons[2]
    assert "returned 1 rewards for 2 completions" in reasons[3]
    names = [name for name in ray.util.list_named_actors() if name.startswith("reward tests.cluster.fakes.hangs_on_bad")]
    assert any(STARTED_AGAIN in name for name in names), "Ray gives a name away once, also to one that takes another's place"
    assert [group[0].rewards for group in made.collect(second)] == [(1.0, 1.0)] * 2


def test_calls_that_always_hang_are_given_up(cluster: None) -> None:
    made = scorer("tests.cluster.fakes.hangs_on_bad", 1.0)
    ref = ray.put(GROUP)
    scores = made.collect(submit(made, rows(*["hang"] * 6), [ref] * 6))
    assert ["did not return" in (group[0].failure or "") for group in scores] == [True, True] + [False] * 4
    assert "not called, after 2 calls in a row" in (scores[-1][0].failure or "")
    assert made.collect(submit(made, rows("good"), [ref]))[0][0].rewards == (1.0, 1.0)


def test_a_function_that_does_not_exist(cluster: None) -> None:
    with pytest.raises(ConfigError, match="^trl.reward_funcs: tests.cluster.fakes.nowhere cannot be imported"):
        scorer("tests.cluster.fakes.nowhere", 1.0)


def test_a_reward_model_scores_beside_a_function_and_is_started_again(cluster: None, tmp_path: Path) -> None:
    folder = save_reward_llama(tmp_path)
    model_spec = RewardModelSpec("the/model", ModelSpec(folder, "float32"), threads=1)
    group = replace(GROUP, texts=("w9 2", "w7 w8 3"))
    with torch.no_grad():  # no words but w3 ... w47 are in the vocabulary: 2 and 3 are <unk>, token 2
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        expected = [float(model(torch.tensor([ids])).logits[0, 0]) for ids in ([13, 9, 2], [13, 7, 8, 2])]
    made = Scorer(PLAN, None, [model_spec, RewardSpec("tests.cluster.fakes.parity", ())], 60.0)
    made.wait_ready()
    prompts = [Row("w13 ", {}, ""), Row([{"role": "user"}], {}, ""), Row("w13 ", {}, "")]
    ref = ray.put(group)
    scores = made.collect(submit(made, prompts, [ref] * 3))
    for by_model, by_function in (scores[0], scores[2]):
        assert by_model.rewards == pytest.approx(expected, abs=1e-5)
        assert by_function.rewards == (1.0, 0.0)
    assert scores[1][0].rewards == () and "content" in (scores[1][0].failure or "")

    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::RewardModelWorker"):
            os.kill(process.pid, signal.SIGKILL)
    scores = made.collect(submit(made, prompts[:1], [ref]))
    assert scores[0][0].rewards == pytest.approx(expected, abs=1e-5)


def test_a_reward_model_that_cannot_be_loaded_is_one_message(cluster: None, tmp_path: Path) -> None:
    made = Scorer(PLAN, None, [RewardModelSpec("the/model", ModelSpec(str(tmp_path), "float32"))], 1.0)
    with pytest.raises(ConfigError, match="^trl.reward_funcs: the folder .* holds no config.json"):
        made.wait_ready()


def judge(url: str) -> JudgeSpec:
    return JudgeSpec("judge.kind", "kind", url, "m", "Rate {completion}", "KIND_KEY", 9, 0.0, 5.0, 9.0, 8, (0.0, 10.0))


def test_a_judge_has_its_key_and_other_rewards_do_not(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIND_KEY", "hush")
    with chat_server(lambda text, _: text.split()[-1], takes_s=0.5) as server:
        specs = [judge(server.url), RewardSpec("tests.cluster.fakes.by_alarm", ())]
        made = Scorer(PLAN, None, specs, 30.0)
        made.wait_ready()
        groups = [ray.put(replace(GROUP, texts=(f"a {i}", f"b {i + 1}"))) for i in range(4)]
        calls = submit(made, [Row("p", {"name": "KIND_KEY"}, "")] * 4, groups)
        scores = made.collect(calls)
    assert [by_judge.rewards for by_judge, _ in scores] == [(i / 10, (i + 1) / 10) for i in range(4)]
    assert [by_function.rewards for _, by_function in scores] == [(1.0, None)] * 4
    assert set(server.keys) == {"Bearer hush"}
    assert server.most_busy == 8  # all groups at once


def test_a_judge_that_is_not_there_is_one_message(cluster: None) -> None:
    made = Scorer(PLAN, None, [judge("http://127.0.0.1:9/v1")], 1.0)
    with pytest.raises(RewardError, match=r"^ray\.judges\.kind\.url: http://127\.0\.0\.1:9/v1 cannot be reached"):
        made.wait_ready()


def test_a_program_that_hangs_costs_its_own_reward_alone(cluster: None) -> None:
    spec = RewardSpec("actors.verifiers.passes_tests", (), SandboxSpec(time_s=1.0))
    made = Scorer(PLAN, None, [spec], 30.0)
    made.wait_ready()
    group = ray.put(replace(GROUP, texts=("x = 1", "while True: pass")))
    rows = [Row("p", {"test_list": ["assert x == 1"]}, ""), Row("p", {}, "")]
    (first,), (second,) = made.collect(submit(made, rows, [group] * 2))
    assert (first.rewards, second.rewards) == ((1.0, 0.0), (None, None))
