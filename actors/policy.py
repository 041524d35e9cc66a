"""What an engine knows of one job's policy."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors import model
from actors.snapshot import Bucket
from actors.specs import LoraSpec, ModelSpec
from actors.types import SnapshotHeader


@dataclass(frozen=True)
class Installed:
    """A policy version that this engine holds."""

    header: SnapshotHeader
    buckets: tuple[Bucket, ...]
    slot: int  # vLLM's LoRA id when sync is adapter


class Policy:
    """One job's, on one engine: the version that is served, what the next must look like, and what is sampled with it."""

    def __init__(self, model_spec: ModelSpec, lora: LoraSpec | None, probe: Sequence[int]) -> None:
        self.lora = lora
        self.probe = list(probe)
        self.expected = model.expected_shapes(model_spec, lora)
        self.rank, self.scaling = model.rank_and_scaling(lora)
        self.installed: Installed | None = None  # None = the base model, before the first install
        self.groups: set[asyncio.Task[Any]] = set()  # that are sampled, or wait for their turn

    @property
    def version(self) -> int | None:
        """That is served."""
        return self.installed.header.version if self.installed else None
