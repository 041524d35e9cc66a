"""The only module that knows which accelerator there is. A new kind of device is taught to this file alone."""

import functools
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

# Instructions with which a CPU multiplies bfloat16 matrices natively. Without them bfloat16 is emulated, and
# sampling is several times slower than in float32.
_BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
PINNED_BYTES = 2**26  # through which tensors go to a GPU and come from it


def has_gpu() -> bool:
    return torch.cuda.is_available()


def gpu_count() -> int:
    """GPUs that this process can see."""
    return torch.cuda.device_count()


def gpu_bytes() -> int | None:
    """Memory of each GPU of this machine, of the smallest one; None without a GPU.

    Asked of the driver: torch would begin to use a GPU for it, and take half a GiB of it for as long as this process lives.
    """
    if not has_gpu():
        return None
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return min(int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles)
    finally:
        pynvml.nvmlShutdown()


def device() -> torch.device:
    """Where this process computes: the GPU that Ray gave it, or the CPU."""
    return torch.device("cuda", 0) if has_gpu() else torch.device("cpu")


def free_gib() -> float:
    """GPU memory that no process holds, GiB; NaN without a GPU."""
    return torch.cuda.mem_get_info()[0] / 2**30 if has_gpu() else math.nan


@contextmanager
def measured() -> Iterator[Callable[[], int]]:
    """Measures the block; what it yields tells, afterwards, the most bytes of tensors that there were in this process.

    On a GPU torch's allocator keeps the number itself. On a CPU it is what lived when the block began, as Python's garbage
    collector lists it (weights mapped from a file too, of which no allocator knows), and the most that torch's allocator gave
    out and did not take back since: its profiler hears of each block, also of those inside an operation. The resident set of
    the process would not do, since memory that was freed stays in it, and a file's pages come and go.
    """
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()
        yield torch.cuda.max_memory_allocated
        return
    before = tensor_bytes()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: before + _most_given_out(profiler)


def tensor_bytes() -> int:
    """Of all tensors in this process that have data."""
    if has_gpu():
        return torch.cuda.memory_allocated()
    from torch._subclasses.fake_tensor import FakeTensor

    gc.unfreeze()  # vLLM hides what it has made from the collector
    gc.collect()  # what nobody can reach does not live
    tensors = (found for found in gc.get_objects() if issubclass(type(found), torch.Tensor))
    real = (tensor for tensor in tensors if not isinstance(tensor, FakeTensor))  # those others say that they are on a CPU
    storages = [tensor.untyped_storage() for tensor in real if tensor.device.type == "cpu"]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def _most_given_out(profiler: Any) -> int:
    """profiler: torch's, one that has ended. Its table of operations would take minutes to make, and is not needed."""
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(0, *accumulate(int(nbytes) for _, nbytes in changes))


def take_turn(after: Sequence[Any]) -> None:
    """Returns once actors that may share this process's GPU have loaded: vLLM takes what others allocate meanwhile for its own.

    Raises ray.exceptions.RayActorError when one of them cannot load.
    """
    import ray

    if after:  # of nothing ray.get would start a cluster
        ray.get([actor.__ray_ready__.remote() for actor in after])


def release_cache() -> None:
    """Gives the GPU memory that this process keeps for reuse to whoever else computes there."""
    if has_gpu():
        torch.cuda.empty_cache()


def wait() -> None:
    """Returns when the GPU has computed all that this process has told it to."""
    if has_gpu():
        torch.cuda.synchronize()


class Upload:
    """Copies tensors of the host to a device, through pinned memory of its own where that is a GPU.

    A copy from other memory runs at a tenth of the speed, and after each this process would wait until the GPU has done all
    that it was told before, which takes longest where others compute there too.
    """

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self.pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True) if where.type != "cpu" else None
        self.filled = 0  # bytes, from which copies may be under way

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the device; on a CPU the tensor itself."""
        if self.pinned is None:
            return tensor
        there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.where)
        pieces = (flat_bytes(side).split(PINNED_BYTES) for side in (tensor, there))
        for source, target in zip(*pieces, strict=True):
            if self.filled + source.numel() > PINNED_BYTES:
                wait()
                self.filled = 0
            held = self.pinned[self.filled : self.filled + source.numel()]
            held.copy_(source)
            target.copy_(held, non_blocking=True)
            self.filled += source.numel()
        return there


@functools.cache
def upload_to(where: torch.device) -> Upload:
    """The one of this process."""
    return Upload(where)


def on_host(tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Each tensor's bytes, uint8 [bytes], in the host's memory until the next one is asked for.

    Of a GPU's tensors as many come together as fit into pinned memory, with one wait for all of them; larger ones in pieces.
    """
    pinned = None
    for flat in _together(map(flat_bytes, tensors)):
        if all(one.device.type == "cpu" for one in flat):
            yield from flat
            continue
        if pinned is None:
            pinned = torch.empty(PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
        sizes = [one.numel() for one in flat]
        if sum(sizes) > PINNED_BYTES:  # so it is one
            yield _in_pieces(flat[0], pinned)
            continue
        held = pinned[: sum(sizes)].split(sizes)
        for source, target in zip(flat, held, strict=True):
            target.copy_(source, non_blocking=True)
        wait()
        yield from held


def _together(flat: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """In order, as many as have PINNED_BYTES at most, or one that has more."""
    together: list[torch.Tensor] = []
    filled = 0
    for one in flat:
        if together and filled + one.numel() > PINNED_BYTES:
            yield together
            together, filled = [], 0
        together.append(one)
        filled += one.numel()
    if together:
        yield together


def _in_pieces(flat: torch.Tensor, pinned: torch.Tensor) -> torch.Tensor:
    whole = torch.empty(flat.shape, dtype=torch.uint8)
    for source, target in zip(flat.split(PINNED_BYTES), whole.split(PINNED_BYTES), strict=True):
        held = pinned[: source.numel()]
        held.copy_(source)
        target.copy_(held)
    return whole


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [bytes]."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def collectives() -> str:
    """The backend of torch.distributed for this process's device."""
    return "nccl" if has_gpu() else "gloo"


@functools.cache
def fastest_dtype(gpu: bool) -> str:
    """The name of the dtype for base weights: bfloat16 wherever it is native, float32 otherwise."""
    if gpu:
        return "bfloat16"
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return "bfloat16" if words.intersection(_BF16_CPU_FLAGS) else "float32"


def seed_everything(seed: int) -> None:
    """Seeds torch on every device of this process."""
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """State of torch's generators, [bytes] uint8 each."""
    state = {"rng.cpu": torch.get_rng_state()}
    if has_gpu():
        state["rng.gpu"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["rng.cpu"])
    if has_gpu() and "rng.gpu" in state:
        torch.cuda.set_rng_state(state["rng.gpu"])


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
