"""Which adapter, how many ranks and which engines: the plainest way in which a job fits a cluster's GPUs.

What fits is asked of one function, `fits`. It knows the ranges of TRAINING_GIB, which are those of common practice for rows
of up to 2048 tokens, one or two at a time.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors import device, hub
from actors.errors import ConfigError
from orchestrator.schema import JobConfig

# For models of up to so many billions of weights: GiB in all to train with QLoRA, and with LoRA on bfloat16. The upper ends of
# the usual ranges.
TRAINING_GIB = ((3, 8, 12), (8, 14, 24), (14, 20, 40), (34, 32, 80), (72, 48, 160))
ENGINE_BYTES = 2 * 1.2  # a weight in bfloat16, and a fifth for activations and a first KV cache
ROOM = 1.02  # a GPU that is sold with 80 GB has 79.6 GiB
SHARES = (1, 2, 4, 8, 16, 32, 64)  # GPUs that hold a model together


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind."""

    gpus: int  # 0 = CPUs alone
    gib: float = 0.0  # memory of each

    def __str__(self) -> str:
        return f"{self.gpus} x {self.gib:.0f} GB" if self.gpus else "no GPU"


@dataclass(frozen=True)
class ModelSize:
    """What a model's config.json tells."""

    weights: int
    heads: int  # of attention
    context: int | None  # tokens that it was made for; None = it does not say


Keys = dict[str, Any]  # of a job file
Way = Mapping[str, Any]  # those that say how it is placed


def cluster_of(text: str | None) -> Cluster:
    """`8x80GB`, or auto or none for the cluster of RAY_ADDRESS, else this machine. Raises ConfigError for anything else."""
    if text not in (None, "auto"):
        found = re.fullmatch(r"(\d+) ?x ?(\d+(?:\.\d+)?) ?(?:GB|GiB)?", str(text), re.IGNORECASE)
        if found is None:
            raise ConfigError(f"--cluster: {text} is no cluster; write auto, or GPUs and memory of each, such as 8x80GB")
        return Cluster(int(found[1]), float(found[2]))
    if not os.environ.get("RAY_ADDRESS"):
        return Cluster(device.gpu_count(), (device.gpu_bytes() or 0) / 2**30)
    from orchestrator import cluster

    with cluster.connected():
        gpus = int(sum(node.resources.get("GPU", 0) for node in cluster.nodes()))
    if gpus and not device.has_gpu():
        raise ConfigError(f"--cluster: the cluster of RAY_ADDRESS has {gpus} GPUs; say their memory, such as {gpus}x80GB")
    return Cluster(gpus, (device.gpu_bytes() or 0) / 2**30)


def size_of(model: str) -> ModelSize:
    """Raises ConfigError for a model that cannot be had, or whose config.json transformers cannot read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(hub.resolve(model, weights=False))
        with torch.device("meta"):
            weights = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"--model: {model} cannot be used: {str(error).splitlines()[0]}") from error
    text = config.get_text_config()
    return ModelSize(weights, int(text.num_attention_heads), getattr(text, "max_position_embeddings", None))


def fits(config: JobConfig, model: ModelSize, cluster: Cluster) -> bool:
    """Whether each rank and each engine of a job has room on its GPU."""
    ranks = config.ray_num_workers
    assert isinstance(ranks, int)
    rank_gib = training_gib(config, model) / (ranks if config.fsdp_version else 1)
    if config.rl != "grpo":
        return ranks <= cluster.gpus and rank_gib <= cluster.gib * ROOM
    parallel = config.vllm.tensor_parallel_size
    engine_gib = model.weights * ENGINE_BYTES / parallel / 2**30
    if config.trl.vllm_mode == "colocate":
        return ranks <= cluster.gpus and rank_gib + engine_gib <= cluster.gib * ROOM
    room = cluster.gib * config.vllm.gpu_memory_utilization
    return ranks + parallel <= cluster.gpus and rank_gib <= cluster.gib * ROOM and engine_gib <= room


def training_gib(config: JobConfig, model: ModelSize) -> float:
    """Of all ranks together."""
    billions = model.weights / 1e9
    size, qlora, lora = next((row for row in TRAINING_GIB if billions <= row[0]), TRAINING_GIB[-1])
    return (qlora if config.adapter == "qlora" else lora) * max(1.0, billions / size)


def ways(rl: str | None, model: ModelSize, cluster: Cluster) -> Iterator[Way]:
    """Adapters and placements for a cluster: fewer GPUs first, LoRA before QLoRA, an engine's own GPU before a shared one."""
    if not cluster.gpus:
        yield {"adapter": "lora"}
        return
    ranks = [count for count in SHARES if count <= cluster.gpus]
    if rl != "grpo":
        yield from (_trained(count, adapter) for count in ranks for adapter in ("lora", "qlora"))
        return
    parallels = [count for count in SHARES if model.heads % count == 0 and count <= 8]  # of one node
    split = sorted((r + p, r, p) for r in ranks for p in parallels if r + p <= cluster.gpus)
    for _, rank, parallel in split:
        for adapter in ("lora", "qlora"):
            yield {**_trained(rank, adapter), "vllm": {"tensor_parallel_size": parallel}}
    colocated = {"trl": {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}, "vllm": {"gpu_memory_utilization": 0.4}}
    yield from ({**_trained(count, adapter), **colocated} for count in ranks for adapter in ("lora", "qlora"))


def _trained(ranks: int, adapter: str) -> Keys:
    shards = {"ray_num_workers": ranks, "fsdp_version": 2} if ranks > 1 else {}
    return {"adapter": adapter, **({"load_in_4bit": True} if adapter == "qlora" else {}), **shards}


def way_for(
    rl: str | None, name: str, model: ModelSize, cluster: Cluster, config_with: Callable[[Way], JobConfig]
) -> Way:
    """The first way that fits. config_with: the job with a way's keys. Raises ConfigError when none does."""
    for way in ways(rl, model, cluster):
        if not cluster.gpus or fits(config_with(way), model, cluster):
            return way
    needed = TRAINING_GIB[-1] if model.weights > 72e9 else next(r for r in TRAINING_GIB if model.weights / 1e9 <= r[0])
    engine = model.weights * ENGINE_BYTES / 2**30
    engines = f", and about {math.ceil(engine)} GB for an engine" if rl == "grpo" else ""
    raise ConfigError(
        f"--cluster: {name} does not fit {cluster}: training it with QLoRA takes about {needed[1]} GB{engines}; "
        "name a smaller --model, or a cluster with more"
    )
