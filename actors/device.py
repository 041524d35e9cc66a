"""The only module that knows which accelerator there is. A new kind of device is taught to this file alone."""

import functools
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# Instructions with which a CPU multiplies bfloat16 matrices natively. Without them bfloat16 is emulated, and
# sampling is several times slower than in float32.
_BF16_CPU_FLAGS = ("amx_bf16", "avx512_bf16", "bf16")
UPLOAD_BYTES = 2**28  # that may be on their way to a GPU


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


def host_bytes(nbytes: int, from_gpu: bool) -> NDArray[np.uint8]:
    """Memory of the host that was not written yet; from_gpu: pinned, so that a GPU writes to it while others go on."""
    if not from_gpu:
        return np.empty(nbytes, dtype=np.uint8)
    pinned: NDArray[np.uint8] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return pinned


class Upload:
    """Brings tensors of the host to a device, without a wait for each where that is a GPU.

    A copy from memory that is not pinned runs at a tenth of the speed, and after it this process waits until the GPU has done
    all that it was told before, which takes longest where others compute there too.
    """

    def __init__(self, where: torch.device) -> None:
        self.where = where
        self.under_way = 0  # bytes

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.where.type == "cpu":
            return tensor
        self.under_way += tensor.nbytes
        if self.under_way > UPLOAD_BYTES:
            wait()  # or there would be pinned memory for everything
            self.under_way = tensor.nbytes
        return tensor.pin_memory().to(self.where, non_blocking=True)


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
