"""What an engine knows of one job's policy."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors import model
from actors.errors import SyncError
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
        self.open = True
        self.installed: Installed | None = None  # None = the base model, before the first install
        self.groups: set[asyncio.Task[Any]] = set()  # that are sampled, or wait for their turn
        self.installs: set[asyncio.Task[Any]] = set()  # one at most, while its probe is computed

    @property
    def modules(self) -> list[str]:
        """Names of the modules that the adapter is on, such as q_proj."""
        return sorted({name.split(".")[-3] for name in self.expected})

    @contextmanager
    def busy(self, tasks: set[asyncio.Task[Any]]) -> Iterator[None]:
        """Counts the caller among the tasks while the block runs, which ends with a SyncError when the policy is closed."""
        task = current_task()
        tasks.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if self.open:
                raise
            raise SyncError("the policy was closed while it was in use: its job has ended") from None
        finally:
            tasks.discard(task)

    @property
    def version(self) -> int | None:
        """That is served."""
        return self.installed.header.version if self.installed else None


def current_task() -> asyncio.Task[Any]:
    """The one that runs now."""
    task = asyncio.current_task()
    assert task is not None, "coroutines run in tasks"
    return task
