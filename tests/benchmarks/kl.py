"""How far the engine's policy is from the trainer's, by the way in which weights reach it.

A LoRA policy is trained for some steps and put into engines three ways: fused (W0 + scaling * B A from the untouched W0,
rounded once), into vLLM's LoRA slot, and as peers do it: merged into the trainer's own rounded weights, sent, and taken out
again, once a step, so that rounding adds up in the base that the trainer goes on with. That base is kept beside the one that
is trained on, so that all three have the same adapter. Each engine samples, and a trainer computes its own
log-probabilities of those tokens: with its own base, and with the untouched one, which is what a saved adapter is loaded on.
KL(engine || trainer) a token is estimated as the mean of exp(d) - 1 - d, with d the trainer's log-probability minus the
engine's (k3 of http://joschu.net/blog/kl-approx.html).
"""

from typing import Any

import ray
import torch

from actors import device, model, snapshot
from actors.engine import RolloutEngine
from actors.packing import Sample, pack_row, plan_rows
from actors.trainer import Trainer
from actors.types import RolloutGroup
from tests.benchmarks import common
from tests.benchmarks.common import PROBE, STEP
from tests.benchmarks.results import Row
from tests.benchmarks.step import ENGINES_SHARE, Loop

STEPS = 8


class MergingTrainer(Trainer):
    """The trainer, and what peers do with its weights."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        layers = (m.base_layer for m in self.policy.modules() if hasattr(m, "base_layer"))
        self.worn = [(layer.weight, layer.weight.detach().clone()) for layer in layers]  # and the base that was merged into

    def swap_bases(self) -> None:
        """The base that was merged into takes the place of the untouched one, or gives it back."""
        for i, (weight, other) in enumerate(self.worn):
            self.worn[i] = (weight, weight.data)
            weight.data = other

    def merge_and_unmerge(self) -> tuple[Any, Any]:
        """Entries and buffer of the whole model's weights, merged; then takes the adapter out again."""
        self.swap_bases()
        self.policy.merge_adapter()
        merged = {
            name.replace(".base_layer", ""): weight.detach().clone()
            for name, weight in self.policy.get_base_model().state_dict().items()
            if "lora_" not in name
        }
        self.policy.unmerge_adapter()
        self.swap_bases()
        entries, buffer, _ = snapshot.pack(merged)
        return entries, buffer

    @torch.no_grad()
    def kl(self, *groups: RolloutGroup) -> float:
        """Nats a token, of the engine's policy to this one."""
        self.policy.eval()
        samples = [Sample(g, i, 1.0) for g, group in enumerate(groups) for i in range(len(group.completion_ids))]
        total, tokens = 0.0, 0
        for planned in plan_rows(groups, samples, self.spec.micro_batch_size):
            row = pack_row(groups, planned).to(device.device())
            ours_BT, _ = model.completion_logprobs(self.shared.model, row)
            difference = (ours_BT - row.rollout_logprobs_BT)[row.mask_BT].double()
            total += float((difference.exp() - 1 - difference).sum())
            tokens += int(row.mask_BT.sum())
        return total / tokens


class WholeWeightsEngine(RolloutEngine):
    """The engine, and a way to load weights into it as they are."""

    def load(self, entries: Any, bucket: Any) -> None:
        self._load(entries, (bucket,))


def run(pairs: int) -> list[Row]:
    with common.session():
        loop = Loop(STEP, WholeWeightsEngine, MergingTrainer, engines=1)
        (engine,), trainer = loop.engines, loop.trainer
        slots = common.start(RolloutEngine, common.engine_spec(STEP, "adapter", ENGINES_SHARE / 2), PROBE)
        for _ in range(STEPS):
            loop.step()
            merged = trainer.merge_and_unmerge.options(num_returns=2).remote()
            ray.wait(merged, num_returns=2, fetch_local=False)

        def kl(engine: Any) -> tuple[float, ...]:
            found = []
            for seed in range(pairs):
                refs = common.sampled(engine, STEP.messages(), loop.sampling, seed)
                found.append(float(ray.get(trainer.kl.remote(*refs))))
            return tuple(found)

        fused = kl(engine)
        bucket_ref, header_ref = trainer.publish.options(num_returns=2).remote()
        ray.get(slots.install.remote(header_ref, bucket_ref))
        slot = kl(slots)
        ray.get(engine.load.remote(*merged))
        to_saved = kl(engine)
        ray.get(trainer.swap_bases.remote())
        to_trainer = kl(engine)
    peer = f"merged and unmerged {STEPS} times"
    return [
        Row("engine to trainer, fused", peer, fused, to_trainer, "cost", reach=1, unit="nats"),
        Row("engine to trainer, LoRA slot", peer, slot, to_trainer, "cost", reach=1, unit="nats"),
        Row("engine to the adapter as saved, fused", peer, fused, to_saved, "cost", reach=1, unit="nats"),
    ]
