"""Batches of prompts in flight: dealt to the engines, collected in the order in which they were sent.

The completions stay in the object store: one object a group, which rewards and trainer read from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.specs import SamplingSpec
from actors.types import RolloutHeader
from orchestrator import cluster
from orchestrator.data import Row
from orchestrator.scoring import Call, Scorer


@dataclass(frozen=True)
class Batch:
    """One batch on its way. Rows and refs are in the same order: engine by engine."""

    number: int  # the step that trains on it
    policy_version: int
    rows: tuple[Row, ...]
    group_refs: tuple[Any, ...]  # one per row
    header_refs: tuple[Any, ...]  # one per engine that got prompts
    calls: list[list[Call]]  # [functions][groups]

    def headers(self, timeout_s: float) -> list[RolloutHeader]:
        """Waits until every engine has sampled its share. Raises ActorError for an engine that died or hangs."""
        return [
            cluster.fetch(ref, f"engine {index}, sampling batch {self.number}", timeout_s)
            for index, ref in enumerate(self.header_refs)
        ]


def send(
    engines: Sequence[Any],
    scorer: Scorer,
    rows: Sequence[Row],
    sampling: SamplingSpec,
    *,
    number: int,
    policy_version: int,
    seed: int,
) -> Batch:
    """Deals rows to engines in turn, and queues their rewards behind them.

    seed decides the completions, together with the number of engines and the policy version.
    """
    shares = [tuple(rows[i :: len(engines)]) for i in range(len(engines))]
    headers, groups = [], []
    for index, (engine, share) in enumerate(zip(engines, shares, strict=True)):
        if not share:
            continue
        prompts = [row.prompt for row in share]
        call = engine.generate.options(num_returns=1 + len(share))
        header, *refs = call.remote(prompts, sampling, seed * len(engines) + index)
        headers.append(header)
        groups.extend(refs)
    dealt = tuple(row for share in shares for row in share)
    return Batch(number, policy_version, dealt, tuple(groups), tuple(headers), scorer.submit(dealt, groups))
