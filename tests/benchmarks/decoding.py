"""Decoding under a synced policy, against an engine that still has its base weights as loaded.

Three engines: untouched, synced the fused way, synced into a LoRA slot. Each samples the same prompts to the same length
in turn, timed inside its process around `LLM.generate`, with a warm prefix cache, so that decoding is all there is. The
policy is random LoRA weights; lengths are fixed, so it changes texts and not the work.
"""

import ray

from tests.benchmarks import common
from tests.benchmarks.common import PROBE, STEP, BareEngine
from tests.benchmarks.results import Row


def run(pairs: int) -> list[Row]:
    prompts, sampling = STEP.messages(), STEP.sampling()
    with common.session():
        base, fused, adapter = (
            common.start(BareEngine, common.engine_spec(STEP, sync, 0.25), PROBE)
            for sync in ("fused", "fused", "adapter")
        )
        header, buffer = common.random_policy(version=1)
        ray.get([engine.install.remote(header, buffer) for engine in (fused, adapter)])
        base_s, fused_s, adapter_s = common.in_turn(
            pairs,
            *(lambda e=e: float(ray.get(e.bare.remote(prompts, sampling, 0))) for e in (base, fused, adapter)),
        )
    tokens = STEP.total
    return [
        Row("decoding, fused", "base weights", fused_s, base_s, reach=0.97, tokens=tokens),
        Row("decoding, LoRA slot", "base weights", adapter_s, base_s, tokens=tokens),
    ]
