"""Configuration and cluster to a plan: who runs where, with what, and how batches are cut. A pure function.

It starts nothing and reads nothing, so it can be printed, tested and simulated with any cluster. The numbers that
actors are built from come from here; a new role gets its bundle in `_bundles`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from actors.errors import ConfigError
from orchestrator.jobs import warmup_steps
from orchestrator.schema import JobConfig
from orchestrator.source import Problem

Resources = Mapping[str, float]
TRAINER, ENGINE, BOTH = "trainer", "engine", "trainer and engine"  # roles of bundles; of BOTH, two actors share it
MOST_OF_TWO = 0.5  # of a GPU: two ranks with no more than this each may share it
MOST_NODES = 4  # that a message lists
MAX_NUM_SEQS = 1024  # completions that an engine decodes side by side; the rest of a batch waits in its queue


@dataclass(frozen=True)
class Node:
    """What one machine of the cluster offers."""

    name: str
    resources: Resources  # CPU, GPU, ...
    gpu_bytes: int | None = None  # memory of each GPU; None = not known, or it has none
    gpu_type: str | None = None  # as Ray names it, where that is all that is known of its size
    memory: int | None = None  # bytes, of the machine; None = not known


@dataclass(frozen=True)
class Bundle:
    """What one actor reserves."""

    role: str  # trainer | engine | trainer and engine | reward | worker
    index: int
    resources: Resources

    def __str__(self) -> str:
        return f"{self.role} {self.index}"


@dataclass(frozen=True)
class Plan:
    """A resolved online job."""

    bundles: tuple[Bundle, ...]
    nodes: tuple[Node, ...]
    placement: tuple[int | None, ...]  # per bundle, the node that can hold it; None = none can
    strategy: str  # of Ray's placement group
    gpu: bool
    colocate: bool  # whether rank i and engine i share a bundle
    sleeps: bool  # whether engines leave their GPU while the trainer computes
    tensor_parallel: int  # GPUs of an engine
    dtype: str
    sync: str  # fused | adapter | weights
    trainer_threads: int | None  # CPU threads; None with GPUs
    engine_threads: int | None  # of each engine
    prompts_per_step: int
    completions_per_step: int
    prompts_per_engine: int  # an equal share
    max_num_seqs: int
    max_model_len: int
    gpu_memory_utilization: float
    steps_per_epoch: float
    total_steps: int
    warmup_steps: int
    save_steps: int
    eval_steps: int | None  # None = only before and after training
    rows: int = field(default=0)
    reward_models: tuple[str, ...] = ()  # of trl.reward_funcs
    reward_threads: int | None = None  # CPU threads of each reward model
    shared: bool = False  # whether its engines serve other jobs too, and are none of its bundles
    policies: int = 1  # of jobs like this one, that each of its engines serves at once

    @property
    def problems(self) -> list[str]:
        """For each kind of bundle that no node can hold: what it needs, what is free, and what would fit."""
        return shortages(self.bundles, self.nodes, self.placement)

    def reward_bundle(self, reward_model: str) -> int | None:
        """The index of a reward model's bundle; None where it reserves nothing."""
        rewards = [i for i, bundle in enumerate(self.bundles) if bundle.role == "reward"]
        return rewards[self.reward_models.index(reward_model)] if rewards else None


def make_plan(
    config: JobConfig,
    nodes: Sequence[Node],
    rows: int,
    cpu_dtype: str = "float32",
    reward_models: Sequence[str] = (),
    *,
    shared: bool = False,
) -> Plan:
    """Resolves a job of rl: grpo over `rows` training prompts.

    cpu_dtype: what bf16: auto means on nodes without a GPU. reward_models: which of trl.reward_funcs are models. shared:
    whether its engines are there already and serve other jobs too, so that it reserves nothing for them.
    Raises ConfigError for GPUs that an engine must have and may not.
    """
    gpu = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    if gpu and config.ray.engine_gpus == 0:
        text = "is 0, but the cluster has GPUs and vLLM needs one; give a number or a share, or remove it"
        config.source.raise_if_any([Problem("ray.engine_gpus", text)])
    bundles = _bundles(config, gpu, len(reward_models))
    if shared:
        bundles = tuple(bundle for bundle in bundles if bundle.role != ENGINE)
    if gpu:
        config.source.raise_if_any(_shares_that_fail(config))
    completions = completions_per_step(config)
    prompts = completions // config.trl.num_generations
    steps_per_epoch = rows / prompts
    total_steps = config.max_steps or max(1, ceil(config.num_epochs * steps_per_epoch))
    per_engine = ceil(prompts / engines(config))
    max_num_seqs = min(per_engine * config.trl.num_generations, MAX_NUM_SEQS)
    engine_share = min(1.0, _engine_gpus(config, gpu))
    trainer_threads, engine_threads, reward_threads = _threads(config, nodes, len(reward_models), shared)
    return Plan(
        bundles=bundles,
        nodes=tuple(nodes),
        placement=first_fit(bundles, nodes),
        strategy={"pack": "PACK", "spread": "SPREAD"}[config.ray.placement],
        gpu=gpu,
        colocate=colocated(config),
        sleeps=colocated(config) and config.trl.vllm_enable_sleep_mode,
        tensor_parallel=config.vllm.tensor_parallel_size,
        dtype=policy_dtype(config, gpu, cpu_dtype),
        sync=_sync(config),
        trainer_threads=None if gpu else trainer_threads,
        engine_threads=None if gpu else engine_threads,
        prompts_per_step=prompts,
        completions_per_step=completions,
        prompts_per_engine=per_engine,
        max_num_seqs=max_num_seqs,
        max_model_len=config.vllm.max_model_len or config.sequence_len,
        gpu_memory_utilization=config.vllm.gpu_memory_utilization * (engine_share if gpu else 1.0),
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        warmup_steps=warmup_steps(config, total_steps),
        save_steps=_every(config.save_steps, config.saves_per_epoch or 1, steps_per_epoch, total_steps),
        eval_steps=_every(config.eval_steps, config.evals_per_epoch, steps_per_epoch, total_steps)
        if config.eval_steps or config.evals_per_epoch
        else None,
        rows=rows,
        reward_models=tuple(reward_models),
        reward_threads=None if gpu else reward_threads,
        shared=shared,
    )


def _shares_that_fail(config: JobConfig) -> Iterator[Problem]:
    """Of GPUs, by trainer ranks."""
    share = trainer_resources(config, has_gpus=True).get("GPU", 0)
    if colocated(config) and not share:
        yield Problem("resources_per_worker.GPU", "is 0, but with vllm_mode: colocate the engine needs a GPU too; give one")
    if ranks(config) > 1 and 0 < share <= MOST_OF_TWO:
        text = f"is {share:g}: Ray may put two ranks on one GPU, which NCCL refuses; use more than {MOST_OF_TWO:g}"
        yield Problem("resources_per_worker.GPU", text)


def completions_per_step(config: JobConfig) -> int:
    """Of all trainer ranks."""
    return config.micro_batch_size * config.gradient_accumulation_steps * ranks(config)


def ranks(config: JobConfig) -> int:
    """Of the trainer. Only a dataset job has a range of workers."""
    assert isinstance(config.ray_num_workers, int), "rl: grpo takes one number"
    return config.ray_num_workers


def colocated(config: JobConfig) -> bool:
    """Whether each trainer rank shares its bundle with an engine."""
    return config.trl.vllm_mode == "colocate"


def engines(config: JobConfig) -> int:
    return ranks(config) if colocated(config) else config.ray.engines


def _sync(config: JobConfig) -> str:
    if config.adapter is None:
        return "weights"
    return "fused" if config.ray.sync == "auto" else config.ray.sync


def ensure_placeable(problems: Sequence[str]) -> None:
    """Raises ConfigError when a bundle fits nowhere; problems: of a plan."""
    if problems:
        raise ConfigError("the cluster cannot hold this job:\n  " + "\n  ".join(problems))


def _bundles(config: JobConfig, gpu: bool, reward_models: int) -> tuple[Bundle, ...]:
    engine: dict[str, float] = {"CPU": config.ray.engine_cpus}
    if gpu:
        engine["GPU"] = _engine_gpus(config, gpu)
    trainer = trainer_resources(config, gpu)
    # A reward model takes as much of a GPU as a trainer rank. Without GPUs it reserves nothing, and has no bundle.
    reward = {"GPU": min(1.0, trainer["GPU"])} if "GPU" in trainer else None
    rewards = (Bundle("reward", i, reward) for i in range(reward_models) if reward)
    if colocated(config):
        both = {**trainer, "CPU": trainer["CPU"] + engine["CPU"]}
        return (*(Bundle(BOTH, i, both) for i in range(ranks(config))), *rewards)
    return (
        *(Bundle(TRAINER, i, trainer) for i in range(ranks(config))),
        *(Bundle(ENGINE, i, engine) for i in range(config.ray.engines)),
        *rewards,
    )


def trainer_resources(config: JobConfig, has_gpus: bool) -> Resources:
    """What one trainer rank reserves. The GPU of resources_per_worker, a default, is left out where there is none."""
    asked = {name: n for name, n in config.resources_per_worker.items() if n and (has_gpus or name != "GPU")}
    return {"CPU": float(config.ray.trainer_cpus), **asked}


def _every(steps: float | None, per_epoch: int | None, steps_per_epoch: float, total_steps: int) -> int:
    """A number of steps as it is, a share of all steps below 1, or so many times an epoch; at least 1."""
    if steps is not None:
        return max(1, round(steps * total_steps)) if steps < 1 else int(steps)
    return max(1, round(steps_per_epoch / (per_epoch or 1)))


def _threads(config: JobConfig, nodes: Sequence[Node], reward_models: int, shared: bool) -> tuple[int, int, int]:
    """CPU threads of each trainer rank, of each engine, and of each reward model.

    On-policy, engines, reward models and trainer take turns, so the trainer may use every core of its machines, and the
    engines, which all sample at once, share them, and so do reward models. Otherwise, and beside other jobs, each has the
    cores that it reserves, and a reward model, which reserves none, has one.
    """
    if shared or config.ray.max_staleness > 0:
        return config.ray.trainer_cpus, config.ray.engine_cpus, 1
    cpus = int(max((node.resources.get("CPU", 1) for node in nodes), default=1))
    ranks_per_node, engines_per_node = (ceil(count / hosts(nodes)) for count in (ranks(config), engines(config)))
    return max(1, cpus // ranks_per_node), max(1, cpus // engines_per_node), max(1, cpus // max(1, reward_models))


def hosts(nodes: Sequence[Node]) -> int:
    """How many nodes have CPUs for actors: a cluster's head may offer none."""
    return max(1, sum(node.resources.get("CPU", 0) > 0 for node in nodes))


def total_gpus(nodes: Sequence[Node]) -> int:
    """Of all of them together."""
    return int(sum(node.resources.get("GPU", 0) for node in nodes))


def _engine_gpus(config: JobConfig, gpu: bool) -> float:
    if not gpu:
        return 0.0
    return config.ray.engine_gpus if config.ray.engine_gpus is not None else config.vllm.tensor_parallel_size


def first_fit(bundles: Sequence[Bundle], nodes: Sequence[Node]) -> tuple[int | None, ...]:
    """For each bundle the node that holds it, or None: first fit, the largest bundle first. Ray's own choice may differ."""
    free = [dict(node.resources) for node in nodes]
    placement: dict[int, int | None] = {}
    for i in sorted(range(len(bundles)), key=lambda i: (-bundles[i].resources.get("GPU", 0), i)):
        needs = bundles[i].resources
        fitting = [n for n, has in enumerate(free) if all(has.get(r, 0) >= amount for r, amount in needs.items())]
        placement[i] = fitting[0] if fitting else None
        if fitting:
            for resource, amount in needs.items():
                free[fitting[0]][resource] -= amount
    return tuple(placement[i] for i in range(len(bundles)))


def shortages(bundles: Sequence[Bundle], nodes: Sequence[Node], placement: Sequence[int | None]) -> list[str]:
    """A line for each kind of bundle that no node can hold: what it needs, what is free, and what would fit."""
    left = [dict(node.resources) for node in nodes]
    for bundle, place in zip(bundles, placement, strict=True):
        if place is not None:
            for resource, needed in bundle.resources.items():
                left[place][resource] -= needed
    free = "; ".join(f"{node.name} has {amount(has)} left" for node, has in list(zip(nodes, left, strict=True))[:MOST_NODES])
    if len(nodes) > MOST_NODES:
        free += f"; none of the other {len(nodes) - MOST_NODES} nodes has room"
    gpus = total_gpus(nodes)
    share = int(100 / ceil(len(bundles) / gpus)) / 100 if gpus else 0.0  # a bundle's share lies on one GPU
    if share <= MOST_OF_TWO and sum(bundle.role not in ("engine", "reward") for bundle in bundles) > 1:
        share = 0.0  # two ranks would meet on one
    unplaced = Counter(bundle.role for bundle, place in zip(bundles, placement, strict=True) if place is None)
    lines = []
    for bundle, place in zip(bundles, placement, strict=True):
        if place is None and (count := unplaced.pop(bundle.role, 0)):  # the first of its role, which all need the same
            short = [r for r, needed in bundle.resources.items() if all(has.get(r, 0) < needed for has in left)]
            who = f"{bundle} needs" if count == 1 else f"{bundle} and {count - 1} more need"
            remedies = _remedies(bundle, short, share)
            lines.append(f"{who} {amount(bundle.resources)}, but {free}; {', or '.join(remedies)}")
    return lines


def _remedies(bundle: Bundle, short: Sequence[str], share: float) -> list[str]:
    """share: of a GPU, if all bundles had the same."""
    remedies = []
    if "GPU" in short and 0 < share < 1:
        engines = f" and ray.engine_gpus: {share:g}" if bundle.role not in ("worker", BOTH) else ""
        remedies.append(f"share GPUs with resources_per_worker: {{GPU: {share:g}}}{engines}")
    if "CPU" in short:
        remedies.append(f"lower {'ray.engine_cpus' if bundle.role == 'engine' else 'ray.trainer_cpus'}")
    if bundle.index > 0 and bundle.role != "reward":
        remedies.append(f"ask for {'ray.engines' if bundle.role == 'engine' else 'ray_num_workers'}: {bundle.index}")
    return [*remedies, f"add a node with {amount(bundle.resources)}"]


def amount(resources: Resources) -> str:
    """Resources for a person, such as 2 CPU + 1 GPU."""
    hidden = ("memory", "object_store_memory")  # bytes, and every node's own name, which Ray counts as resources too
    shown = [f"{n:g} {name}" for name, n in sorted(resources.items()) if n and not name.startswith(("node:", *hidden))]
    return " + ".join(shown) or "nothing"


def policy_dtype(config: JobConfig, gpu: bool, cpu_dtype: str) -> str:
    """What trainer and engines of an online job compute in. cpu_dtype: what auto means on nodes without a GPU."""
    if config.vllm.dtype != "auto":
        return "float32" if config.vllm.dtype == "float" else config.vllm.dtype
    return trainer_dtype(config, gpu, cpu_dtype)


def trainer_dtype(config: JobConfig, gpu: bool, cpu_dtype: str) -> str:
    """What bf16 means for a trainer. cpu_dtype: what auto means on nodes without a GPU."""
    if config.bf16 == "auto":
        return "bfloat16" if gpu else cpu_dtype
    return "bfloat16" if config.bf16 else "float32"
