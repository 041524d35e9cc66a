"""What sampled groups came to: their rewards combined, the advantage of each completion, and the numbers of a record.

Plain floats, by the configuration; the formulas are credit.py's.
"""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from actors.errors import RewardError
from actors.types import RolloutHeader, Scores
from orchestrator import judges
from orchestrator.credit import combine_rewards, group_advantages, has_signal, normalized_sum
from orchestrator.schema import JobConfig

Record = dict[str, float]
Numbers = list[list[float | None]]  # [groups][G]


class Tally:
    """The arithmetic of one job's rewards."""

    def __init__(self, config: JobConfig, reward_models: Sequence[str]) -> None:
        """reward_models: which of trl.reward_funcs are models."""
        self.config = config
        functions = config.trl.reward_funcs or []
        self.weights = dict(zip(functions, config.trl.reward_weights or [1.0] * len(functions), strict=True))
        # Reward models and judges have opinions; a function knows right and wrong.
        functions = [n for n in functions if n not in reward_models and not judges.judge_of(config, n)]
        self.judging = functions[:1]

    def combined(self, scores: list[list[Scores]], headers: Sequence[RolloutHeader]) -> Numbers:
        """Weighted rewards. A group that a function failed on is dropped. scores: [groups][functions]."""
        return [
            [None] * len(header.completion_tokens)
            if any(score.failure for score in group)
            else combine_rewards({s.function: s.rewards for s in group}, self.weights)
            for group, header in zip(scores, headers, strict=True)
        ]

    def failures(
        self, headers: Sequence[RolloutHeader], scores: list[list[Scores]], rewards: Numbers, where: str
    ) -> str | None:
        """What to tell of groups and calls that failed. Raises RewardError when no completion of all has a reward.

        where: such as "of step 3".
        """
        told = self.failed(headers, scores, f" {where}")
        summary = "; ".join(told) or f"every reward {where} is None"
        if all(reward is None for group in rewards for reward in group):
            raise RewardError(f"{summary}. No completion has a reward, so there is nothing to learn from")
        return f"{summary}; their completions were dropped" if told else None

    def failed(self, headers: Sequence[RolloutHeader], scores: list[list[Scores]], where: str) -> list[str]:
        """Which functions failed, how often, `where`, and why, in the words of the first time. A sentence each."""
        failures: dict[tuple[str, str], list[str]] = {}
        for header, group in zip(headers, scores, strict=True):
            if header.failure:
                failures.setdefault((f"trl.rollout_func {self.config.trl.rollout_func}", "prompts"), []).append(header.failure)
                continue  # no reward was asked
            for score in group:
                if score.failure:
                    failures.setdefault((f"reward {score.function}", "calls"), []).append(score.failure)
        return [f"{who} failed on {len(why)} {of_what}{where}: {why[0]}" for (who, of_what), why in failures.items()]

    def advantages(self, scores: list[list[Scores]], rewards: Numbers) -> Numbers:
        """Of each completion. rewards: of `combined`."""
        if self.config.trl.multi_objective_aggregation == "sum_then_normalize":
            return group_advantages(rewards, self.config.trl.scale_rewards)
        dropped = [any(score.failure for score in group) for group in scores]
        parts = [
            {score.function: [None] * len(combined) if drop else score.rewards for score in group}
            for group, combined, drop in zip(scores, rewards, dropped, strict=True)
        ]
        return normalized_sum(parts, self.weights)

    def credit(self, scores: list[list[Scores]], rewards: Numbers) -> Numbers:
        """Advantages to train on. With max_resamples, groups without signal count nowhere (DAPO, arXiv:2503.14476, eq. 11)."""
        advantages = self.advantages(scores, rewards)
        if not self.config.ray.max_resamples:
            return advantages
        kept = [g for g, row in enumerate(advantages) if has_signal(row)]
        among_them = self.advantages([scores[g] for g in kept], [rewards[g] for g in kept])
        nowhere: Numbers = [[None] * len(row) for row in rewards]
        for g, row in zip(kept, among_them, strict=True):
            nowhere[g] = row
        return nowhere

    def judged(self, scores: list[list[Scores]]) -> list[float]:
        """What the first reward function gave, over all groups; nothing where there are reward models and judges alone."""
        first = [score for group in scores for score in group if score.function in self.judging]
        return [reward for score in first for reward in score.rewards if reward is not None]

    def record(
        self,
        headers: Sequence[RolloutHeader],
        scores: list[list[Scores]],
        rewards: Numbers,
        advantages: Sequence[Sequence[float | None]],
    ) -> Record:
        """The part of a step's record that is about its completions."""
        played = [header for header in headers if not header.failure]
        kept = [reward for group in rewards for reward in group if reward is not None]
        by_function: dict[str, list[float]] = {}
        for group in scores:
            for score in group:
                by_function.setdefault(score.function, []).extend(r for r in score.rewards if r is not None)
        judged = self.judged(scores)
        return {
            "reward": fmean(kept) if kept else math.nan,
            "reward_std": pstdev(kept) if kept else math.nan,
            **{f"reward/{name}": fmean(values) if values else math.nan for name, values in by_function.items()},
            "accuracy": fmean(reward >= 1.0 for reward in judged) if judged else math.nan,
            "completion_length": fmean(count for header in played for count in header.written_tokens),
            "truncated": fmean(cut for header in played for cut in header.truncated),
            "groups": len(rewards),
            "groups_without_signal": sum(not has_signal(group) for group in advantages),
            "samples_dropped": sum(reward is None for group in rewards for reward in group),
        }
