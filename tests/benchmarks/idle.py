"""Actors that do nothing: what is left of a step then is the driver's work and Ray's calls.

They load no torch, so that a small machine holds many of them.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.specs import SamplingSpec
from actors.types import InstallReceipt, RolloutGroup, RolloutHeader, SnapshotHeader, TrainStats

TOKENS = 16  # of each completion
PROBE_LOGPROBS = (-1.0, -2.0, -3.0)
POLICY = np.zeros(2**20, np.uint8)  # one bucket, too large to travel inside a call
PAUSE = "pause_s"  # of SamplingSpec.extra: a group ends after a share of these seconds that its seed draws


class IdleEngine:
    """Answers each group with the same tokens. It has no state, so that one process can stand for several engines."""

    def __init__(self, *specs: Any) -> None: ...

    async def ready(self) -> None: ...

    async def end(self) -> None:
        os._exit(1)

    async def install(self, header: SnapshotHeader, bucket: Any, policy: str) -> InstallReceipt:
        return InstallReceipt(header.version, header.digest, header.probe_logprobs, 0.0)

    async def sample(
        self, prompt: Any, sampling: SamplingSpec, seed: int, version: int, columns: Mapping[str, Any], policy: str
    ) -> tuple[RolloutHeader, RolloutGroup]:
        if PAUSE in sampling.extra:
            await asyncio.sleep(sampling.extra[PAUSE] * (seed % 1000) / 1000)
        count = sampling.num_generations
        ids = np.arange(TOKENS, dtype=np.int32)
        logprobs = np.full(TOKENS, -1.0, np.float32)
        group = RolloutGroup(version, ids, (ids,) * count, (logprobs,) * count, (False,) * count, ("",) * count)
        lengths = (TOKENS,) * count
        return RolloutHeader(version, TOKENS, lengths, lengths, group.truncated, 0.01), group


class IdleTrainer:
    """Counts policy versions."""

    def __init__(self, *specs: Any) -> None:
        self.version = 0

    def set_probe(self, probe: Any) -> None:
        """As a job begins: with version 0."""
        self.version = 0

    def bucket_count(self) -> int:
        return 1

    def base_logprobs(self) -> tuple[float, ...]:
        return tuple(10 * logprob for logprob in PROBE_LOGPROBS)

    def train(self, advantages: Any, *groups: RolloutGroup) -> TrainStats:
        self.version += 1
        return TrainStats(self.version, 0.0, 1.0, 1e-6, 0.0, 0.0, 0.0, 1.0, 0.0, len(groups), len(groups), len(groups), 0)

    def publish(self) -> tuple[Any, SnapshotHeader]:
        return POLICY, SnapshotHeader(self.version, "idle", 0, 0.0, (), POLICY.nbytes, f"{self.version}", PROBE_LOGPROBS)


def first_is_right(completions: list[Any], **_: Any) -> list[float]:
    """A reward with a signal in every group."""
    return [1.0] + [0.0] * (len(completions) - 1)
