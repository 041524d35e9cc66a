"""What the loop makes of the rewards of a batch, with no actor in sight."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from actors.types import Scores
from orchestrator.grpo import Loop
from orchestrator.schema import JobConfig, JudgeConfig, TrlConfig

NOBODY: Any = None


def loop(**trl: Any) -> Loop:
    config = JobConfig(rl="grpo", base_model="m", learning_rate=1.0, trl=TrlConfig(**trl))
    config.ray.judges = {"kind": JudgeConfig("http://host/v1", "m", "{completion}")}
    plan: Any = SimpleNamespace(reward_models=("org/model",))
    return Loop(config, plan, NOBODY, NOBODY, NOBODY, NOBODY, print)


def test_a_dropped_group_takes_no_part_in_either_order_of_summing_and_normalizing() -> None:
    scores = [
        [Scores("a.a", (1.0, 0.0), None), Scores("a.b", (0.0, 100.0), None)],
        [Scores("a.a", (9.0, 0.0), None), Scores("a.b", (), "it failed")],
    ]
    combined = [[1.0 * 3, 100.0], [None, None]]
    normalize = loop(
        reward_funcs=["a.a", "a.b"], reward_weights=[3.0, 1.0], multi_objective_aggregation="normalize_then_sum"
    )._advantages(scores, combined)
    # 3 x 1/sqrt(2) less 1/sqrt(2), and the opposite: their deviation is 2; epsilons move the fourth digit
    assert normalize[0] == pytest.approx([math.sqrt(2) / 2, -math.sqrt(2) / 2], rel=1e-3)
    first = loop(reward_funcs=["a.a", "a.b"], reward_weights=[3.0, 1.0])._advantages(scores, combined)
    assert first[0] == pytest.approx([-math.sqrt(2) / 2, math.sqrt(2) / 2], rel=1e-3)
    assert normalize[1] == first[1] == [None, None]


def test_only_a_function_knows_right_and_wrong() -> None:
    group = [Scores("judge.kind", (0.5, 1.0), None), Scores("org/model", (3.0, 4.0), None), Scores("a.b", (0.0, None), None)]
    assert loop(reward_funcs=["judge.kind", "org/model", "a.b"])._judged([group]) == [0.0]
    assert loop(reward_funcs=["judge.kind", "org/model"])._judged([group[:2]]) == []
