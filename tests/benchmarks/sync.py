"""A policy from the trainer to all engines, against a memory copy of its bytes, and against a file.

Ours: from the call to the trainer until the last engine has acknowledged; pack and digest in the trainer, object store,
digest and validation in every engine. The trainer holds random LoRA tensors in fp32, and the engines hold no model, so
that what is timed is the way and not the model. Last come installs into real engines, on their own.

Memory copy: one `numpy.copyto` of the buffer in the trainer's process, both sides touched before.
File: the trainer writes safetensors, every engine opens it and reads each tensor once, as a load into vLLM's slots
would; nothing is validated, and nothing is forced to the disk.
"""

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from actors import snapshot
from actors.engine import RolloutEngine
from actors.types import InstallReceipt, SnapshotHeader
from tests.benchmarks import common
from tests.benchmarks.common import PROBE, STEP
from tests.benchmarks.results import Row

ENGINES = (1, 2, 4)
SCALING = 2.0


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA on all linear layers of a decoder whose attention is grouped."""

    model: str
    rank: int
    layers: int
    hidden: int
    inner: int  # of the MLP
    kv: int  # width of keys and values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor."""
        hidden, inner, kv = self.hidden, self.inner, self.kv
        widths = {
            **{"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)},
            **{"self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv)},
            **{"mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner), "mlp.down_proj": (inner, hidden)},
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.layers):
            for module, (inputs, outputs) in widths.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                shapes[f"{name}.lora_A.weight"] = (self.rank, inputs)
                shapes[f"{name}.lora_B.weight"] = (outputs, self.rank)
        return shapes


ADAPTERS = {
    "10 MB": Adapter("SmolLM2-135M", rank=8, layers=30, hidden=576, inner=1536, kv=192),
    "74 MB": Adapter("Qwen2.5-1.5B", rank=16, layers=28, hidden=1536, inner=8960, kv=256),
    "323 MB": Adapter("Qwen2.5-7B", rank=32, layers=28, hidden=3584, inner=18944, kv=512),
}


class Publisher:
    """A trainer that has nothing but LoRA tensors."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.version = 0
        self.tensors = {name: torch.randn(shape) for name, shape in adapter.shapes().items()}
        _, self.source, _ = snapshot.pack(self.tensors)
        self.target = np.ones_like(self.source)
        self.buffer: NDArray[np.uint8] | None = None

    def publish(self) -> tuple[SnapshotHeader, NDArray[np.uint8]]:
        """What Trainer.publish does for an adapter, without the probe."""
        self.version += 1
        entries, buffer, digest = snapshot.pack(self.tensors, self.buffer)
        self.buffer = buffer
        name, rank = self.adapter.model, self.adapter.rank
        return SnapshotHeader(self.version, name, rank, SCALING, entries, buffer.nbytes, digest, ()), buffer

    def copy(self) -> float:
        """Seconds of one copy of the buffer."""
        return common.wall(lambda: np.copyto(self.target, self.source))()

    def write(self, path: Path) -> None:
        save_file(self.tensors, path)


class NoModelEngine:
    """An engine that validates what it gets and samples nothing."""

    def __init__(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.adapter = adapter
        self.shapes = shapes

    def install(self, header: SnapshotHeader, buffer: NDArray[np.uint8]) -> InstallReceipt:
        """As RolloutEngine.install, without a model to place it in and without the probe."""
        started = time.perf_counter()
        name, rank = self.adapter.model, self.adapter.rank
        digest = snapshot.validate(header, (buffer,), self.shapes, base_model=name, rank=rank, scaling=SCALING)
        return InstallReceipt(header.version, digest, (), time.perf_counter() - started)

    def load(self, path: Path) -> None:
        """Opens the file and reads every tensor, since load_file only maps them."""
        for tensor in load_file(path).values():
            np.add.reduce(tensor.view(-1).numpy())


def run(pairs: int) -> list[Row]:
    rows = []
    with common.session():
        for size, adapter in ADAPTERS.items():
            publisher = common.start(Publisher, adapter)
            engines = [common.start(NoModelEngine, adapter, adapter.shapes()) for _ in range(max(ENGINES))]
            for count in ENGINES:
                rows += _sync(pairs, size, publisher, engines[:count])
            for actor in (publisher, *engines):
                ray.kill(actor)
        rows += _installs(pairs)
    return rows


def _sync(pairs: int, size: str, publisher: ray.actor.ActorHandle, engines: list[ray.actor.ActorHandle]) -> list[Row]:
    def through_store() -> None:
        header_ref, buffer_ref = publisher.publish.options(num_returns=2).remote()
        header = ray.get(header_ref)
        receipts = ray.get([engine.install.remote(header, buffer_ref) for engine in engines])
        if any(receipt.digest != header.digest for receipt in receipts):
            raise RuntimeError("an engine acknowledged other bytes than were published")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter_model.safetensors"

        def through_file() -> None:
            ray.get(publisher.write.remote(path))
            ray.get([engine.load.remote(path) for engine in engines])

        store_s, copy_s, file_s = common.in_turn(
            pairs,
            common.wall(through_store),
            lambda: float(ray.get(publisher.copy.remote())),
            common.wall(through_file),
        )
    what = f"{size}, {len(engines)} engine{'s' if len(engines) > 1 else ''}"
    return [
        Row(what, "memory copy", store_s, copy_s, "cost", reach=2),
        Row(what, "safetensors file", store_s, file_s, "speedup", reach=3),
    ]


def _installs(pairs: int) -> list[Row]:
    """From the call to an engine until it has acknowledged, the probe included."""
    header, buffer = common.random_policy(version=0)
    buffer_ref = ray.put(buffer)

    versions = itertools.count(1)

    def install(sync: str) -> Callable[[], float]:
        engine = common.start(RolloutEngine, common.engine_spec(STEP, sync, 0.4), PROBE)

        def next_version() -> None:
            ray.get(engine.install.remote(dataclasses.replace(header, version=next(versions)), buffer_ref))

        return common.wall(next_version)

    fused_s, adapter_s = common.in_turn(pairs, install("fused"), install("adapter"))
    megabytes = buffer.nbytes / 1e6
    return [
        Row(f"install into vLLM, fused, {megabytes:.0f} MB", "", fused_s),
        Row(f"install into vLLM, LoRA slot, {megabytes:.0f} MB", "", adapter_s),
    ]
