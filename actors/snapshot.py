"""A policy's tensors as flat buffers with a manifest: what a trainer publishes and an engine validates.

A uint8 array travels through the object store at the speed of a copy, where a dict of tensors is pickled piece by piece.
numpy has no bfloat16, hence bytes. An adapter is one such bucket; the weights of a whole model are many, of which the trainer
holds one at a time. Nothing here touches a file.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from actors import device
from actors.errors import SyncError
from actors.types import SnapshotHeader, TensorEntry

ALIGNMENT = 64  # bytes; every tensor starts on a cache line, so that a view of any dtype is aligned
PIECE_BYTES = 2**20  # of a bucket, that stay in a processor's cache while they are looked at twice


Bucket = NDArray[np.uint8]  # [bytes]


def digest(buffer: Any) -> str:
    """xxh3-128 of bytes or a uint8 array, hex: finds corruption and mix-ups at memory speed; not meant against an attacker."""
    return xxhash.xxh3_128_hexdigest(buffer)


def joined(digests: Sequence[str]) -> str:
    """The digest of a snapshot, from those of its buckets: of one, its own."""
    return digests[0] if len(digests) == 1 else digest("".join(digests).encode())


def buckets(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names by bucket, sorted, each bucket as full as `limit` bytes allow; a tensor above the limit has one of its own.

    sizes: bytes of each tensor.
    """
    names: list[list[str]] = [[]]
    filled = 0
    for name in sorted(sizes):
        if names[-1] and filled + sizes[name] > limit:
            names.append([])
            filled = 0
        names[-1].append(name)
        filled += sizes[name]
    return names


def pack(
    tensors: Mapping[str, torch.Tensor], used: Bucket | None = None, bucket: int = 0
) -> tuple[tuple[TensorEntry, ...], Bucket, str]:
    """Copies tensors (any device and dtype) into one bucket, sorted by name.

    used: a buffer that nobody reads any more; one that is large enough is written over, since touching fresh memory takes
    several times as long as the copy. Returns the manifest, the bucket, and its digest.
    """
    entries, offset = [], 0
    for name in sorted(tensors):
        tensor = tensors[name]
        nbytes = tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        entries.append(TensorEntry(name, dtype, tuple(tensor.shape), offset, nbytes, bucket))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    buffer = used[:offset] if used is not None and used.nbytes >= offset else np.empty(offset, dtype=np.uint8)
    whole = xxhash.xxh3_128()
    digested = 0
    for entry, held in zip(entries, device.on_host([tensors[entry.name] for entry in entries]), strict=True):
        # numpy copies in this thread. torch would wake its pool for every tensor, and where engines share the cores
        # each wake-up waits for a time slice: seconds instead of a fraction of one.
        end = entry.offset + entry.nbytes
        buffer[entry.offset : end] = held.numpy()
        buffer[end : end + -end % ALIGNMENT] = 0  # or equal policies would have different digests
        whole.update(buffer.data[digested:end])  # while the tensor is still in the processor's cache
        digested = end
    whole.update(buffer.data[digested:])
    return tuple(entries), buffer, whole.hexdigest()


def unpack(entries: Sequence[TensorEntry], *held: Bucket) -> dict[str, torch.Tensor]:
    """Views into the buckets, by name. They share their memory: clone before anything writes to them."""
    tensors: dict[str, torch.Tensor] = {}
    for number, bucket in enumerate(held):
        tensors |= views(entries_of(entries, number), bucket)
    return tensors


def entries_of(entries: Sequence[TensorEntry], bucket: int) -> list[TensorEntry]:
    """Those of one bucket."""
    return [entry for entry in entries if entry.bucket == bucket]


def views(entries: Sequence[TensorEntry], bucket: Bucket) -> dict[str, torch.Tensor]:
    """As `unpack`, of one bucket and its own entries."""
    flat = torch.frombuffer(bucket, dtype=torch.uint8) if bucket.size else torch.empty(0, dtype=torch.uint8)
    pieces = ((entry, flat[entry.offset : entry.offset + entry.nbytes]) for entry in entries)
    return {entry.name: piece.view(getattr(torch, entry.dtype)).view(entry.shape) for entry, piece in pieces}


def validate(
    header: SnapshotHeader,
    held: Sequence[Bucket],
    expected: Mapping[str, tuple[int, ...]],
    *,
    base_model: str,
    rank: int,
    scaling: float,
) -> str:
    """Raises SyncError unless the snapshot is whole and belongs to this model and adapter.

    held: its buckets. expected: name -> shape of every tensor, worked out from the model's own configuration. Returns the
    digest of the bytes that arrived.
    vLLM itself accepts adapters with missing halves, unknown names and NaN, so this stands before it.
    """

    def refuse(why: str) -> SyncError:
        return SyncError(f"policy version {header.version} was refused before it reached the engine: {why}")

    if header.base_model != base_model:
        raise refuse(f"it belongs to {header.base_model}, this engine serves {base_model}")
    if header.rank != rank:
        raise refuse(f"its LoRA rank is {header.rank}, this job's is {rank}")
    if header.scaling != scaling:
        raise refuse(f"its LoRA scaling is {header.scaling}, this job's is {scaling}")
    arrived = sum(bucket.nbytes for bucket in held)
    if arrived != header.nbytes:
        raise refuse(f"{arrived} bytes arrived of {header.nbytes}")
    names = {entry.name for entry in header.entries}
    if missing := sorted(expected.keys() - names):
        raise refuse(f"{len(missing)} tensors are missing, first {missing[0]}")
    if unknown := sorted(names - expected.keys()):
        raise refuse(f"{len(unknown)} tensors have no place in the model, first {unknown[0]}")
    for entry in header.entries:
        if entry.shape != expected[entry.name]:
            raise refuse(f"{entry.name} has shape {entry.shape}, the model needs {expected[entry.name]}")
    if wrong := _misplaced(header.entries, held):
        at = f"{wrong.nbytes} bytes at {wrong.offset} of bucket {wrong.bucket}"
        raise refuse(f"its manifest has {wrong.name}, {wrong.dtype} {wrong.shape}, as {at}, where it does not fit")
    examined = [_examine(entries_of(header.entries, number), bucket) for number, bucket in enumerate(held)]
    found = joined([digest for digest, _ in examined])
    not_finite = [name for _, names in examined for name in names]
    if found != header.digest:
        raise refuse(f"the bytes have digest {found}, published was {header.digest}")
    if not_finite:
        raise refuse(f"{not_finite[0]} holds NaN or infinity")
    return found


def _misplaced(entries: Sequence[TensorEntry], held: Sequence[Bucket]) -> TensorEntry | None:
    """The first tensor that is not said to be in a bucket as `pack` puts it there: whole, on a cache line, after the others."""
    ends = [0] * len(held)
    for entry in entries:
        end = entry.offset + math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize
        if not 0 <= entry.bucket < len(held) or entry.offset % ALIGNMENT or entry.nbytes != end - entry.offset:
            return entry
        if entry.offset < ends[entry.bucket] or end > held[entry.bucket].nbytes:
            return entry
        ends[entry.bucket] = end
    return None


def _examine(entries: Sequence[TensorEntry], buffer: Bucket) -> tuple[str, list[str]]:
    """The bucket's digest, and the names of tensors that hold NaN or infinity: one pass over the memory for both."""
    whole = xxhash.xxh3_128()
    digested = 0
    not_finite = []
    # An overflow of the sum is an answer here, not a mishap.
    with np.errstate(over="ignore", invalid="ignore"):
        for piece in _pieces(entries):
            end = piece[-1].offset + piece[-1].nbytes
            whole.update(buffer.data[digested:end])
            digested = end
            # What lies between tensors may be anything, so a sum that is not finite only says that each is looked at.
            if not _finite_sum(buffer[piece[0].offset : end], piece[0].dtype):
                each = ((entry.name, buffer[entry.offset : entry.offset + entry.nbytes]) for entry in piece)
                not_finite += [name for name, held in each if not _finite_sum(held, piece[0].dtype)]
    whole.update(buffer.data[digested:])
    return whole.hexdigest(), not_finite


def _pieces(entries: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    """Neighbours of one dtype, as many as a processor's cache holds, or one that is larger."""
    piece: list[TensorEntry] = []
    for entry in entries:
        if piece and (entry.dtype != piece[0].dtype or entry.offset + entry.nbytes - piece[0].offset > PIECE_BYTES):
            yield piece
            piece = []
        piece.append(entry)
    if piece:
        yield piece


def _finite_sum(held: Bucket, dtype: str) -> bool:
    """Whether the sum of the numbers is finite: it is not when any of them is not. Unlike isfinite().all() it makes no
    temporary of fp32. numpy works in this thread, as in pack.
    """
    if not held.size:
        return True
    numbers = torch.frombuffer(held, dtype=getattr(torch, dtype)).float().numpy()
    return bool(np.isfinite(np.add.reduce(numbers)))
