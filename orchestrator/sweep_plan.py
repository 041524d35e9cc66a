"""How many trials of a sweep fit on machines at once, and whether small ones share GPUs. Pure, as planning.py is for one job.

What it packs is the largest trial: of each key of the space the value that needs the most.
"""

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from actors.errors import ConfigError
from orchestrator.fit import fit
from orchestrator.plan import BOTH, ENGINE, MAX_NUM_SEQS, TRAINER, Bundle, Node, Plan, Resources, colocated, hosts
from orchestrator.planning import Changes, Planned, Read, planned, with_changes
from orchestrator.schema import JobConfig
from orchestrator.sweep_config import SweepConfig

MOST_A_GPU = 4  # trials that share one: they take turns on it, and the more there are, the less each adds
EXACT = 1e-4  # of a resource, as Ray counts
BYTES = "bytes"  # a machine's memory, as a resource; Ray does not count it
Samples = Iterable[tuple[str, Changes]]  # a key of the space, and what one of its values makes of the job's keys
OF_SHARES = ("resources_per_worker", "ray.engine_gpus")  # keys that sharing sets
OF_PLACES = ("ray_num_workers", "vllm.tensor_parallel_size", "trl.vllm_mode")  # keys that it hangs on
OF_A_LENGTH = {  # keys that decide how many steps a job has that does not say so
    "num_epochs", "micro_batch_size", "gradient_accumulation_steps", "ray_num_workers", "sequence_len",
    "sample_packing", "datasets", "test_datasets", "val_set_size", "trl.num_generations",
}  # fmt: skip


@dataclass(frozen=True)
class SweepPlan:
    """Trials on machines."""

    job: Planned  # the largest trial, with the changes
    values: Changes  # of the space's keys, that make it the largest
    trials: int
    at_once: int  # that run beside each other; 0 = not even one fits
    a_gpu: int  # actors that share a GPU
    changes: Changes  # to each trial, so that GPUs are shared
    engines: int  # that all trials share; 0 = each trial has its own, or none

    @property
    def largest(self) -> int:
        """Bytes that the largest of a trial's own actors needs of a GPU, or of a machine where there are none."""
        own = [nbytes for actor, nbytes in _bytes(self.job).items() if not (self.engines and actor.startswith(ENGINE))]
        return max(own, default=0)

    @property
    def rounds(self) -> int:
        """Of trials that run beside each other, when they all take as long."""
        return ceil(self.trials / self.at_once) if self.at_once else 0

    @property
    def crowd(self) -> int:
        """Trials that share a GPU, or a machine's CPUs, and so may each take so many times as long as alone."""
        return self.a_gpu if self.job.plan.gpu else ceil(self.at_once / hosts(self.job.plan.nodes))


def of_sweep(config: SweepConfig, nodes: Sequence[Node], found: Read) -> SweepPlan:
    """The trials of a sweep on these nodes, as `make` packs them.

    Raises ConfigError when trials that must run at the same time cannot.
    """
    shared = config.share_engines
    plan = make(
        found.config, nodes, found, config.trials, config.sizes, max_concurrent=config.max_concurrent, share_engines=shared
    )
    if not plan.job.plan.problems and plan.at_once < config.trials and config.scheduler["name"] == "pbt":
        raise ConfigError(
            f"pbt compares trials that run at the same time, here {config.trials}, and there is room for {plan.at_once}: "
            "lower num_samples, or what a trial reserves"
        )
    return plan


def steps_of_each(job: Planned, varied: Collection[str]) -> int | None:
    """Of each trial, where one of them is `job`; None = not known, or they differ. varied: keys of the job in the space."""
    names = {key.partition("[")[0] for key in varied}
    if "max_steps" in names or (job.config.max_steps is None and names & OF_A_LENGTH):
        return None
    return job.plan.total_steps if isinstance(job.plan, Plan) else job.config.max_steps


def make(
    config: JobConfig,
    nodes: Sequence[Node],
    found: Read,
    trials: int,
    samples: Samples = (),
    *,
    max_concurrent: int | None = None,
    share_engines: bool = False,
) -> SweepPlan:
    """Packs the trials of a sweep. config: the base job. found: what `planning.read` reads of it.

    Where more trials fit if they share GPUs, `changes` says how: each actor takes an equal share, as large as will do, if the
    memory of a GPU suffices for whatever actors Ray puts on it together. Raises ConfigError for what no cluster can hold.
    """
    samples = list(samples)
    values = _largest(config, nodes, found, samples)
    largest = with_changes(config, {**values, **({"ray.sync": "adapter"} if share_engines else {})})
    most = min(trials, max_concurrent or trials)

    def packed(changes: Changes, a_gpu: int) -> SweepPlan:
        job = planned(with_changes(largest, changes), nodes, found)
        held, own = _dealt(job, share_engines)
        count = 0 if job.plan.problems else max(1, _fitting(own, nodes, most, held))
        if held and count:
            count = max(1, bisect_left(range(1, count + 1), True, key=lambda jobs: bool(_served(job, jobs).fit.problems)))
            job = _served(job, count)
        return SweepPlan(job, values, trials, count, a_gpu, changes, len(held))

    best = packed({}, 1)
    for a_gpu in range(2, MOST_A_GPU + 1) if _may_share(largest, nodes, samples) else ():
        if best.at_once >= most:
            break
        tried = packed(_shares(config, a_gpu, share_engines), a_gpu)
        if tried.at_once > best.at_once and _has_room(tried):
            best = tried
    return best


def _served(job: Planned, jobs: int) -> Planned:
    """The job beside others like it on its engines: each has a LoRA slot there, and completions in their batches."""
    assert isinstance(job.plan, Plan)
    plan = replace(job.plan, policies=jobs, max_num_seqs=min(jobs * job.plan.max_num_seqs, MAX_NUM_SEQS))
    return Planned(job.config, plan, fit(job.config, plan))


def _may_share(config: JobConfig, nodes: Sequence[Node], samples: Samples) -> bool:
    """Whether trials may be given shares of GPUs: nobody has said what they take, and each actor has one GPU of its own.

    Of several ranks Ray may put two on one GPU, which NCCL refuses.
    """
    varied = {name for _, changes in samples for name in changes}
    said = {key for key in (*config.source.written(), *varied) if key.startswith(OF_SHARES)}
    alone = config.ray_num_workers == 1 and config.vllm.tensor_parallel_size == 1
    takes_turns = config.rl == "grpo" and colocated(config)
    has_gpus = any(node.resources.get("GPU", 0) for node in nodes)
    return has_gpus and alone and not takes_turns and not said and varied.isdisjoint(OF_PLACES)


def _shares(config: JobConfig, a_gpu: int, share_engines: bool) -> Changes:
    share = int(100 / a_gpu) / 100
    engine = {"ray.engine_gpus": share} if config.rl == "grpo" and not share_engines else {}
    return {"resources_per_worker": {"GPU": share}, **engine}


def _has_room(plan: SweepPlan) -> bool:
    """Whether any of the trials' actors, so many as share a GPU, have room on each."""
    return all(place.capacity is not None and plan.a_gpu * plan.largest <= place.capacity for place in plan.job.fit.places)


def _largest(config: JobConfig, nodes: Sequence[Node], found: Read, samples: Samples) -> Changes:
    """Of each key of the space the value with which the base job needs the most."""

    def needs(changes: Changes) -> tuple[float, int]:
        job = planned(with_changes(config, changes), nodes, found)
        return sum(bundle.resources.get("GPU", 0) for bundle in job.plan.bundles), sum(_bytes(job).values())

    chosen: dict[str, tuple[tuple[float, int], Changes]] = {}
    for key, changes in samples:
        needed = needs(changes)
        if key not in chosen or needed > chosen[key][0]:
            chosen[key] = (needed, changes)
    return {key: value for _, changes in chosen.values() for key, value in changes.items()}


def _bytes(job: Planned) -> dict[str, int]:
    """What each actor needs of a GPU, or of a machine where there are none, by its name."""
    return {share.actor: share.memory.total for place in job.fit.places for share in place.shares}


def _dealt(job: Planned, share_engines: bool) -> tuple[list[Resources], list[Resources]]:
    """What is placed once for all trials, and what each of them takes."""
    nbytes = _bytes(job)

    def needs(bundle: Bundle) -> Resources:
        if job.plan.gpu:
            return bundle.resources
        actors = [f"{role} {bundle.index}" for role in (TRAINER, ENGINE)] if bundle.role == BOTH else [str(bundle)]
        return {**bundle.resources, BYTES: sum(nbytes.get(actor, 0) for actor in actors)}

    once = [bundle for bundle in job.plan.bundles if share_engines and bundle.role == ENGINE]
    return [needs(bundle) for bundle in once], [needs(bundle) for bundle in job.plan.bundles if bundle not in once]


class _Room:
    """What is left of a node. A share of a GPU lies on one of them, so they are counted one by one."""

    def __init__(self, node: Node) -> None:
        self.left = {name: n for name, n in node.resources.items() if name != "GPU"}
        self.left[BYTES] = math.inf if node.memory is None else node.memory
        self.gpus = [1.0] * int(node.resources.get("GPU", 0))

    def take(self, needs: Resources) -> bool:
        """Whether there was room; as Ray, shares go where a GPU is begun."""
        asked = needs.get("GPU", 0)
        others = {name: n for name, n in needs.items() if name != "GPU"}
        each = min(1.0, asked)
        gpus = sorted((i for i, left in enumerate(self.gpus) if left + EXACT >= each), key=lambda i: self.gpus[i])
        gpus = gpus[: ceil(asked)]
        if len(gpus) < ceil(asked) or any(self.left.get(name, 0) + EXACT < n for name, n in others.items()):
            return False
        for name, n in others.items():
            self.left[name] -= n
        for i in gpus:
            self.gpus[i] -= each
        return True


def _fitting(trial: Sequence[Resources], nodes: Sequence[Node], most: int, held: Sequence[Resources]) -> int:
    """How many trials of these bundles have room beside each other, and beside what is held; first fit, as plan.first_fit."""
    rooms = [_Room(node) for node in nodes]

    def place(bundles: Sequence[Resources]) -> bool:
        largest_first = sorted(bundles, key=lambda needs: -needs.get("GPU", 0))
        return all(any(room.take(needs) for room in rooms) for needs in largest_first)

    if not place(held):
        return 0
    count = 0
    while count < most and place(trial):
        count += 1
    return count
