"""What the figures share: the model under test, its work, the Ray session, actors, and timing in turn.

A new actor under test is a class in its figure's module, started with `start`.
"""

import logging
import os
import random
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors import device, model, snapshot
from actors.decoder import sampling_params
from actors.engine import RolloutEngine
from actors.specs import OWN, EngineSpec, LoraSpec, ModelSpec, SamplingSpec
from actors.types import SnapshotHeader

MODEL = ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct", device.fastest_dtype(device.has_gpu()))
LORA = LoraSpec(r=16, alpha=32)
PROBE = tuple(range(100, 132))
OBJECT_STORE_BYTES = 4 * 2**30
# A small model is bound by the engine's Python and not by the GPU, so several engines share one.
ENGINES = 4 if device.has_gpu() else 1
CORES = len(os.sched_getaffinity(0))
# On a CPU every process gets all cores: the phases of a step follow one another, so no two compute at once. Beside GPUs
# all of them run at once and share the cores; more threads would only wait for each other, since they have small work.
THREADS = max(1, min(3, CORES // (ENGINES + 1))) if device.has_gpu() else CORES
HERE = {"VLLM_HOST_IP": "127.0.0.1"}  # vLLM would look for an address that other machines see
ENVIRONMENT = {
    **HERE,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Work:
    """What is sampled: `prompts` prompts, `completions` each, of exactly `tokens` tokens."""

    prompts: int
    completions: int
    tokens: int

    @property
    def total(self) -> int:
        """Tokens of all completions."""
        return self.prompts * self.completions * self.tokens

    def messages(self) -> list[list[dict[str, str]]]:
        """The prompts, the same in every run."""
        draw = random.Random(0)
        return [
            [{"role": "user", "content": f"What is {draw.randint(1, 99)} + {draw.randint(1, 99)}? Explain."}]
            for _ in range(self.prompts)
        ]

    def sampling(self) -> SamplingSpec:
        """The end token is never drawn before `tokens`, so that both sides of a pair do the same work."""
        return SamplingSpec(self.completions, self.tokens, extra={"min_tokens": self.tokens})


STEP = Work(prompts=64, completions=8, tokens=128) if device.has_gpu() else Work(prompts=8, completions=8, tokens=32)


class BareEngine(RolloutEngine):
    """The engine, and vLLM in the same process without anything around it."""

    def bare(self, prompts: Sequence[Any], sampling: SamplingSpec, seed: int, cold: bool = False) -> float:
        """Seconds of `LLM.generate` alone, on token ids, with the parameters that `sample` uses, but for its seed.

        cold: the prefix cache is emptied before and after, as an install does.
        """
        inputs = [{"prompt_token_ids": self.token_ids(prompt)} for prompt in prompts]
        params = sampling_params(sampling, seed)
        params.seed = None
        if cold:
            self.llm.reset_prefix_cache()
        torch.manual_seed(seed)
        started = time.perf_counter()
        self.llm.generate(inputs, params, use_tqdm=False, lora_request=self._lora_request(self.policies[OWN]))
        seconds = time.perf_counter() - started
        if cold:
            self.llm.reset_prefix_cache()
        return seconds


def engine_spec(work: Work, sync: str, memory: float, engines: int = 1) -> EngineSpec:
    """An engine that takes its share of `work` at once. memory: its share of the GPU's. engines: that share the work."""
    return EngineSpec(
        model=MODEL,
        lora=LORA,
        sync=sync,
        max_model_len=64 + work.tokens,
        max_num_seqs=work.prompts * work.completions // engines,
        gpu_memory_utilization=memory,
    )


@contextmanager
def session() -> Iterator[None]:
    """A private local Ray."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        ray.init(
            address="local",
            _temp_dir=folder,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
        )
        try:
            yield
        finally:
            ray.shutdown()


def start(cls: type, *args: Any, gpu: int = 0, threads: int = THREADS) -> Any:
    """An actor in a process of its own, ready for calls. gpu: the number of the one that it sees, where there are any.

    It waits, since two engines that start side by side on one GPU take each other's memory for their own.
    """
    environment = {**ENVIRONMENT, **on_gpu(gpu), "OMP_NUM_THREADS": str(threads)}
    actor = ray.remote(cls).options(num_cpus=0, runtime_env={"env_vars": environment}).remote(*args)
    ray.get(actor.__ray_ready__.remote())
    return actor


def sampled(engine: Any, prompts: Sequence[Any], sampling: SamplingSpec, seed: int) -> list[Any]:
    """Refs of the groups that an engine's actor is asked for, one a prompt."""
    call = engine.sample.options(num_returns=2)
    return [call.remote(prompt, sampling, 1000 * (seed * len(prompts) + i))[1] for i, prompt in enumerate(prompts)]


def on_gpu(number: int) -> dict[str, str]:
    """The environment of a process that sees one GPU alone, of those that this process sees."""
    if not device.has_gpu():
        return {}
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(device.gpu_count()))))
    return {"CUDA_VISIBLE_DEVICES": seen.split(",")[number]}


def in_turn(pairs: int, *sides: Callable[[], float]) -> list[tuple[float, ...]]:
    """Calls the sides in turn, A B A B …: one round of warm-up, then `pairs` rounds.

    Each returns its seconds. Returns one tuple of `pairs` timings a side.
    """
    rounds = [[side() for side in sides] for _ in range(1 + pairs)]
    return list(zip(*rounds[1:], strict=True))


def wall(call: Callable[[], Any]) -> Callable[[], float]:
    """The call as a side of `in_turn`: its wall time, in seconds."""

    def timed() -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    return timed


def reward(completions: Sequence[Any], **_: Any) -> list[float]:
    """A number that differs wherever texts differ, so that no group is without a signal."""
    return [zlib.crc32(messages[0]["content"].encode()) / 2**32 for messages in completions]


def random_policy(version: int) -> tuple[SnapshotHeader, np.ndarray[Any, np.dtype[np.uint8]]]:
    """A snapshot of the model under test with small random LoRA weights, as a trainer publishes it."""
    generator = torch.Generator().manual_seed(version)
    shapes = model.expected_shapes(MODEL, LORA)
    tensors = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    entries, buffer, digest = snapshot.pack(tensors)
    header = SnapshotHeader(version, MODEL.name, LORA.r, model.scaling(LORA), entries, buffer.nbytes, digest, ())
    return header, buffer
