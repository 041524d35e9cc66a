"""Whether the memory of a plan's actors suffices, GPU by GPU, or machine by machine where there are none. Pure.

The bundles of a plan say who shares what; memory.py and engine_memory.py say how much each needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.errors import ConfigError
from orchestrator.dataset_plan import DatasetPlan
from orchestrator.engine_memory import EngineMemory, engine_memory, reward_memory
from orchestrator.hardware import GIB
from orchestrator.jobs import local_folder
from orchestrator.memory import BYTES, Memory, resting_memory, source_of, trainer_memory
from orchestrator.model_shape import read_shape
from orchestrator.plan import BOTH, ENGINE, TRAINER, Bundle, Node, Plan
from orchestrator.schema import JobConfig

ASLEEP = "asleep"
STORE_SHARE, STORE_MOST = 0.3, 200 * 10**9  # of a machine's memory, and bytes: what Ray gives its object store by itself


@dataclass(frozen=True)
class Share:
    """What one actor needs of a GPU or a machine."""

    actor: str  # such as trainer 0
    memory: Memory


@dataclass(frozen=True)
class Place:
    """A GPU, or a machine without one, and who is there when it is the fullest."""

    node: int  # index in the plan's nodes
    gpu: int | None  # index on the node; None = the machine's own memory
    shares: tuple[Share, ...]
    capacity: int | None  # bytes; None = not known

    @property
    def total(self) -> int:
        """Bytes that are needed."""
        return sum(share.memory.total for share in self.shares)

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity


@dataclass(frozen=True)
class Fit:
    """The places of a plan, and what is too much for them."""

    places: tuple[Place, ...]
    engine: EngineMemory | None  # of each; None = the job has none
    problems: tuple[str, ...]  # a line each
    notes: tuple[str, ...] = ()  # what could not be counted, or is none of these places' to hold


def fit(config: JobConfig, plan: Plan | DatasetPlan) -> Fit:
    """Bundles that no node holds are left out. Raises ConfigError for a model whose config.json cannot be had."""
    if isinstance(plan, DatasetPlan):
        memory = trainer_memory(config, plan.dtype, len(plan.bundles), gpu=plan.gpu)
        places = _places(plan, {"training": [(Share(str(bundle), memory),) for bundle in plan.bundles]})
        return Fit(places, None, tuple(_too_small(plan.nodes, places)))
    with_engines = [i for i, bundle in enumerate(plan.bundles) if bundle.role in (ENGINE, BOTH)]
    engine = engine_memory(config, plan, _smallest(plan, with_engines))
    rewards, notes = _rewards(config, plan)
    notes += _object_store(config, plan)
    ranks = sum(bundle.role in (TRAINER, BOTH) for bundle in plan.bundles)
    training = trainer_memory(config, plan.dtype, ranks, gpu=plan.gpu)
    resting = resting_memory(config, plan.dtype, ranks, gpu=plan.gpu) if plan.colocate else training
    asleep = Memory(ASLEEP, {"overhead": engine.asleep}) if plan.sleeps and plan.gpu else engine.awake

    def shares(bundle: Bundle, trainer: Memory, sampler: Memory) -> tuple[Share, ...]:
        if bundle.role == "reward":
            memory = rewards[bundle.index]
            return (Share(str(bundle), memory),) if memory else ()
        by_role = {TRAINER: trainer, ENGINE: sampler}
        return tuple(Share(f"{role} {bundle.index}", memory) for role, memory in by_role.items() if bundle.role in (role, BOTH))

    needs = {
        "training": [shares(bundle, training, asleep) for bundle in plan.bundles],
        "sampling": [shares(bundle, resting, engine.awake) for bundle in plan.bundles],
    }
    places = _places(plan, needs)
    problems = [*_too_small(plan.nodes, places), *_no_cache(plan, engine, with_engines)]
    return Fit(places, engine, tuple(problems), tuple(notes))


def warnings(config: JobConfig, plan: Plan | DatasetPlan) -> tuple[str, ...]:
    """What is about to be too large for its GPU, before a job starts; nothing where nobody can say."""
    if not plan.gpu:
        return ()  # a machine without GPUs can swap
    try:
        problems = fit(config, plan).problems
    except Exception:  # it is an estimate, of whatever model: no reason to keep a job from running
        return ()
    remedy = "It may run out of memory; `eagleray plan` names changes with which it would fit"
    return tuple(f"{problem}. {remedy}" for problem in problems)


def _rewards(config: JobConfig, plan: Plan) -> tuple[list[Memory | None], list[str]]:
    """Of each reward model, and what to say of those that are not there yet."""
    found: list[Memory | None] = []
    notes = []
    for name in plan.reward_models:
        try:
            folder = str(local_folder(config, name) or name)
            found.append(reward_memory(folder, plan.dtype, config.trust_remote_code, gpu=plan.gpu))
        except ConfigError:
            found.append(None)
            notes.append(f"reward model {name}: there is no config.json of a whole model, so its memory is not in this")
    return found, notes


def _object_store(config: JobConfig, plan: Plan) -> Iterator[str]:
    """Whole policies pass through it: on each node with engines lie those that are served, and the one that comes."""
    if config.adapter is not None:
        return
    policies = 2 + config.ray.max_staleness
    needed = policies * read_shape(source_of(config), None).weights * BYTES[plan.dtype]
    placed = zip(plan.bundles, plan.placement, strict=True)
    for node in (plan.nodes[index] for bundle, index in placed if index is not None and bundle.role in (ENGINE, BOTH)):
        given = min(STORE_MOST, STORE_SHARE * node.memory if node.memory else STORE_MOST)
        if needed > given:
            yield (
                f"all weights go through Ray's object store, which holds {policies} policies, {gb(needed)}, on {node.name}, "
                f"and has {gb(round(given))} unless its Ray is started with a larger one (ray start --object-store-memory)"
            )
            return


def _places(plan: Plan | DatasetPlan, needs: Mapping[str, Sequence[tuple[Share, ...]]]) -> tuple[Place, ...]:
    """needs: by phase, of each bundle; a place counts in the phase in which it is the fullest."""
    held: dict[tuple[int, int | None], list[int]] = {}
    for index, (node, gpus) in enumerate(zip(plan.placement, gpus_of(plan), strict=True)):
        if node is not None:
            for gpu in gpus if plan.gpu else (None,):
                held.setdefault((node, gpu), []).append(index)
    places = []
    for (node, gpu), bundles in sorted(held.items(), key=lambda item: (item[0][0], item[0][1] or 0)):
        capacity = plan.nodes[node].memory if gpu is None else plan.nodes[node].gpu_bytes
        phases = [tuple(share for index in bundles for share in of_phase[index]) for of_phase in needs.values()]
        places.append(max((Place(node, gpu, shares, capacity) for shares in phases), key=lambda place: place.total))
    return tuple(places)


def gpus_of(plan: Plan | DatasetPlan) -> list[tuple[int, ...]]:
    """For each bundle the GPUs of its node that it has: whole ones, or a share of the fullest that has room, as Ray does."""
    free = [[1.0] * int(node.resources.get("GPU", 0)) for node in plan.nodes]
    found: dict[int, tuple[int, ...]] = {}
    for index in sorted(range(len(plan.bundles)), key=lambda i: (-plan.bundles[i].resources.get("GPU", 0), i)):
        node, asked = plan.placement[index], plan.bundles[index].resources.get("GPU", 0)
        of_node = free[node] if node is not None else []
        each = min(1.0, asked)
        fitting = sorted((g for g, left in enumerate(of_node) if left >= each > 0), key=lambda g: (of_node[g], g))
        found[index] = tuple(fitting[: max(1, int(asked))])
        for gpu in found[index]:
            of_node[gpu] -= each
    return [found[index] for index in range(len(plan.bundles))]


def _smallest(plan: Plan, bundles: Sequence[int]) -> int | None:
    """Memory of the smallest GPU, or machine, that holds one of these bundles."""
    nodes = [plan.nodes[node] for i in bundles if (node := plan.placement[i]) is not None]
    sizes = [node.gpu_bytes if plan.gpu else node.memory for node in nodes]
    return min((size for size in sizes if size is not None), default=None)


def _too_small(nodes: Sequence[Node], places: Sequence[Place]) -> Iterator[str]:
    """A line for each kind of place that is too small, however many are alike."""
    alike: dict[tuple[object, ...], list[Place]] = {}
    for place in places:
        if not place.fits:
            roles = tuple((share.actor.rsplit(" ", 1)[0], share.memory.total) for share in place.shares)
            alike.setdefault((roles, place.capacity), []).append(place)
    for same in alike.values():
        first = same[0]
        who = " and ".join(share.actor for share in first.shares)
        verb = "need" if len(first.shares) > 1 else "needs"
        more = f" (and {len(same) - 1} more like it)" if len(same) > 1 else ""
        assert first.capacity is not None
        parts = "; ".join(_told(share, alone=len(first.shares) == 1) for share in first.shares)
        yield f"{who} {verb} {gb(first.total)} of {named(nodes, first)}{more}, which has {gb(first.capacity)}: {parts}"


def _told(share: Share, *, alone: bool) -> str:
    """What fills it, from 0.1 GB on. alone: there is no other, whose name would have to tell them apart."""
    terms = ", ".join(f"{name} {gb(nbytes)}" for name, nbytes in share.memory.terms.items() if nbytes >= GIB // 20)
    return f"{'' if alone else f'{share.actor} '}({share.memory.moment}) {terms}"


def _no_cache(plan: Plan, engine: EngineMemory, bundles: Sequence[int]) -> Iterator[str]:
    if engine.kv_tokens >= plan.max_model_len or all(plan.placement[i] is None for i in bundles):
        return
    weights = engine.awake.terms["weights"]
    key = "vllm.gpu_memory_utilization" if plan.gpu else "ray.kv_cache_gib"
    yield (
        f"each engine has {gb(engine.awake.total)} of a GPU ({key}) and weights of {gb(weights)}, so its KV cache holds "
        f"{engine.kv_tokens} tokens; one sequence may have {plan.max_model_len} (vllm.max_model_len or sequence_len)"
    )


def named(nodes: Sequence[Node], place: Place) -> str:
    """A place for a person."""
    name = nodes[place.node].name
    return f"the memory of {name}" if place.gpu is None else f"GPU {place.gpu} of {name}"


def gb(nbytes: float) -> str:
    """GiB for a person, who calls them GB as the makers of GPUs do."""
    return f"{nbytes / GIB:.1f} GB"
