"""What a step costs beyond the computation that no one can avoid.

Ours: a step's wall time, from the call to the engine until it has acknowledged the next policy. It holds tokenizing,
copies through the object store, process hops, rewards in their own process, packing, loss, optimizer step, publish with
probe and digest, validation, install and probe.

Bare, timed inside the same processes on the same policy's tokens, and added up: `LLM.generate` on token ids with the same
sampling parameters and an empty prefix cache, as after every sync, the slowest of the engines that sample side by side;
forward pass, log-probabilities and backward pass over the rows that the trainer packed, which were packed and moved before the
clock started; the reward function called on the texts in the driver.
"""

import time

import ray

from actors import device, model
from actors.packing import pack_row, plan_rows
from actors.trainer import Trainer
from actors.types import RolloutGroup
from tests.benchmarks import common
from tests.benchmarks.common import STEP, BareEngine
from tests.benchmarks.results import Row
from tests.benchmarks.step import Loop


class BareTrainer(Trainer):
    """The trainer, and its model without anything around it."""

    def bare(self, advantages: list[list[float | None]], *groups: RolloutGroup) -> float:
        """Seconds of forward and backward pass over the rows that `train` would make; changes no weight."""
        samples, _ = self._samples(advantages, groups)
        planned = plan_rows(groups, samples, self.spec.micro_batch_size)
        rows = [pack_row(groups, row).to(device.device()) for row in planned]
        self.policy.train()
        started = time.perf_counter()
        for row in rows:
            logprobs_BT, _ = model.completion_logprobs(self.policy, row)
            (-logprobs_BT[row.mask_BT].mean()).backward()
        float(self.shared.parameters[0].grad.sum())  # waits for the device
        seconds = time.perf_counter() - started
        self.shared.optimizer.zero_grad(set_to_none=True)
        return seconds


def run(pairs: int) -> list[Row]:
    with common.session():
        loop = Loop(STEP, BareEngine, BareTrainer, engines=1)

        def bare() -> float:
            texts = [text for group in ray.get(loop.groups) for text in group.texts]
            completions = [[{"role": "assistant", "content": text}] for text in texts]
            sampling = ray.get(loop.engines[0].bare.remote(STEP.messages(), loop.sampling, loop.seed, cold=True))
            training = ray.get(loop.trainer.bare.remote(loop.advantages, *loop.groups))
            return float(sampling + training + common.wall(lambda: common.reward(completions))())

        ours, theirs = common.in_turn(pairs, common.wall(loop.step), bare)
    reach = 1.05 if device.has_gpu() else 1.10
    return [Row("GRPO step", "bare generate + forward/backward + reward", ours, theirs, "cost", reach)]
