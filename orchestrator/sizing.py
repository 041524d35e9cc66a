"""Which adapter, how many ranks and which engines: the plainest way in which a job fits the machines, by the memory model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.errors import ConfigError
from orchestrator import hardware, tensor_parallel
from orchestrator.model_shape import ModelSource, read_config, read_shape
from orchestrator.plan import Node, total_gpus
from orchestrator.planning import QLORA, SHARES, Read, planned
from orchestrator.rewards import reward_models
from orchestrator.schema import JobConfig

Keys = dict[str, Any]  # of a job file
Way = Mapping[str, Any]  # those that say how it is placed

ADAPTERS: tuple[Way, ...] = ({"adapter": "lora"}, QLORA)


@dataclass(frozen=True)
class ModelSize:
    """What a model's config.json tells."""

    weights: int
    heads: int  # of attention
    context: int | None  # tokens that it was made for; None = it does not say


def size_of(model: str) -> ModelSize:
    """Raises ConfigError for a model that cannot be had, or whose config.json transformers cannot read."""
    source = ModelSource(model)
    shape = read_shape(source, None)
    context = getattr(read_config(source).get_text_config(), "max_position_embeddings", None)
    return ModelSize(shape.weights, shape.heads, context)


def described(nodes: Sequence[Node]) -> str:
    """Their GPUs for a person."""
    sizes = [node.gpu_bytes for node in nodes if node.resources.get("GPU", 0) and node.gpu_bytes]
    if not total_gpus(nodes):
        return "no GPU"
    return f"{total_gpus(nodes)} x {min(sizes, default=0) / hardware.GIB:.0f} GB"


def problems(config: JobConfig, nodes: Sequence[Node], rows: int) -> list[str]:
    """What of a job has no place on these machines, or too small a one; none = it fits."""
    models = tuple(reward_models(config)) if config.rl == "grpo" else ()
    return planned(config, nodes, Read(config, rows, models, None)).problems


def ways(rl: str | None, model: ModelSize, nodes: Sequence[Node]) -> Iterator[Way]:
    """Adapters and placements: fewer GPUs first, LoRA before QLoRA, an engine's own GPU before a shared one."""
    gpus = total_gpus(nodes)
    if not gpus:
        yield from ADAPTERS
        return
    ranks = [count for count in SHARES if count <= gpus]
    if rl != "grpo":
        yield from (_trained(count, adapter) for count in ranks for adapter in ADAPTERS)
        return
    largest = max(node.resources.get("GPU", 0) for node in nodes)
    parallels = [count for count in tensor_parallel.sizes(model.heads) if count in SHARES and count <= largest]
    split = sorted((r + p, r, p) for r in ranks for p in parallels if r + p <= gpus)
    for _, rank, parallel in split:
        for adapter in ADAPTERS:
            yield {**_trained(rank, adapter), "vllm": {"tensor_parallel_size": parallel}}
    colocated = {"trl": {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}, "vllm": {"gpu_memory_utilization": 0.4}}
    yield from ({**_trained(count, adapter), **colocated} for count in ranks for adapter in ADAPTERS)


def _trained(ranks: int, adapter: Way) -> Keys:
    return {**adapter, **({"ray_num_workers": ranks, "fsdp_version": 2} if ranks > 1 else {})}


def way_for(
    rl: str | None,
    name: str,
    model: ModelSize,
    nodes: Sequence[Node],
    rows: int,
    config_with: Callable[[Way], JobConfig],
) -> Way:
    """The first way that fits. config_with: the job with a way's keys. Raises ConfigError when none does."""
    wrong: list[str] = []  # with the last way
    for way in ways(rl, model, nodes):
        wrong = problems(config_with(way), nodes, rows)
        if not wrong:
            return way
    raise ConfigError(
        f"{name} does not fit {described(nodes)}, with QLoRA neither: {wrong[0]}; name a smaller --model, or a larger --cluster"
    )
