"""The loop of an online job: publish, sample, score, credit, train, record.

On-policy, one step off and asynchronous are the same loop: prompts of some batches are in flight beyond the one that is
trained on. Which policy version samples a prompt is a function of its batch's number alone, also for prompts that replace
others, and its draws of the prompt's own place, so a resumed run samples again just what was in flight. Without
`late_steps` a step trains on its own batch; with it, on the groups that came first, and none is staler for that than a
batch in its turn may be.

Consumes prompts; produces policy versions and records; waits for rollouts, rewards and the trainer; is unblocked by
their answers or by a time limit, which ends the job.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.specs import SamplingSpec
from actors.types import RolloutHeader, Scores, TrainStats
from orchestrator import waits
from orchestrator.cluster import Actors
from orchestrator.credit import has_signal
from orchestrator.data import PromptSet, Row, other_rows, rows_of_step
from orchestrator.plan import Plan
from orchestrator.policies import Policies
from orchestrator.rollouts import Group, Rollouts
from orchestrator.samples import Samples
from orchestrator.schema import JobConfig
from orchestrator.scoring import Scorer
from orchestrator.shares import shares
from orchestrator.tally import Numbers, Record, Tally

MAX_SEED = 2**48  # of a group; its completions have the numbers after it


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to the held-out prompts."""

    record: Record
    solved: int
    total: int  # 0 where only reward models and judges score: they know no right and wrong


@dataclass(frozen=True)
class Sampled:
    """Groups that came back, with what was said of them: all in one order."""

    groups: list[Group]
    scores: list[list[Scores]]  # [groups][functions]
    rewards: Numbers
    sample_s: float  # from the first prompt at an engine to the last completion
    score_s: float

    @property
    def headers(self) -> list[RolloutHeader]:
        return [group.sampled() for group in self.groups]

    def and_more(self, other: "Sampled") -> "Sampled":
        return Sampled(
            self.groups + other.groups,
            self.scores + other.scores,
            self.rewards + other.rewards,
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
    in_flight: list[Group] = field(default_factory=list)  # asked for and not trained on, in the order of their places
    memory: Record = field(default_factory=dict)  # of the GPUs, at the last hand-over between trainer and engines

    def __post_init__(self) -> None:
        ray = self.config.ray
        self.sent = 0  # batches asked for
        self.ahead = ray.max_staleness - ray.late_steps  # of them, beyond the one that comes next
        self.tally = Tally(self.config, self.plan.reward_models)
        self.rollouts = Rollouts(
            self.actors.engines,
            self.policies,
            self.scorer,
            most=2 * self.plan.max_num_seqs,  # as many wait in an engine's queue as it decodes
            timeout_s=ray.rollout_timeout_s,
        )

    def start(self) -> None:
        """Publishes what the trainer holds. A resumed job has called `resume` and added older policies before."""
        self.policies.learn_base()
        self.policies.publish()
        self.rollouts.send(self.in_flight)

    def state(self) -> list[list[int]]:
        """What `resume` needs: number and place of each group in flight."""
        return [[group.number, group.place] for group in self.in_flight]

    def resume(self, step: int, state: Sequence[Sequence[int]]) -> None:
        """Goes on after `step` steps from a `state`; with more steps in all, too, than the job that left it had."""
        self.step = step
        self.sent = step + len(state) // self.plan.prompts_per_step  # each step trains on as many groups as a batch has
        batches = {number: self._batch(number) for number in {number for number, _ in state}}
        self.in_flight = [batches[number][place] for number, place in state]

    def advance(self) -> Record:
        """One step; returns its record."""
        started = time.perf_counter()
        self._fill()
        sampled = self._filled_up(self._collected(self._next()))
        headers, scores, rewards = sampled.headers, sampled.scores, sampled.rewards
        if told := self.tally.failures(headers, scores, rewards, f"of step {self.step + 1}"):
            self.warn(told)
        advantages = self.tally.credit(scores, rewards)
        if self.samples:
            self.samples.save(f"step-{self.step + 1:06d}", sampled.groups, scores, rewards, advantages)

        training = time.perf_counter()
        refs = [group.group_ref for group in sampled.groups]
        stats: TrainStats = waits.fetch_ranks(
            [
                trainer.train.remote(share.advantages, *(refs[g] for g in share.groups))
                for trainer, share in zip(
                    self.actors.trainers,
                    shares(
                        advantages,
                        [header.prompt_tokens for header in headers],
                        [header.completion_tokens for header in headers],
                        len(self.actors.trainers),
                        every_sample=bool(self.config.trl.beta),
                    ),
                    strict=True,
                )
            ],
            "training",
            self.config.ray.rollout_timeout_s,
            self.rollouts,
        )
        train_s = time.perf_counter() - training
        if stats.left_out:
            self.warn(f"step {self.step + 1}: loss or gradient was not finite; {stats.left_out} optimizer step(s) left out")

        self.step += 1
        versions = {group.policy_version for group in sampled.groups}
        costs = [self.policies.cost(version) for version in versions]
        publish_s = 0.0
        snapshot_bytes = 0
        self.policies.forget(self.versions_needed())  # first, to make room for another one
        if self.step % self.config.trl.vllm_sync_interval == 0:
            header, publish_s = self.policies.publish(self.rollouts)
            snapshot_bytes = header.nbytes
        tokens = sum(sum(h.written_tokens) for h in headers)
        step_s = time.perf_counter() - started
        return {
            "step": self.step,
            "policy_version": stats.version,
            "epoch": self.step / self.plan.steps_per_epoch,
            **self.tally.record(headers, scores, rewards, advantages),
            "loss": stats.loss,
            "kl": stats.kl,
            "clip_fraction": stats.clip_fraction,
            "entropy": stats.entropy,
            "grad_norm": stats.grad_norm,
            "learning_rate": stats.learning_rate,
            "importance_ratio": stats.importance_ratio,
            "engine_gap": stats.engine_gap,
            "staleness": self.step - 1 - min(versions),
            "completion_tokens": tokens,
            "sample_s": sampled.sample_s,
            "score_s": sampled.score_s,
            "train_s": train_s,
            "sync_s": publish_s + max(seconds for _, seconds in costs),
            "step_s": step_s,
            "tokens_per_s": tokens / step_s,
            "probe_gap": max(gap for gap, _ in costs),
            "snapshot_bytes": snapshot_bytes,
            **self.memory,
        }

    def evaluate(self) -> Evaluation:
        """Greedy answers of the newest policy to every held-out prompt."""
        if self.step not in self.policies.published:  # with vllm_sync_interval above 1
            self.policies.publish(self.rollouts)
        trl = self.config.trl
        greedy = SamplingSpec(1, trl.max_completion_length, temperature=0.0, extra=trl.generation_kwargs or {})
        answers = self._sampled_now(self.prompts.held_out, greedy, self.step, "held-out")
        scores, rewards = answers.scores, answers.rewards
        if told := self.tally.failures(answers.headers, scores, rewards, f"of the held-out prompts after step {self.step}"):
            self.warn(told)
        record = self.tally.record(answers.headers, scores, rewards, rewards)
        if self.samples:
            unused: Numbers = [[None] * len(row) for row in rewards]
            self.samples.save(f"held-out-{self.step:06d}", answers.groups, scores, rewards, unused)
        judged = self.tally.judged(scores)
        names = ("accuracy", "reward", "completion_length") if judged else ("reward", "completion_length")
        shown = {k: v for k, v in record.items() if k.split("/")[0] in names}
        return Evaluation(
            {"step": self.step, **{f"eval/{name}": value for name, value in shown.items()}},
            solved=sum(reward >= 1.0 for reward in judged),
            total=len(judged),
        )

    def version_for(self, number: int) -> int:
        """The policy version that samples batch `number`: the newest published when the batch is sent."""
        done = max(0, number - self.ahead)
        return done - done % self.config.trl.vllm_sync_interval

    def versions_needed(self) -> list[int]:
        """Versions that what is in flight and the next batches are sampled with, oldest first."""
        next_ones = range(self.sent, self.step + self.ahead + 1)
        return sorted({g.policy_version for g in self.in_flight} | {self.version_for(number) for number in next_ones})

    def _fill(self) -> None:
        """Asks for batches until `ahead` are in flight beyond the one that comes next."""
        last = min(self.step + self.ahead + 1, self.plan.total_steps)
        self._wake()
        for number in range(self.sent, last):
            batch = self._batch(number)
            self.in_flight += batch
            self.rollouts.send(batch)
        self.sent = max(self.sent, last)

    def _batch(self, number: int) -> list[Group]:
        rows = rows_of_step(self.prompts.train, number, self.plan.prompts_per_step, self.config.seed)
        return self._groups(number, rows, self._sampling(), self.version_for(number), f"{number}")

    def _groups(
        self, number: int, rows: Sequence[Row], sampling: SamplingSpec, version: int, draws: str
    ) -> list[Group]:
        """draws: what seeds them, with the job's seed and their places."""
        seeds = [random.Random(f"{self.config.seed}/{draws}/{place}").randrange(MAX_SEED) for place in range(len(rows))]
        return [
            Group(row, number, place, version, sampling, seed)
            for place, (row, seed) in enumerate(zip(rows, seeds, strict=True))
        ]

    def _next(self) -> list[Group]:
        """Waits for the groups of this step: those that may not come later, and as many more of those that came first."""
        count = self.plan.prompts_per_step
        last_due = self.step - self.config.ray.late_steps
        due = [group for group in self.in_flight if group.number <= last_due]
        others = [group for group in self.in_flight if group.number > last_due]

        def first_ones() -> list[Group]:
            return [group for group in others if group.header][: count - len(due)]

        self.rollouts.wait(lambda: all(group.header for group in due) and len(due) + len(first_ones()) == count)
        taken = due + first_ones()
        gone = set(taken)
        self.in_flight = [group for group in self.in_flight if group not in gone]
        return taken

    def _collected(self, groups: list[Group]) -> Sampled:
        """Waits for groups and their rewards."""
        self.rollouts.wait(lambda: all(group.header for group in groups))
        if self.plan.sleeps:
            asleep = [engine.sleep.remote() for engine in self.actors.engines]
            self.memory["gpu_free_training"] = min(self._answers(asleep, "falling asleep"))
        scoring = time.perf_counter()
        scores = self.scorer.collect([group.calls for group in groups], self.rollouts)
        rewards = self.tally.combined(scores, [group.sampled() for group in groups])
        sample_s = max(group.ended_at for group in groups) - min(group.dealt_at for group in groups)
        return Sampled(groups, scores, rewards, sample_s, time.perf_counter() - scoring)

    def _sampled_now(self, rows: Sequence[Row], sampling: SamplingSpec, version: int, draws: str) -> Sampled:
        self._wake()
        groups = self._groups(self.step, rows, sampling, version, draws)
        self.rollouts.send(groups)
        return self._collected(groups)

    def _filled_up(self, sampled: Sampled) -> Sampled:
        """With max_resamples: other prompts in place of groups without signal, so often at most, by the newest policy sent."""
        version = self.version_for(self.step + self.ahead)
        for attempt in range(1, self.config.ray.max_resamples + 1):
            advantages = self.tally.advantages(sampled.scores, sampled.rewards)
            missing = self.plan.prompts_per_step - sum(map(has_signal, advantages))
            draws = f"{self.step}/{attempt}"
            rows = other_rows(
                self.prompts.train,
                [group.row for group in sampled.groups],
                missing,
                random.Random(f"{self.config.seed}/{draws}"),
            )
            if not rows:
                break
            sampled = sampled.and_more(self._sampled_now(rows, self._sampling(), version, draws))
        return sampled

    def _wake(self) -> None:
        """Before anything is asked of the engines; where they keep their GPU, they are awake always."""
        if self.plan.sleeps:
            awake = [engine.wake.remote() for engine in self.actors.engines]
            self.memory["gpu_free_sampling"] = min(self._answers(awake, "waking up"))

    def _answers(self, refs: Sequence[object], doing: str) -> list[float]:
        timeout_s = self.config.ray.rollout_timeout_s
        return [waits.fetch(ref, f"engine {index}, {doing}", timeout_s) for index, ref in enumerate(refs)]

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
