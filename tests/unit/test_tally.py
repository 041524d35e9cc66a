"""What a batch's rewards come to, by the configuration."""

import math
from typing import Any

import pytest

from actors.types import Scores
from orchestrator.schema import JobConfig, JudgeConfig, TrlConfig
from orchestrator.tally import Tally


def tally(**trl: Any) -> Tally:
    config = JobConfig(rl="grpo", base_model="m", learning_rate=1.0, trl=TrlConfig(**trl))
    config.ray.judges = {"kind": JudgeConfig("http://host/v1", "m", "{completion}")}
    return Tally(config, reward_models=["org/model"])


def test_a_dropped_group_takes_no_part_in_either_order_of_summing_and_normalizing() -> None:
    scores = [
        [Scores("a.a", (1.0, 0.0), None), Scores("a.b", (0.0, 100.0), None)],
        [Scores("a.a", (9.0, 0.0), None), Scores("a.b", (), "it failed")],
    ]
    combined = [[1.0 * 3, 100.0], [None, None]]
    normalize = tally(
        reward_funcs=["a.a", "a.b"], reward_weights=[3.0, 1.0], multi_objective_aggregation="normalize_then_sum"
    ).advantages(scores, combined)
    # 3 x 1/sqrt(2) less 1/sqrt(2), and the opposite: their deviation is 2; epsilons move the fourth digit
    assert normalize[0] == pytest.approx([math.sqrt(2) / 2, -math.sqrt(2) / 2], rel=1e-3)
    first = tally(reward_funcs=["a.a", "a.b"], reward_weights=[3.0, 1.0]).advantages(scores, combined)
    assert first[0] == pytest.approx([-math.sqrt(2) / 2, math.sqrt(2) / 2], rel=1e-3)
    assert normalize[1] == first[1] == [None, None]


def test_only_a_function_knows_right_and_wrong() -> None:
    group = [Scores("judge.kind", (0.5, 1.0), None), Scores("org/model", (3.0, 4.0), None), Scores("a.b", (0.0, None), None)]
    assert tally(reward_funcs=["judge.kind", "org/model", "a.b"]).judged([group]) == [0.0]
    assert tally(reward_funcs=["judge.kind", "org/model"]).judged([group[:2]]) == []
