"""Credit: from the rewards of completions to the advantage of each, in plain floats on the driver.

Rewards arrive per function, are combined into one number per completion, and are compared within the group of
completions of one prompt. None means "no reward" from one end to the other: a function that does not apply to
a sample, a sample that no function scored, an advantage that nobody may train on. A new way to scale
advantages gets its name in SCALES and its divisor in `group_advantages`; another order of summing and normalizing
gets its name in AGGREGATIONS.
"""

import math
from collections.abc import Mapping, Sequence

from actors.errors import ConfigError, RewardError

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")  # combine_rewards, group_advantages | normalized_sum
STD_EPSILON = 1e-4  # TRL's; bounds the advantage of a group whose rewards nearly agree


def combine_rewards(
    rewards: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]
) -> list[float | None]:
    """Weighted sum over the reward functions, one value per sample.

    rewards: per function, one value per sample; None or NaN where the function does not apply. weights: per
    function. A sample that no function scored gives None, not 0, so that it does not shift its group's mean.
    Raises RewardError for an infinite reward and for functions that scored different numbers of samples,
    ConfigError for a function without a weight.
    """
    samples = 0
    for i, (name, values) in enumerate(rewards.items()):
        if name not in weights:
            raise ConfigError(
                f"reward function {name!r} has no weight; give reward_weights one number per function"
            )
        if i == 0:
            samples = len(values)
        if len(values) != samples:
            raise RewardError(
                f"reward function {name!r} returned {len(values)} rewards where {next(iter(rewards))!r} "
                f"returned {samples}; return one reward, or None, for each completion"
            )
        for sample, value in enumerate(values):
            if value is not None and math.isinf(value):
                raise RewardError(
                    f"reward function {name!r} returned {value} for completion {sample}; "
                    "return a finite number, or None to leave the completion out"
                )
    return [
        _weighted_sum([(values[s], weights[name]) for name, values in rewards.items()])
        for s in range(samples)
    ]


def group_advantages(
    rewards_per_group: Sequence[Sequence[float | None]], scale: str
) -> list[list[float | None]]:
    """Advantage of each completion over its group's mean (DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    rewards_per_group: one sequence per prompt; groups may differ in size. scale: what the difference is
    divided by, "group" = the group's standard deviation, "batch" = that of all rewards given
    (arXiv:2508.08221), "none" = nothing (Dr. GRPO, arXiv:2503.20783). Standard deviations have Bessel's
    correction, and STD_EPSILON added. None stays None and takes no part in mean or deviation. A group of
    equal rewards, or of one, has advantages of exactly 0. Raises ConfigError for an unknown scale.
    """
    if scale not in SCALES:
        raise ConfigError(f"unknown scale_rewards {scale!r}; use one of {', '.join(SCALES)}")
    scored = [[reward for reward in group if reward is not None] for group in rewards_per_group]
    batch_std = _std([reward for group in scored for reward in group]) if scale == "batch" else 0.0

    advantages: list[list[float | None]] = []
    for group, rewards_G in zip(rewards_per_group, scored, strict=True):
        if _all_equal(rewards_G):
            advantages.append([None if reward is None else 0.0 for reward in group])
            continue
        mean = math.fsum(rewards_G) / len(rewards_G)
        std = _std(rewards_G) if scale == "group" else batch_std
        divisor = 1.0 if scale == "none" else std + STD_EPSILON
        advantages.append([None if reward is None else (reward - mean) / divisor for reward in group])
    return advantages


def normalized_sum(
    rewards_per_group: Sequence[Mapping[str, Sequence[float | None]]], weights: Mapping[str, float]
) -> list[list[float | None]]:
    """Advantage of each completion, where each function is normalized before they are summed (GDPO, arXiv:2601.05242).

    rewards_per_group: one mapping per prompt, as for combine_rewards. Each function's rewards are taken over their group's
    mean and divided by its deviation, so that no function counts for more because its rewards are further apart; their
    weighted sums are divided by the deviation of all sums of the batch. The mean of these sums is 0 and is not taken off:
    its rounding would pass for a signal. None, errors and equal rewards are as in combine_rewards and group_advantages.
    """
    sums = [
        combine_rewards({name: group_advantages([values], "group")[0] for name, values in group.items()}, weights)
        for group in rewards_per_group
    ]
    divisor = _std([value for group in sums for value in group if value is not None]) + STD_EPSILON
    return [[None if value is None else value / divisor for value in group] for group in sums]


def has_signal(advantages_G: Sequence[float | None]) -> bool:
    """Whether any completion of the group moves the policy: an advantage that is neither None nor 0."""
    return any(advantage is not None and advantage != 0.0 for advantage in advantages_G)


def _weighted_sum(rewards_and_weights: Sequence[tuple[float | None, float]]) -> float | None:
    parts = [
        reward * weight
        for reward, weight in rewards_and_weights
        if reward is not None and not math.isnan(reward)
    ]
    return math.fsum(parts) if parts else None


def _std(rewards: Sequence[float]) -> float:
    if len(rewards) < 2:
        return 0.0
    mean = math.fsum(rewards) / len(rewards)
    return math.sqrt(math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1))


def _all_equal(rewards: Sequence[float]) -> bool:
    """Equal up to the rounding of sums, which would otherwise pass for a signal: 0.1 + 0.2 and 0.3."""
    return not rewards or math.isclose(min(rewards), max(rewards), rel_tol=1e-9, abs_tol=1e-12)
