"""One GRPO step through the actors, in the driver's order: sample, score, credit, train, publish, install."""

from typing import Any

import ray

from actors.rewards import RewardWorker
from actors.specs import LossSpec, OptimizerSpec, RewardSpec, TrainerSpec
from orchestrator.credit import group_advantages
from tests.benchmarks import common
from tests.benchmarks.common import LORA, MODEL, PROBE, Work

LEARNING_RATE = 1e-4
MICRO_BATCH = 16  # completions per forward pass


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
    """Engine, trainer and reward, each in its process, and the step over them."""

    def __init__(self, work: Work, engine: type, trainer: type) -> None:
        self.work = work
        self.prompts = work.messages()
        self.sampling = work.sampling()
        self.engine = common.start(engine, common.engine_spec(work, "fused", 0.4), PROBE, gpu=0.45)
        self.trainer = common.start(trainer, trainer_spec(work), gpu=0.45)
        self.reward = common.start(RewardWorker, RewardSpec("tests.benchmarks.common.reward", ()))
        self.seed = 0
        self.groups: list[Any] = []  # refs of the last step's groups
        self.advantages: list[list[float | None]] = []
        ray.get(self.trainer.set_probe.remote(PROBE))
        self.sync()

    def step(self) -> None:
        """Ends when the engine has acknowledged the policy that the step made."""
        self.seed += 1
        generate = self.engine.generate.options(num_returns=1 + len(self.prompts))
        _, *self.groups = generate.remote(self.prompts, self.sampling, self.seed)
        calls = [self.reward.score.remote(p, {}, g) for p, g in zip(self.prompts, self.groups, strict=True)]
        self.advantages = group_advantages([scores.rewards for scores in ray.get(calls)], "group")
        stats = ray.get(self.trainer.train.remote(self.advantages, *self.groups))
        if stats.left_out or stats.trained_tokens != self.work.total:
            raise RuntimeError(f"a step trained {stats.trained_tokens} tokens of {self.work.total}")
        self.sync()

    def sync(self) -> None:
        """The trainer's policy into the engine."""
        header_ref, buffer_ref = self.trainer.publish.options(num_returns=2).remote()
        header = ray.get(header_ref)
        receipt = ray.get(self.engine.install.remote(header, buffer_ref))
        if (receipt.version, receipt.digest) != (header.version, header.digest):
            raise RuntimeError(f"the engine serves {receipt.version}, published was {header.version}")
