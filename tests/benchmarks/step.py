"""One GRPO step through the actors, in the driver's order: sample, score, credit, train, publish, install."""

from dataclasses import replace
from typing import Any

import ray

from actors import device
from actors.rewards import RewardWorker
from actors.specs import LossSpec, OptimizerSpec, RewardSpec, TrainerSpec
from orchestrator.credit import group_advantages
from tests.benchmarks import common
from tests.benchmarks.common import LORA, MODEL, PROBE, Work

LEARNING_RATE = 1e-4
MICRO_BATCH = 256 if device.has_gpu() else 16  # completions per forward pass
ENGINES_SHARE = 0.24  # of the GPU's memory, of all engines together
# Where a loop's engines compute: beside the trainer, on the other GPU where there are two, or in turn with the trainer.
SHARED, SEPARATE, COLOCATE = "shared", "separate", "colocate"


def trainer_spec(work: Work) -> TrainerSpec:
    """A trainer with TRL's defaults: DAPO loss, no KL term."""
    return TrainerSpec(
        model=MODEL,
        lora=LORA,
        optimizer=OptimizerSpec(LEARNING_RATE, "constant", warmup_steps=0, total_steps=1000),
        loss=LossSpec(max_completion_length=work.tokens),
        micro_batch_size=MICRO_BATCH,
        temperature=1.0,
    )


class Loop:
    """Engines, trainer and reward, each in its process, and the step over them."""

    def __init__(
        self,
        work: Work,
        engine: type,
        trainer: type,
        engines: int = common.ENGINES,
        threads: int = common.THREADS,
        placement: str = SHARED,
    ) -> None:
        self.placement = placement
        self.work = work
        self.shares = [work.messages()[i::engines] for i in range(engines)]  # of the prompts, by engine
        self.sampling = work.sampling()
        share = ENGINES_SHARE / engines
        in_turn = placement == COLOCATE
        spec = replace(common.engine_spec(work, "fused", share, engines), sleeps=in_turn)
        gpu = device.gpu_count() - 1 if placement == SEPARATE else 0
        self.engines = [common.start(engine, spec, PROBE, gpu=gpu, threads=threads) for _ in range(engines)]
        self.trainer = common.start(trainer, replace(trainer_spec(work), shares_gpu=in_turn), threads=threads)
        self.reward = common.start(RewardWorker, RewardSpec("tests.benchmarks.common.reward", ()), threads=1)
        self.seed = 0
        self.groups: list[Any] = []  # refs of the last step's groups
        self.advantages: list[list[float | None]] = []
        ray.get(self.trainer.set_probe.remote(PROBE))
        self.sync()

    def step(self) -> None:
        """Ends when every engine has acknowledged the policy that the step made."""
        self.sample()
        if self.placement == COLOCATE:
            self.finish_sampling()
            ray.get([engine.sleep.remote() for engine in self.engines])
        self.train()
        if self.placement == COLOCATE:
            ray.get([engine.wake.remote() for engine in self.engines])
        self.sync()

    def sample(self) -> None:
        """Asks every engine for its share."""
        self.seed += 1
        self.groups = []
        for index, (engine, prompts) in enumerate(zip(self.engines, self.shares, strict=True)):
            self.groups += common.sampled(engine, prompts, self.sampling, self.seed * len(self.engines) + index)

    def finish_sampling(self) -> None:
        """Waits for what was asked last; it stays where it is."""
        ray.wait(self.groups, num_returns=len(self.groups), fetch_local=False)

    def ahead(self) -> None:
        """A step that samples the next batch while it learns from the one before (`max_staleness: 1`)."""
        groups = self.groups
        self.sample()
        self.train_on(groups)
        self.sync()

    def train(self) -> None:
        """Scores and learns from what was sampled last."""
        self.train_on(self.groups)

    def train_on(self, groups: list[Any]) -> None:
        """groups: refs, one a prompt, in the order of the engines."""
        prompts = [prompt for share in self.shares for prompt in share]
        calls = [self.reward.score.remote(p, {}, g) for p, g in zip(prompts, groups, strict=True)]
        self.advantages = group_advantages([scores.rewards for scores in ray.get(calls)], "group")
        stats = ray.get(self.trainer.train.remote(self.advantages, *groups))
        if stats.left_out or stats.trained_tokens != self.work.total:
            raise RuntimeError(f"a step trained {stats.trained_tokens} tokens of {self.work.total}")

    def sync(self) -> None:
        """The trainer's policy into the engines."""
        bucket_ref, header_ref = self.trainer.publish.options(num_returns=2).remote()
        header = ray.get(header_ref)
        if self.groups:  # a batch that is sampled ahead is sampled with one policy
            self.finish_sampling()
        for receipt in ray.get([engine.install.remote(header, bucket_ref) for engine in self.engines]):
            if (receipt.version, receipt.digest) != (header.version, header.digest):
                raise RuntimeError(f"an engine serves {receipt.version}, published was {header.version}")
