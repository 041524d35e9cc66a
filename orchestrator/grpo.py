"""The loop of an online job: publish, sample, score, credit, train, record.

On-policy, one step off and asynchronous are the same loop: `max_staleness` batches are in flight beyond the one that is
trained on. Which policy version samples which batch is a function of the batch's number alone, also for prompts that replace
others, and an engine does what it is told in order, so a resumed run samples again just what was in flight.

Consumes prompts; produces policy versions and records; waits for rollouts, rewards and the trainer; is unblocked by
their answers or by a time limit, which ends the job.
"""

import math
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from actors.errors import RewardError, SyncError
from actors.specs import SamplingSpec
from actors.types import RolloutHeader, Scores, TrainStats
from orchestrator import cluster, judges
from orchestrator.cluster import Actors
from orchestrator.credit import combine_rewards, group_advantages, has_signal, normalized_sum
from orchestrator.data import PromptSet, Row, other_rows, rows_of_step
from orchestrator.plan import Plan
from orchestrator.policies import Policies
from orchestrator.rollouts import Batch, send
from orchestrator.samples import Samples
from orchestrator.schema import JobConfig
from orchestrator.scoring import Scorer
from orchestrator.shares import Share, shares

Record = dict[str, float]
MAX_SEED = 2**31


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to the held-out prompts."""

    record: Record
    solved: int
    total: int  # 0 where only reward models and judges score: they know no right and wrong


@dataclass(frozen=True)
class Sampled:
    """Groups that came back, with what was said of them: all in one order."""

    rows: tuple[Row, ...]
    group_refs: tuple[Any, ...]
    headers: list[RolloutHeader]  # of some groups each
    scores: list[list[Scores]]  # [groups][functions]
    rewards: list[list[float | None]]  # [groups][G]
    probe_gap: float
    install_s: float
    sample_s: float
    score_s: float

    def and_more(self, other: "Sampled") -> "Sampled":
        return Sampled(
            self.rows + other.rows,
            self.group_refs + other.group_refs,
            self.headers + other.headers,
            self.scores + other.scores,
            self.rewards + other.rewards,
            max(self.probe_gap, other.probe_gap),
            self.install_s + other.install_s,
            self.sample_s + other.sample_s,
            self.score_s + other.score_s,
        )


@dataclass
class Loop:
    """The state of one online job on the driver: no tokens, no tensors."""

    config: JobConfig
    plan: Plan
    prompts: PromptSet
    actors: Actors
    policies: Policies
    scorer: Scorer
    warn: Callable[[str], None]
    samples: Samples | None = None  # None = what was sampled is not written down
    step: int = 0  # optimizer steps done
    in_flight: deque[Batch] = field(default_factory=deque)
    memory: Record = field(default_factory=dict)  # of the GPUs, at the last hand-over between trainer and engines

    def start(self) -> None:
        """Publishes what the trainer holds. A resumed job has set `step` and added older policies before."""
        self.policies.learn_base()
        self.policies.publish()

    def advance(self) -> Record:
        """One step; returns its record."""
        started = time.perf_counter()
        self._fill()
        batch = self.in_flight.popleft()
        sampled = self._filled_up(self._collected(batch))
        headers, scores, rewards = sampled.headers, sampled.scores, sampled.rewards
        self._ensure_rewarded(sampled)
        advantages = self._credit(scores, rewards)
        if self.samples:
            self.samples.save(f"step-{self.step + 1:06d}", sampled.rows, sampled.group_refs, scores, rewards, advantages)

        training = time.perf_counter()
        stats: TrainStats = cluster.fetch_ranks(
            [
                trainer.train.remote(share.advantages, *(sampled.group_refs[g] for g in share.groups))
                for trainer, share in zip(self.actors.trainers, self._shares(advantages, headers), strict=True)
            ],
            "training",
            self.config.ray.rollout_timeout_s,
        )
        train_s = time.perf_counter() - training
        if stats.left_out:
            self.warn(f"step {self.step + 1}: loss or gradient was not finite; {stats.left_out} optimizer step(s) left out")

        self.step += 1
        publish_s = 0.0
        snapshot_bytes = 0
        if self.step % self.config.trl.vllm_sync_interval == 0:
            header, publish_s = self.policies.publish()
            snapshot_bytes = header.nbytes
        self.policies.forget(self.versions_needed())
        tokens = sum(sum(map(sum, h.completion_tokens)) for h in headers)
        step_s = time.perf_counter() - started
        return {
            "step": self.step,
            "policy_version": stats.version,
            "epoch": self.step / self.plan.steps_per_epoch,
            **self._rollout_record(headers, scores, rewards, advantages),
            "loss": stats.loss,
            "kl": stats.kl,
            "clip_fraction": stats.clip_fraction,
            "entropy": stats.entropy,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "importance_ratio": stats.importance_ratio,
            "engine_gap": stats.engine_gap,
            "staleness": self.step - 1 - batch.policy_version,
            "completion_tokens": tokens,
            "sample_s": sampled.sample_s,
            "score_s": sampled.score_s,
            "train_s": train_s,
            "sync_s": publish_s + sampled.install_s,
            "step_s": step_s,
            "tokens_per_s": tokens / step_s,
            "probe_gap": sampled.probe_gap,
            "snapshot_bytes": snapshot_bytes,
            **self.memory,
        }

    def _collected(self, batch: Batch, after: Sequence[Batch] = ()) -> Sampled:
        """Waits for a batch and its rewards. after: batches sent before it, whose rewards are called before its own: they must
        have been sampled when the clock of those calls starts.
        """
        for earlier in after:
            earlier.headers(self.config.ray.rollout_timeout_s)
        headers = self._headers(batch)
        probe_gap, install_s = self.policies.confirm(batch.policy_version)
        scoring = time.perf_counter()
        scores = self.scorer.collect(batch.calls)
        return Sampled(
            batch.rows,
            batch.group_refs,
            headers,
            scores,
            self._combined(scores, headers),
            probe_gap,
            install_s,
            sample_s=max(header.seconds for header in headers),
            score_s=time.perf_counter() - scoring,
        )

    def _filled_up(self, sampled: Sampled) -> Sampled:
        """With max_resamples: other prompts in place of groups without signal, so often at most, by the newest policy sent."""
        version = self.version_for(min(self.step + self.config.ray.max_staleness, self.plan.total_steps - 1))
        for attempt in range(1, self.config.ray.max_resamples + 1):
            advantages = self._advantages(sampled.scores, sampled.rewards)
            missing = self.plan.prompts_per_step - sum(map(has_signal, advantages))
            draw = random.Random(f"{self.config.seed}/{self.step}/{attempt}")
            rows = other_rows(self.prompts.train, sampled.rows, missing, draw)
            if not rows:
                break
            self._wake()
            self.policies.install(version)
            seed = draw.randrange(MAX_SEED)
            sampled = sampled.and_more(self._collected(self._send(rows, self._sampling(), version, seed), self.in_flight))
        return sampled

    def _credit(self, scores: list[list[Scores]], rewards: list[list[float | None]]) -> list[list[float | None]]:
        """Advantages, [groups][G]. With max_resamples, groups without signal count nowhere (DAPO, arXiv:2503.14476, eq. 11)."""
        advantages = self._advantages(scores, rewards)
        if not self.config.ray.max_resamples:
            return advantages
        kept = [g for g, row in enumerate(advantages) if has_signal(row)]
        among_them = self._advantages([scores[g] for g in kept], [rewards[g] for g in kept])
        nowhere: list[list[float | None]] = [[None] * len(row) for row in rewards]
        for g, row in zip(kept, among_them, strict=True):
            nowhere[g] = row
        return nowhere

    def _shares(self, advantages: Sequence[Sequence[float | None]], headers: Sequence[RolloutHeader]) -> list[Share]:
        return shares(
            advantages,
            [count for header in headers for count in header.prompt_tokens],
            [lengths for header in headers for lengths in header.completion_tokens],
            len(self.actors.trainers),
            every_sample=bool(self.config.trl.beta),
        )

    def version_for(self, number: int) -> int:
        """The policy version that samples batch `number`: the newest published when the batch is sent."""
        done = max(0, number - self.config.ray.max_staleness)
        return done - done % self.config.trl.vllm_sync_interval

    def versions_needed(self) -> list[int]:
        """Versions that the batches in flight and the next one are sampled with, oldest first."""
        ahead = range(self.step, self.step + self.config.ray.max_staleness + 1)
        return sorted({self.version_for(number) for number in ahead})

    def _fill(self) -> None:
        """Sends batches until `max_staleness` are in flight beyond the one that comes next."""
        last = min(self.step + self.config.ray.max_staleness + 1, self.plan.total_steps)
        self._wake()
        for number in range(self.step + len(self.in_flight), last):
            version = self.version_for(number)
            self.policies.install(version)
            rows = rows_of_step(self.prompts.train, number, self.plan.prompts_per_step, self.config.seed)
            self.in_flight.append(self._send(rows, self._sampling(), version, self._seed_of(number), number))

    def evaluate(self) -> Evaluation:
        """Greedy answers of the newest policy to every held-out prompt."""
        if self.step not in self.policies.published:  # with vllm_sync_interval above 1
            self.policies.publish()
        version = self.step
        self._wake()
        self.policies.install(version)
        trl = self.config.trl
        greedy = SamplingSpec(1, trl.max_completion_length, temperature=0.0, extra=trl.generation_kwargs or {})
        batch = self._send(self.prompts.held_out, greedy, version, self._seed_of(self.step))
        answers = self._collected(batch, self.in_flight)
        self._ensure_rewarded(answers)
        scores, rewards = answers.scores, answers.rewards
        record = self._rollout_record(answers.headers, scores, rewards, rewards)
        if self.samples:
            unused: list[list[float | None]] = [[None] * len(row) for row in rewards]
            self.samples.save(f"held-out-{self.step:06d}", answers.rows, answers.group_refs, scores, rewards, unused)
        judged = self._judged(scores)
        names = ("accuracy", "reward", "completion_length") if judged else ("reward", "completion_length")
        shown = {k: v for k, v in record.items() if k.split("/")[0] in names}
        return Evaluation(
            {"step": self.step, **{f"eval/{name}": value for name, value in shown.items()}},
            solved=sum(reward >= 1.0 for reward in judged),
            total=len(judged),
        )

    def _seed_of(self, number: int) -> int:
        return (self.config.seed * 1_000_003 + number) % MAX_SEED

    def _send(
        self, rows: Sequence[Row], sampling: SamplingSpec, version: int, seed: int, number: int | None = None
    ) -> Batch:
        """number: the step that trains on it; None = this one, or none."""
        return send(
            self.actors.engines,
            self.scorer,
            rows,
            sampling,
            number=self.step if number is None else number,
            policy_version=version,
            seed=seed,
        )

    def _headers(self, batch: Batch) -> list[RolloutHeader]:
        """Raises SyncError when an engine sampled with another version than it was told to."""
        headers = batch.headers(self.config.ray.rollout_timeout_s)
        for index, header in enumerate(headers):
            if header.policy_version != batch.policy_version:
                raise SyncError(
                    f"engine {index} sampled batch {batch.number} with policy version {header.policy_version}, "
                    f"not with {batch.policy_version}"
                )
        if self.plan.sleeps:
            asleep = [engine.sleep.remote() for engine in self.actors.engines]
            self.memory["gpu_free_training"] = min(self._answers(asleep, "falling asleep"))
        return headers

    def _wake(self) -> None:
        """Before anything is asked of the engines; where they keep their GPU, they are awake always."""
        if self.plan.sleeps:
            awake = [engine.wake.remote() for engine in self.actors.engines]
            self.memory["gpu_free_sampling"] = min(self._answers(awake, "waking up"))

    def _answers(self, refs: Sequence[Any], doing: str) -> list[float]:
        timeout_s = self.config.ray.rollout_timeout_s
        return [cluster.fetch(ref, f"engine {index}, {doing}", timeout_s) for index, ref in enumerate(refs)]

    def _sampling(self) -> SamplingSpec:
        trl = self.config.trl
        return SamplingSpec(
            trl.num_generations,
            trl.max_completion_length,
            trl.temperature,
            trl.top_p,
            trl.top_k,
            trl.min_p or 0.0,
            trl.generation_kwargs or {},
        )

    def _combined(self, scores: list[list[Scores]], headers: Sequence[RolloutHeader]) -> list[list[float | None]]:
        """Weighted rewards, [groups][G]. A group that a function failed on is dropped."""
        weights = self._weights()
        sizes = [len(lengths) for header in headers for lengths in header.completion_tokens]
        return [
            [None] * size
            if any(score.failure for score in group)
            else combine_rewards({s.function: s.rewards for s in group}, weights)
            for group, size in zip(scores, sizes, strict=True)
        ]

    def _ensure_rewarded(self, sampled: Sampled) -> None:
        """Tells of calls that failed. Raises RewardError when no completion of all has a reward."""
        failures = [score for group in sampled.scores for score in group if score.failure]
        summary = f"every reward of step {self.step + 1} is None"
        if failures:
            first = failures[0]
            summary = f"reward {first.function} failed on {len(failures)} calls of step {self.step + 1}: {first.failure}"
        if all(reward is None for group in sampled.rewards for reward in group):
            raise RewardError(f"{summary}. No completion has a reward, so there is nothing to learn from")
        if failures:
            self.warn(f"{summary}; their completions were dropped")

    def _advantages(self, scores: list[list[Scores]], rewards: list[list[float | None]]) -> list[list[float | None]]:
        """Of each completion, [groups][G]; rewards: of `_combined`."""
        if self.config.trl.multi_objective_aggregation == "sum_then_normalize":
            return group_advantages(rewards, self.config.trl.scale_rewards)
        dropped = [any(score.failure for score in group) for group in scores]
        parts = [
            {score.function: [None] * len(combined) if drop else score.rewards for score in group}
            for group, combined, drop in zip(scores, rewards, dropped, strict=True)
        ]
        return normalized_sum(parts, self._weights())

    def _weights(self) -> dict[str, float]:
        functions = self.config.trl.reward_funcs or []
        return dict(zip(functions, self.config.trl.reward_weights or [1.0] * len(functions), strict=True))

    def _judged(self, scores: list[list[Scores]]) -> list[float]:
        """What the first reward function gave, over all groups; nothing where there are reward models and judges alone."""
        opinions = [name for name in self.config.trl.reward_funcs or [] if judges.judge_of(self.config, name)]
        opinions += self.plan.reward_models
        names = [name for name in self.config.trl.reward_funcs or [] if name not in opinions]
        first = [score for group in scores for score in group if score.function in names[:1]]
        return [reward for score in first for reward in score.rewards if reward is not None]

    def _rollout_record(
        self,
        headers: Sequence[RolloutHeader],
        scores: list[list[Scores]],
        rewards: list[list[float | None]],
        advantages: Sequence[Sequence[float | None]],
    ) -> Record:
        lengths = [n for header in headers for group in header.completion_tokens for n in group]
        truncated = [cut for header in headers for group in header.truncated for cut in group]
        kept = [reward for group in rewards for reward in group if reward is not None]
        by_function: dict[str, list[float]] = {}
        for group in scores:
            for score in group:
                by_function.setdefault(score.function, []).extend(r for r in score.rewards if r is not None)
        judged = self._judged(scores)
        return {
            "reward": fmean(kept) if kept else math.nan,
            "reward_std": pstdev(kept) if kept else math.nan,
            **{f"reward/{name}": fmean(values) if values else math.nan for name, values in by_function.items()},
            "accuracy": fmean(reward >= 1.0 for reward in judged) if judged else math.nan,
            "completion_length": fmean(lengths),
            "truncated": fmean(truncated),
            "groups": len(rewards),
            "groups_without_signal": sum(not has_signal(group) for group in advantages),
            "samples_dropped": sum(reward is None for group in rewards for reward in group),
        }
