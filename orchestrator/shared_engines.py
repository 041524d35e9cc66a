"""Engines that several jobs on one base model share: their start, and how a job finds them.

Each job has a policy of its own name on every engine, in a LoRA slot. Which group is sampled next is the engines' own affair
(actors/turns.py), and so is who waits for a slot.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from actors import device
from actors.errors import ActorError, ConfigError, EaglerayError
from actors.specs import EngineSpec, LoraSpec
from orchestrator import cluster, waits
from orchestrator.jobs import lora_spec
from orchestrator.online_specs import engine_spec
from orchestrator.plan import ENGINE, MAX_NUM_SEQS, Node, Plan, colocated, ensure_placeable, first_fit, make_plan
from orchestrator.schema import JobConfig

ENGINES = ("engines", "engine_gpus", "engine_cpus", "kv_cache_gib")  # keys of `ray:` that say which there are
KINDS = (Node("CPUs", {"CPU": 1.0}), Node("a GPU", {"CPU": 1.0, "GPU": 1.0}))  # on which an engine may be another one


@dataclass(frozen=True)
class SharedEngines:
    """Where they are, and what a job's policy is called on them, in plain values."""

    namespace: str
    names: tuple[str, ...]
    policy: str = ""

    def of(self, policy: str) -> "SharedEngines":
        """As one job has them."""
        return replace(self, policy=policy)

    def actors(self) -> tuple[Any, ...]:
        """Raises ActorError when one is not there any more."""
        return tuple(cluster.find(name, self.namespace) for name in self.names)

    def wait(self, timeout_s: float) -> None:
        """Until all of them have loaded. Raises ActorError when one has ended, or has not loaded in time."""
        for name, actor in zip(self.names, self.actors(), strict=True):
            waits.fetch(actor.ready.remote(), f"{name}, loading its model", timeout_s)

    def open(self, lora: LoraSpec, probe: Sequence[int], timeout_s: float) -> tuple[Any, ...]:
        """The engines, once each has a place for the policy. Raises ActorError when one has ended, or has no place in time."""
        actors = self.actors()
        opened = [actor.open.remote(self.policy, lora, probe) for actor in actors]
        for name, ref in zip(self.names, opened, strict=True):
            waits.fetch(ref, f"{name}, making room for {self.policy}", timeout_s)
        return actors

    def close(self) -> None:
        """Frees the places of the policy, without waiting for it: its job has ended, in whatever way."""
        with suppress(ActorError):  # engines that are gone hold nothing
            for actor in self.actors():
                actor.close.remote(self.policy)

    def record(self) -> dict[str, Any]:
        """For JSON; `from_record` reads it."""
        return asdict(self)

    @staticmethod
    def from_record(record: Mapping[str, Any]) -> "SharedEngines":
        return SharedEngines(record["namespace"], tuple(record["names"]), record["policy"])


@dataclass
class Loading:
    """Engines that load their model, while the jobs that will use them start."""

    refs: dict[str, Any]  # of what `ready` gives, by their names; those that are ready are taken out
    until: float  # on the monotonic clock

    def failure(self) -> str:
        """Why one of them could not load, in time; empty as long as none has failed."""
        for name in [name for name, ref in self.refs.items() if waits.ended([ref])]:
            try:
                waits.fetch(self.refs.pop(name), f"{name}, loading its model", 0.0)
            except EaglerayError as error:
                return str(error)
        if self.refs and time.monotonic() > self.until:
            who = f"{next(iter(self.refs))}, loading its model"
            return waits.NO_ANSWER.format(who=who, timeout_s=cluster.START_TIMEOUT_S)
        return ""


def unshareable(config: JobConfig, others: Sequence[JobConfig]) -> str | None:
    """Why engines of this job cannot serve the others too; None = they can. others: what its trials may look like."""
    if any(job.rl != "grpo" or job.adapter != "lora" or job.load_in_8bit for job in (config, *others)):
        return "only jobs of rl: grpo with adapter: lora on a base that is not quantized can share engines; leave it out"
    if any("lm_head" in (job.lora_target_modules or ()) for job in (config, *others)):
        return "vLLM cannot prove a policy beside others with LoRA on lm_head; train other modules, or leave it out"
    if any(map(colocated, (config, *others))):
        return "with trl.vllm_mode: colocate every rank has an engine of its own; use server, or leave it out"
    for other in others:
        if any(getattr(other.ray, key) != getattr(config.ray, key) for key in ENGINES):
            return f"engines that trials share are the base's; take ray.{', ray.'.join(ENGINES)} out of the space"
    if any(job.ray.sync == "fused" for job in (config, *others)):
        return "each policy has LoRA slots on engines that trials share (ray.sync: adapter); leave ray.sync out"
    if different := {name for other in others for node in KINDS for name in _differences(config, other, node)}:
        return (
            f"trials that share engines cannot differ in what these are made of: {', '.join(sorted(different))}; take the keys "
            "behind it out of the space, or leave it out"
        )
    return None


def _differences(one: JobConfig, other: JobConfig, node: Node) -> list[str]:
    """Fields in which the engines of two jobs differ on a kind of node; none where one of the jobs cannot run there."""
    try:
        specs = [_shared_spec(job, _plan(job, [node])) for job in (one, other)]
    except ConfigError:
        return []
    return [field.name for field in fields(EngineSpec) if getattr(specs[0], field.name) != getattr(specs[1], field.name)]


@contextmanager
def started(config: JobConfig, others: Sequence[JobConfig], places: int) -> Iterator[tuple[SharedEngines, Loading]]:
    """Starts the engines of a job on the connected cluster, for so many jobs at once, and ends them with the block.

    others: what these jobs may look like. They are placed when the block begins, and may still load: whoever opens a policy
    waits for them. Raises ConfigError when the cluster cannot hold the engines.
    """
    plan = engines_plan(config, cluster.nodes())
    ensure_placeable(plan.problems)
    spec = replace(
        _shared_spec(config, plan),
        lora=_widest([lora_spec(job) for job in (config, *others)]),
        policies=places,
        max_num_seqs=min(places * plan.max_num_seqs, MAX_NUM_SEQS),
        seed=config.seed,
    )
    with cluster.placed(plan) as group:
        actors = cluster.start_engines(plan, group, spec, None, config.ray.kv_cache_gib)
        ready = {name: actor.ready.remote() for name, actor in actors.items()}
        loading = Loading(ready, until=time.monotonic() + cluster.START_TIMEOUT_S)
        yield SharedEngines(cluster.namespace(), tuple(actors)), loading


def _widest(loras: Sequence[LoraSpec]) -> LoraSpec:
    """What has room for each of these: the highest rank, and all modules that one of them is on."""
    named = [lora.target_modules for lora in loras]
    modules = {name for names in named if not isinstance(names, str) for name in names}
    everywhere = any(isinstance(names, str) for names in named)  # all-linear, or a pattern
    return LoraSpec(max(lora.r for lora in loras), 1, target_modules="all-linear" if everywhere else tuple(sorted(modules)))


def engines_plan(config: JobConfig, nodes: Sequence[Node]) -> Plan:
    """The plan of a job's engines alone."""
    engines = tuple(bundle for bundle in _plan(config, nodes).bundles if bundle.role == ENGINE)
    return replace(_plan(config, nodes, shared=True), bundles=engines, placement=first_fit(engines, nodes))


def _plan(config: JobConfig, nodes: Sequence[Node], *, shared: bool = False) -> Plan:
    return make_plan(config, nodes, 1, device.fastest_dtype(gpu=False), shared=shared)


def _shared_spec(config: JobConfig, plan: Plan) -> EngineSpec:
    """Without what is each job's own."""
    return replace(engine_spec(config, plan), sync="adapter", lora=None, max_num_seqs=0, seed=0)
