"""Credit against hand-computed numbers, and against TRL's formula in torch with rewards missing."""

import math
import random

import pytest
import torch
from trl.trainer.utils import nanstd

from actors.errors import ConfigError, RewardError
from orchestrator.credit import combine_rewards, group_advantages, has_signal, normalized_sum


def test_rewards_are_summed_with_their_weights():
    rewards = {
        "exact": [1.0, 0.0, None, None],
        "format": [0.5, None, 1.0, None],
        "style": [2.0, 4.0, math.nan, None],
    }
    weights = {"exact": 1.0, "format": 2.0, "style": 0.25}
    assert combine_rewards(rewards, weights) == [1.0 + 1.0 + 0.5, 0.0 + 1.0, 2.0, None]


def test_a_weight_of_zero_still_scores_the_sample():
    assert combine_rewards({"logged": [3.0, None]}, {"logged": 0.0}) == [0.0, None]


def test_bad_rewards_are_refused_by_function_and_completion():
    with pytest.raises(RewardError, match="'b' returned 1 rewards where 'a' returned 2"):
        combine_rewards({"a": [1.0, 2.0], "b": [1.0]}, {"a": 1.0, "b": 1.0})
    with pytest.raises(RewardError, match="'a' returned -inf for completion 1"):
        combine_rewards({"a": [1.0, -math.inf]}, {"a": 1.0})
    with pytest.raises(ConfigError, match="'b' has no weight"):
        combine_rewards({"a": [1.0], "b": [1.0]}, {"a": 1.0})


def test_group_scale_by_hand():
    """Rewards 1, 0, 0, 1: mean 1/2, variance (4 * 1/4) / 3, standard deviation sqrt(1/3)."""
    (advantages,) = group_advantages([[1.0, 0.0, 0.0, 1.0]], "group")
    a = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert advantages == pytest.approx([a, -a, -a, a], rel=1e-12)


def test_batch_scale_by_hand():
    """Rewards 1, 3 and 0, 0: group means 2 and 0; batch mean 1, variance (0 + 4 + 1 + 1) / 3 = 2."""
    advantages = group_advantages([[1.0, 3.0], [0.0, 0.0]], "batch")
    a = 1.0 / (math.sqrt(2) + 1e-4)
    assert advantages[0] == pytest.approx([-a, a], rel=1e-12)
    assert advantages[1] == [0.0, 0.0]


def test_no_scale_by_hand():
    assert group_advantages([[1.0, 3.0], [0.0, 4.0, 8.0]], "none") == [[-1.0, 1.0], [-4.0, 0.0, 4.0]]


def test_a_sample_without_reward_is_dropped_and_shifts_nothing():
    with_gap = group_advantages([[1.0, None, 0.0, None, 5.0]], "group")[0]
    without = group_advantages([[1.0, 0.0, 5.0]], "group")[0]
    assert [with_gap[0], with_gap[2], with_gap[4]] == without
    assert with_gap[1] is None and with_gap[3] is None


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_random_groups_match_the_formula_of_trl(scale):
    """trl 1.16, GRPOTrainer._generate_and_score_completions; there a dropped sample's advantage is 0."""
    rng = random.Random(0)
    groups, size = 50, 6
    rewards = [
        [None if rng.random() < 0.3 else rng.choice([rng.gauss(0, 2), 0.0, 1.0]) for _ in range(size)]
        for _ in range(groups)
    ]
    rewards[7] = [None] * size
    rewards[8] = [None, 2.0, None, None, None, None]
    rewards[9] = [0.1] * size

    filled = [[math.nan if reward is None else reward for reward in group] for group in rewards]
    table = torch.tensor(filled, dtype=torch.float64)
    theirs = table - torch.nanmean(table, dim=1, keepdim=True)
    if scale != "none":
        std = nanstd(table, dim=1, keepdim=True) if scale == "group" else nanstd(table)
        theirs = theirs / (std + 1e-4)
    theirs = torch.nan_to_num(theirs, nan=0.0)

    ours = group_advantages(rewards, scale)
    for group, group_rewards, expected in zip(ours, rewards, theirs.tolist(), strict=True):
        assert [advantage is None for advantage in group] == [reward is None for reward in group_rewards]
        # nanstd makes Bessel's correction in fp32 whatever it is given.
        assert [advantage or 0.0 for advantage in group] == pytest.approx(expected, rel=1e-7, abs=1e-11)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_signal_is_a_difference_within_the_group(scale):
    mixed, equal, rounded, single, none = group_advantages(
        [[1.0, 0.0], [0.1] * 3, [0.1 + 0.2, 0.3], [4.0, None], [None, None]], scale
    )
    assert has_signal(mixed)
    assert not has_signal(equal)
    assert not has_signal(rounded)  # 0.1 + 0.2 is not 0.3 in floats: two ways to the same reward
    assert not has_signal(single)
    assert not has_signal(none)
    assert (equal, rounded, single, none) == ([0.0] * 3, [0.0] * 2, [0.0, None], [None, None])


def test_small_but_real_differences_are_signal():
    (advantages,) = group_advantages([[1e-6, 2e-6]], "group")
    assert has_signal(advantages)


def test_an_unknown_scale_names_the_choices():
    with pytest.raises(ConfigError, match="group, batch, none"):
        group_advantages([[1.0]], "std")


def test_normalized_sums_by_hand():
    """Rewards 1, 0 and 1000, 3000: each deviates by 1/sqrt(2) of its own from its mean, so they count as weights say."""
    first, second, third = normalized_sum(
        [{"a": [1.0, 0.0], "b": [1000.0, 3000.0]}, {"a": [None, None], "b": [5.0, None]}, {"a": [None] * 2, "b": [None] * 2}],
        {"a": 3.0, "b": 1.0},
    )
    a, b = 0.5 / (math.sqrt(0.5) + 1e-4), 1000 / (math.sqrt(2e6) + 1e-4)
    total = 3 * a - b
    divisor = math.sqrt(total**2 * 2 / 2) + 1e-4  # of the sums total, -total and 0, whose mean is 0
    assert first == pytest.approx([total / divisor, -total / divisor], rel=1e-12)
    assert (second, third) == ([0.0, None], [None, None])


@pytest.mark.parametrize("weights", [{"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 2.0, "b": 0.25, "c": 0.0}])
def test_normalized_sums_match_the_formula_of_trl(weights):
    """trl 1.16, GRPOTrainer._generate_and_score_completions with multi_objective_aggregation: normalize_then_sum."""
    rng = random.Random(1)
    groups, size = 50, 6
    batch = [
        {
            name: [None if rng.random() < 0.3 else rng.choice([rng.gauss(0, scale), 0.0, 1.0]) for _ in range(size)]
            for name, scale in (("a", 1.0), ("b", 100.0), ("c", 0.01))
        }
        for _ in range(groups)
    ]
    batch[7] = {name: [None] * size for name in weights}
    batch[8] = {"a": [2.0] + [None] * 5, "b": [0.1] * size, "c": [None] * size}

    table = torch.tensor(
        [[[math.nan if group[f][s] is None else group[f][s] for f in weights] for s in range(size)] for group in batch],
        dtype=torch.float64,
    )
    scaled = (table - torch.nanmean(table, dim=1, keepdim=True)) / (nanstd(table, dim=1, keepdim=True) + 1e-4)
    sums = (scaled.view(-1, 3) * torch.tensor(list(weights.values()), dtype=torch.float64)).nansum(dim=1)
    sums[torch.isnan(table.view(-1, 3)).all(dim=1)] = torch.nan
    theirs = torch.nan_to_num((sums - torch.nanmean(sums)) / (nanstd(sums) + 1e-4), nan=0.0).view(groups, size)

    ours = normalized_sum(batch, weights)
    assert ours[7] == [None] * size
    assert ours[8] == [0.0] * size and not has_signal(ours[8])
    for group, values, expected in zip(ours, batch, theirs.tolist(), strict=True):
        assert [advantage is None for advantage in group] == [
            all(values[name][s] is None for name in values) for s in range(size)
        ]
        assert [advantage or 0.0 for advantage in group] == pytest.approx(expected, rel=1e-6, abs=1e-9)
