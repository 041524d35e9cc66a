"""Sampling through the engine's actor, against `LLM.generate` in the same process.

Ours: from the first call until every header and group lie in the object store, with tokenizing, log-probabilities and texts
as the trainer and the rewards get them. Bare: the clock is inside the actor, around `LLM.generate` on token ids with the
same sampling parameters. The prefix cache is warm on both sides.
"""

import ray

from tests.benchmarks import common
from tests.benchmarks.common import PROBE, STEP, BareEngine
from tests.benchmarks.results import Row


def run(pairs: int) -> list[Row]:
    prompts, sampling = STEP.messages(), STEP.sampling()
    with common.session():
        engine = common.start(BareEngine, common.engine_spec(STEP, "fused", 0.8), PROBE)

        def through_actor() -> None:
            refs = common.sampled(engine, prompts, sampling, seed=0)
            ray.wait(refs, num_returns=len(refs), fetch_local=False)
            ray.get(refs[-1])  # raises what the engine raised

        def bare() -> float:
            return float(ray.get(engine.bare.remote(prompts, sampling, 0)))

        ours, theirs = common.in_turn(pairs, common.wall(through_actor), bare)
    return [Row("rollout through the actor", "LLM.generate", ours, theirs, reach=0.97, tokens=STEP.total)]
