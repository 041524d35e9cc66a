"""Tokens that go through the trainer's model, against the tokens that there are, each prompt counted once a group.

Completions end where the policy ends them, so their lengths differ. The peer that pads, for comparison, is counted and not
run: every completion with its own copy of the prompt, padded to the longest prompt and completion of its forward pass, as
trl.GRPOTrainer lays a batch out.
"""

import ray

from actors.specs import SamplingSpec
from actors.trainer import Trainer
from actors.types import RolloutGroup
from orchestrator.credit import group_advantages
from tests.benchmarks import common
from tests.benchmarks.common import PROBE, STEP, BareEngine
from tests.benchmarks.results import Row
from tests.benchmarks.step import MICRO_BATCH, trainer_spec


def run(pairs: int) -> list[Row]:
    sampling = SamplingSpec(STEP.completions, STEP.tokens)
    trainer = Trainer(trainer_spec(STEP))
    computed, real, padded = [], [], []
    with common.session():
        engine = common.start(BareEngine, common.engine_spec(STEP, "fused", 0.3), PROBE)
        for seed in range(pairs):
            groups: list[RolloutGroup] = ray.get(common.sampled(engine, STEP.messages(), sampling, seed))
            rewards = [common.reward([[{"content": text}] for text in group.texts]) for group in groups]
            advantages = group_advantages(rewards, "group")
            trained = [group for group, row in zip(groups, advantages, strict=True) if any(row)]
            computed.append(trainer.train(advantages, *groups).computed_tokens)
            real.append(sum(len(g.prompt_ids) + sum(map(len, g.completion_ids)) for g in trained))
            padded.append(_padded(groups))
    return [
        Row("tokens computed", "tokens there are", tuple(computed), tuple(real), "cost", reach=1.05, unit="tokens"),
        Row("tokens with padding", "tokens there are", tuple(padded), tuple(real), "cost", unit="tokens"),
    ]


def _padded(groups: list[RolloutGroup]) -> int:
    rows = [(len(group.prompt_ids), len(ids)) for group in groups for ids in group.completion_ids]
    passes = [rows[start : start + MICRO_BATCH] for start in range(0, len(rows), MICRO_BATCH)]
    return sum(len(cut) * (max(p for p, _ in cut) + max(c for _, c in cut)) for cut in passes)
