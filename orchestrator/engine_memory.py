"""Bytes that a vLLM engine needs on each of its GPUs, and a reward model on its own.

An engine takes the share of the GPU that it was given, whatever it needs: what its weights and its work leave is KV cache. So
the question is whether that is enough for one sequence of the longest length; more lets more of them decode side by side.
"""

from dataclasses import dataclass

from actors.reward_model import TOKENS_AT_ONCE
from orchestrator.hardware import GIB
from orchestrator.jobs import trained_lora
from orchestrator.memory import BYTES, CUDA_CONTEXT, NCCL, PROCESS, Memory, source_of
from orchestrator.model_shape import ModelShape, ModelSource, read_shape
from orchestrator.plan import Plan
from orchestrator.schema import JobConfig

# vLLM 0.32, arg_utils.py: tokens that go through an offline engine at once, by the GPU's memory.
BATCHED_TOKENS_LARGE, BATCHED_TOKENS, LARGE_GPU = 16384, 8192, 70 * GIB
CUDA_GRAPHS = GIB // 2  # captured for each size of a batch, unless vllm.enforce_eager; stays while an engine sleeps
SAMPLER_COPIES = 3  # of the logits in fp32: as computed, their logarithms, and sorted


@dataclass(frozen=True)
class EngineMemory:
    """On one of its GPUs, or in its process on CPUs."""

    awake: Memory
    asleep: int  # bytes
    kv_tokens: int  # that its KV cache holds; below max_model_len it does not start


def engine_memory(config: JobConfig, plan: Plan, capacity: int | None) -> EngineMemory:
    """capacity: bytes of the GPU, or of the machine where there are none; None = not known, so only what is needed counts."""
    shape = read_shape(source_of(config), None)
    cut = plan.tensor_parallel
    size = BYTES[plan.dtype]
    weights = shape.weights * size // cut
    kv_of_token = shape.kv_per_token * size // min(cut, shape.kv_heads)
    if plan.sync == "adapter":
        lora = read_shape(source_of(config), trained_lora(config))
        weights += (plan.policies + 1) * lora.trained * size // cut  # a new version is proven before the old one leaves
    if not plan.gpu:
        given = config.ray.kv_cache_gib * GIB if config.ray.kv_cache_gib is not None else None
        if given is None and capacity is not None:
            given = max(0, round(plan.gpu_memory_utilization * capacity) - weights - PROCESS)  # vLLM's cpu_worker.py
        cache = given if given is not None else plan.max_model_len * kv_of_token
        terms = {"weights": weights, "kv cache": cache, "overhead": PROCESS}
        awake = Memory("sampling", terms)
        return EngineMemory(awake, awake.total, cache // kv_of_token)
    overhead = CUDA_CONTEXT + (0 if config.vllm.enforce_eager else CUDA_GRAPHS) + (NCCL if cut > 1 else 0)
    work = _work(shape, plan, size, capacity or 0)
    one = plan.max_model_len * kv_of_token
    given = one if capacity is None else round(plan.gpu_memory_utilization * capacity) - weights - work - overhead
    terms = {"weights": weights, "activations": work, "kv cache": max(0, given), "overhead": overhead}
    return EngineMemory(Memory("sampling", terms), overhead, max(0, given) // kv_of_token)


def _work(shape: ModelShape, plan: Plan, size: int, capacity: int) -> int:
    """What vLLM's largest batch needs for a moment: an MLP's gate, up and product beside the residual stream, or logits."""
    tokens = max(plan.max_num_seqs, BATCHED_TOKENS_LARGE if capacity >= LARGE_GPU else BATCHED_TOKENS)
    layers = tokens * (3 * shape.intermediate // plan.tensor_parallel + 4 * shape.hidden) * size
    sampler = plan.max_num_seqs * shape.vocabulary * (size + SAMPLER_COPIES * 4)
    return max(layers, sampler)


def reward_memory(name: str, dtype: str, trust_remote_code: bool, *, gpu: bool) -> Memory:
    """Of a reward model, a whole one. Raises ConfigError when its config.json is not there."""
    shape = read_shape(ModelSource(name, trust_remote_code, "SEQ_CLS"), None)
    work = TOKENS_AT_ONCE * (3 * shape.intermediate + 4 * shape.hidden) * BYTES[dtype]
    terms = {"weights": shape.weights * BYTES[dtype], "activations": work, "overhead": CUDA_CONTEXT if gpu else PROCESS}
    return Memory("scoring", terms)
