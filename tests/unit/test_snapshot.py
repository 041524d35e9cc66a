"""Snapshots: bytes there and back, the same policy as a saved adapter, and what an engine must refuse."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors import device, snapshot
from actors.errors import SyncError
from actors.trainer import Trainer
from actors.types import SnapshotHeader, TensorEntry
from tests.tiny import fill_adapter, published, save_llama, trainer_spec

pytestmark = pytest.mark.usefixtures("one_thread")
BASE = "someone/base"
EXPECTED = {
    "layers.0.q_proj.lora_A.weight": (4, 6),
    "layers.0.q_proj.lora_B.weight": (6, 4),
    "layers.1.q_proj.lora_A.weight": (4, 6),
    "layers.1.q_proj.lora_B.weight": (6, 4),
}
B1 = "layers.1.q_proj.lora_B.weight"
Snapshot = tuple[SnapshotHeader, NDArray[np.uint8]]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """torch.equal would call -0.0 and 0.0 the same."""

    def bits(tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().flatten().view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def odd_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, generator=generator)
    return {
        "z.fp32": base,
        "a.bf16": torch.randn(3, 11, generator=generator).bfloat16(),
        "m.fp16": torch.randn(1, generator=generator).half(),
        "transposed": base.t(),
        "scalar": torch.tensor(2.5),
        "one.byte": torch.tensor([255], dtype=torch.uint8),
        "special": torch.tensor([-0.0, 1e-45, torch.finfo(torch.float32).max]),
        "large": torch.randn(65, 129, generator=generator).bfloat16(),
    }


def test_pack_and_unpack_keep_every_bit() -> None:
    tensors = odd_tensors()
    entries, buffer, _ = snapshot.pack(tensors)
    found = snapshot.unpack(entries, buffer)
    assert found.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert same_bits(found[name], expected), name


def test_tensors_lie_side_by_side_on_cache_lines_in_the_order_of_names() -> None:
    entries, buffer, _ = snapshot.pack(odd_tensors())
    assert [e.name for e in entries] == sorted(odd_tensors())
    end = 0
    for entry in entries:
        assert entry.offset % 64 == 0 and 0 <= entry.offset - end < 64
        assert entry.nbytes == torch.Size(entry.shape).numel() * getattr(torch, entry.dtype).itemsize
        end = entry.offset + entry.nbytes
    assert end <= buffer.nbytes < end + 64


def test_equal_tensors_make_equal_bytes_in_whatever_order_they_come() -> None:
    tensors = odd_tensors()
    _, forward, digest = snapshot.pack(tensors)
    _, backward, _ = snapshot.pack(dict(reversed(tensors.items())))
    assert digest == snapshot.digest(forward) == snapshot.digest(backward)


def test_nothing_packs_to_nothing() -> None:
    entries, buffer, digest = snapshot.pack({})
    assert (entries, buffer.nbytes, snapshot.unpack(entries, buffer)) == ((), 0, {})
    assert digest == snapshot.digest(b"")


def test_a_later_change_of_the_tensors_does_not_reach_the_buffer() -> None:
    tensor = torch.ones(4)
    entries, buffer, _ = snapshot.pack({"a": tensor})
    tensor.zero_()
    assert snapshot.unpack(entries, buffer)["a"].tolist() == [1.0] * 4


def test_a_used_buffer_that_is_large_enough_is_written_over() -> None:
    _, used, _ = snapshot.pack({"a": torch.ones(4), "b": torch.ones(4)})
    entries, buffer, digest = snapshot.pack({"a": torch.full((4,), 2.0), "b": torch.zeros(4)}, used)
    assert np.shares_memory(buffer, used) and digest == snapshot.digest(buffer)
    assert [tensor.tolist() for tensor in snapshot.unpack(entries, buffer).values()] == [[2.0] * 4, [0.0] * 4]
    _, other, _ = snapshot.pack({"a": torch.ones(40)}, used)
    assert not np.shares_memory(other, used)
    small, part, digest = snapshot.pack({"a": torch.full((3,), 5.0)}, used)
    assert np.shares_memory(part, used) and snapshot.unpack(small, part)["a"].tolist() == [5.0] * 3
    assert digest == snapshot.pack({"a": torch.full((3,), 5.0)})[2], "what was there before is under the digest"


@pytest.mark.gpu
@pytest.mark.parametrize("nbytes", [20_000, 1000])  # above and below what the large one has; three times all are more
def test_tensors_come_from_a_gpu_and_go_there_bit_by_bit(monkeypatch: pytest.MonkeyPatch, nbytes: int) -> None:
    """While the GPU is busy, so that what does not wait for it is too early."""
    monkeypatch.setattr(device, "PINNED_BYTES", nbytes)
    tensors = odd_tensors()
    there = {name: tensor.to(device.device()) for name, tensor in tensors.items()}
    entries, buffer, digest = snapshot.pack(tensors)
    torch.cuda._sleep(10**8)  # cycles
    found, packed, found_digest = snapshot.pack(there)
    assert (found, packed.tobytes(), found_digest) == (entries, buffer.tobytes(), digest)
    upload = device.Upload(device.device())
    torch.cuda._sleep(10**8)
    passes = [{name: upload(tensor) for name, tensor in snapshot.unpack(entries, buffer).items()} for _ in range(3)]
    for back in passes:
        assert all(tensor.is_cuda for tensor in back.values())
        assert all(same_bits(back[name].cpu(), tensor) for name, tensor in tensors.items())


def test_digest_is_xxh3_of_128_bits() -> None:
    assert snapshot.digest(b"") == "99aa06d3014798d86001c324468d497f"  # xxHash's own test vector
    assert snapshot.digest(np.zeros(0, np.uint8)) == snapshot.digest(b"")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def trainer(folder: str) -> Trainer:
    trainer = Trainer(trainer_spec(folder))
    fill_adapter(trainer.policy, seed=3, size=0.1)
    trainer.set_probe([5, 6, 7, 8])
    return trainer


def test_a_snapshot_is_what_peft_reloads_from_the_saved_adapter(trainer: Trainer, folder: str, tmp_path: Path) -> None:
    header, buffer = published(trainer)
    trainer.save_policy(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reloaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = get_peft_model_state_dict(reloaded)
    found = snapshot.unpack(header.entries, buffer)
    assert found.keys() == expected.keys() and len(found) == 28
    for name, tensor in expected.items():
        assert same_bits(found[name], tensor), name
    assert any(bool(t.any()) for n, t in found.items() if "lora_B" in n)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as saved:
        assert set(saved.keys()) == found.keys()
        assert all(same_bits(saved.get_tensor(name), found[name]) for name in found)


def test_the_header_says_what_the_buffer_holds(trainer: Trainer, folder: str) -> None:
    header, buffer = published(trainer)
    assert (header.version, header.base_model, header.rank, header.scaling) == (0, folder, 4, 2.0)
    assert (header.nbytes, header.digest) == (buffer.nbytes, snapshot.digest(buffer))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        logprobs = torch.log_softmax(trainer.policy(input_ids=ids).logits[0], -1)
    assert header.probe_logprobs == pytest.approx([float(logprobs[i, t]) for i, t in enumerate((6, 7, 8))], abs=1e-6)


def made(change: Callable[[dict[str, Tensor]], None] = lambda tensors: None) -> Snapshot:
    """A snapshot that fits EXPECTED, or one of tensors changed before they were published."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in EXPECTED.items()}
    change(tensors)
    entries, buffer, digest = snapshot.pack(tensors)
    return SnapshotHeader(7, BASE, 4, 2.0, entries, buffer.nbytes, digest, (-1.0,)), buffer


def flipped(buffer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = buffer.copy()
    out[len(out) // 2] ^= 0b100
    return out


def with_value(value: float) -> Snapshot:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[B1].view(-1)[13] = value

    return made(change)


def refusals() -> dict[str, tuple[Snapshot, str]]:
    header, buffer = made()
    return {
        "base": ((replace(header, base_model="someone/other"), buffer), "belongs to someone/other.*serves someone/base"),
        "rank": ((replace(header, rank=8), buffer), "rank is 8, this job's is 4"),
        "scaling": ((replace(header, scaling=1.0), buffer), r"scaling is 1\.0, this job's is 2\.0"),
        "truncated": ((header, buffer[:-64]), f"{buffer.nbytes - 64} bytes arrived of {buffer.nbytes}"),
        "bit": ((header, flipped(buffer)), f"digest [0-9a-f]{{32}}, published was {header.digest}"),
        "missing": (made(lambda t: t.__delitem__(B1)), f"1 tensors are missing, first {B1}"),
        "unknown": (made(lambda t: t.update(extra=torch.ones(1))), "1 tensors have no place in the model, first extra"),
        "shape": (made(lambda t: t.update({B1: torch.ones(4, 6)})), rf"{B1} has shape \(4, 6\), .*needs \(6, 4\)"),
        "nan": (with_value(float("nan")), f"{B1} holds NaN or infinity"),
        "infinity": (with_value(float("-inf")), f"{B1} holds NaN or infinity"),
    }


@pytest.mark.parametrize("kind", refusals())
def test_what_does_not_fit_is_refused_and_the_message_says_why(kind: str) -> None:
    (header, buffer), message = refusals()[kind]
    with pytest.raises(SyncError, match=f"^policy version 7 was refused .*{message}"):
        snapshot.validate(header, [buffer], EXPECTED, base_model=BASE, rank=4, scaling=2.0)


def test_what_fits_is_accepted() -> None:
    header, buffer = made()
    snapshot.validate(header, [buffer], EXPECTED, base_model=BASE, rank=4, scaling=2.0)
    largest = torch.finfo(torch.float32).max
    header, buffer = with_value(largest)  # finite, hence no reason to refuse
    snapshot.validate(header, [buffer], EXPECTED, base_model=BASE, rank=4, scaling=2.0)


def test_a_bf16_snapshot_with_infinity_is_refused_too() -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[B1] = tensors[B1].bfloat16()
        tensors[B1][0, 0] = float("inf")

    header, buffer = made(change)
    with pytest.raises(SyncError, match="holds NaN or infinity"):
        snapshot.validate(header, [buffer], EXPECTED, base_model=BASE, rank=4, scaling=2.0)


@pytest.mark.parametrize("piece_bytes, pieces", [(1, [1] * 6), (150, [2, 1, 2, 1]), (2**20, [3, 2, 1])])
def test_of_many_tensors_the_one_that_is_not_finite_is_named(
    monkeypatch: pytest.MonkeyPatch, piece_bytes: int, pieces: list[int]
) -> None:
    monkeypatch.setattr(snapshot, "PIECE_BYTES", piece_bytes)
    dtypes = [torch.float32] * 3 + [torch.bfloat16] * 2 + [torch.float32]
    tensors = {f"t{i}": torch.ones(3, 5, dtype=dtype) for i, dtype in enumerate(dtypes)}
    for name in ("t0", "t1"):  # which are in one piece where it has room, and have no sum there
        tensors[name][1, 2] = torch.finfo(torch.float32).max

    def validated() -> str:
        entries, bucket, digest = snapshot.pack(tensors)
        assert [len(piece) for piece in snapshot._pieces(entries)] == pieces
        return whole(entries, bucket, digest)

    assert validated()
    for name, tensor in tensors.items():
        tensor[2, 4] = float("nan")
        with pytest.raises(SyncError, match=f": {name} holds NaN or infinity"):
            validated()
        tensor[2, 4] = 1.0


def test_tensors_of_no_size_and_what_lies_between_tensors_are_no_reason_to_refuse() -> None:
    entries, bucket, _ = snapshot.pack({"a": torch.zeros(0, 3), "b": torch.ones(1), "c": torch.zeros(2, 0), "d": torch.ones(1)})
    bucket[4:64] = 0xFF  # a NaN in each dtype of numbers with a point
    assert whole(entries, bucket, snapshot.digest(bucket))


def whole(entries: Sequence[TensorEntry], bucket: NDArray[np.uint8], digest: str) -> str:
    """Validates a snapshot of one bucket whose tensors are all that is expected."""
    header = SnapshotHeader(1, BASE, 0, 0.0, tuple(entries), bucket.nbytes, digest, ())
    shapes = {entry.name: entry.shape for entry in entries}
    return snapshot.validate(header, [bucket], shapes, base_model=BASE, rank=0, scaling=0.0)


@pytest.mark.parametrize(
    "change",
    [{"nbytes": 40}, {"dtype": "float64"}, {"offset": 66}, {"offset": 0}, {"offset": 128}, {"bucket": 1}, {"bucket": -1}],
    ids=str,
)
def test_a_tensor_that_does_not_lie_in_its_bucket_is_refused(change: dict[str, Any]) -> None:
    (first, second), bucket, digest = snapshot.pack({"a": torch.ones(15), "b": torch.ones(15)})
    assert whole([first, second], bucket, digest)
    wrong = replace(second, **change)
    where = f"{wrong.nbytes} bytes at {wrong.offset} of bucket {wrong.bucket}, where it does not fit"
    with pytest.raises(SyncError, match=rf"has b, {wrong.dtype} \(15,\), as {where}"):
        whole([first, wrong], bucket, digest)


def test_every_single_byte_is_under_the_digest() -> None:
    header, buffer = made()
    for position in range(buffer.nbytes):
        changed = buffer.copy()
        changed[position] ^= 1
        assert snapshot.digest(changed) != header.digest


def test_buckets_are_as_full_as_they_may_be() -> None:
    sizes = {"a": 4, "b": 3, "c": 4, "e": 9, "d": 1}
    assert snapshot.buckets(sizes, 8) == [["a", "b"], ["c", "d"], ["e"]]  # e is too large for any, and has its own
    assert snapshot.buckets(sizes, 100) == [["a", "b", "c", "d", "e"]]


def test_a_snapshot_in_buckets_is_the_same_policy() -> None:
    tensors = {f"t{i}": torch.randn(3, 5 + i) for i in range(5)}
    used: NDArray[np.uint8] | None = None
    entries, held, digests = [], [], []
    for number, names in enumerate([["t0", "t3"], ["t1"], ["t2", "t4"]]):
        found, bucket, digest = snapshot.pack({name: tensors[name] for name in names}, used, number)
        used = bucket if used is None else used  # as the trainer does: one buffer, written over again and again
        entries += found
        held.append(bucket.copy())
        digests.append(digest)
    back = snapshot.unpack(entries, *held)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    header = SnapshotHeader(1, BASE, 0, 0.0, tuple(entries), sum(b.nbytes for b in held), snapshot.joined(digests), ())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    about = {"base_model": BASE, "rank": 0, "scaling": 0.0}
    assert snapshot.validate(header, held, shapes, **about) == header.digest
    with pytest.raises(SyncError, match="the bytes have digest"):
        snapshot.validate(header, [*held[:2], flipped(held[2])], shapes, **about)
    with pytest.raises(SyncError, match="bytes arrived of"):
        snapshot.validate(header, held[:2], shapes, **about)


def test_an_entry_is_plain_data() -> None:
    entries, _, _ = snapshot.pack({"a": torch.zeros(2, 3, dtype=torch.bfloat16)})
    assert entries == (TensorEntry("a", "bfloat16", (2, 3), 0, 12),)
