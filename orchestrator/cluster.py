"""The only module that starts Ray, placement groups and actors of ours; waits.py waits for their answers.

Ray Train's workers, Ray Data's tasks, Ray Serve's replicas and Ray Tune's trials are started by those libraries, from
dataset_job.py, prepare.py, serve.py and sweep_search.py.

A new kind of actor gets a function here, and its role a word in ROLES of dashboard.py.
"""

import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import device, ranks
from actors.engine import RolloutEngine
from actors.errors import ActorError
from actors.judge import JudgeWorker
from actors.reward_model import RewardModelWorker
from actors.rewards import RewardWorker
from actors.specs import OWN, EngineSpec, JudgeSpec, RankSpec, RewardModelSpec, RewardSpec, TrainerSpec
from actors.trainer import Trainer
from orchestrator import hardware, waits
from orchestrator.dashboard import STARTED_AGAIN
from orchestrator.dataset_plan import DatasetPlan
from orchestrator.environment import actor_environment
from orchestrator.plan import BOTH, ENGINE, TRAINER, Node, Plan

PLACEMENT_TIMEOUT_S = 120  # an autoscaler may have to start a node
START_TIMEOUT_S = 1800  # an engine downloads, loads and compiles its model

_starts: Counter[str] = Counter()  # of actors by name: Ray gives a name away once


@dataclass(frozen=True)
class Connection:
    """The cluster that this driver is connected to."""

    job_id: str  # Ray's, of this driver
    logs: Path  # Ray's folder of logs where the driver runs, which the dashboard shows
    dashboard: str | None  # its address, with http://
    address: str  # for RAY_ADDRESS of another driver

    def __str__(self) -> str:
        return f"{self.dashboard} (its token: ray get-auth-token)" if self.dashboard else "no dashboard"


@dataclass(frozen=True)
class Actors:
    """Handles of the actors of a job, some of which it may share with others."""

    trainers: tuple[Any, ...]  # by rank
    engines: tuple[Any, ...]
    policy: str = OWN  # its name on the engines


def local_nodes() -> list[Node]:
    """This machine as the cluster that a local run would start."""
    resources = {"CPU": float(len(os.sched_getaffinity(0)))}
    if gpus := device.gpu_count():
        resources["GPU"] = float(gpus)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Node(socket.gethostname(), resources, gpu_bytes=device.gpu_bytes(), memory=memory)]


def nodes() -> list[Node]:
    """The nodes of the connected cluster."""
    return [
        Node(
            name=node["NodeManagerHostname"],
            resources=node["Resources"],
            gpu_bytes=hardware.gpu_bytes(node),
            gpu_type=hardware.gpu_type(node),
            memory=int(sum(node["Resources"].get(name, 0) for name in ("memory", "object_store_memory"))) or None,
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


@contextmanager
def connected() -> Iterator[Connection]:
    """Joins the cluster of RAY_ADDRESS, or starts one on this machine, and leaves it at the end.

    Only a cluster that was asked for is joined: Ray itself would attach to any that runs here. A notebook or a script that has
    called ray.init() is connected already, and stays so.
    """
    if ray.is_initialized():
        yield _connection(ray.init(ignore_reinit_error=True, logging_level=logging.ERROR))
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(
            address=address,
            log_to_driver=False,  # actors' output is in the dashboard and in Ray's log folder
            logging_level=logging.ERROR,
            configure_logging=True,
            **(_of_this_machine() if address == "local" else {}),
        )
    except Exception as error:  # Ray raises a bare one when its processes are not up in time
        where = "started on this machine" if address == "local" else f"reached at RAY_ADDRESS={address}"
        raise ActorError(f"Ray could not be {where}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray puts two of its own in its place: one in Python, which exits, and one in front of it, which prints a stack.
        signal.signal(signal.SIGTERM, on_sigterm)
    _starts.clear()
    try:
        yield _connection(context)
    finally:
        ray.shutdown()


def _of_this_machine() -> dict[str, Any]:
    """How Ray is started here. It would count GPUs for which the build of torch that is installed has no use."""
    return {"include_dashboard": True, "dashboard_host": "127.0.0.1", "num_gpus": device.gpu_count()}


def _connection(context: Any) -> Connection:
    logs = Path(context.address_info["session_dir"], "logs")
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
    driver = ray.get_runtime_context()
    return Connection(driver.get_job_id(), logs, dashboard, driver.gcs_address)


@contextmanager
def placed(plan: Plan | DatasetPlan) -> Iterator[Any]:
    """Reserves the plan's bundles as one placement group for as long as the block runs."""
    group = placement_group([dict(bundle.resources) for bundle in plan.bundles], strategy=plan.strategy)
    try:
        if not waits.wait(group.ready(), PLACEMENT_TIMEOUT_S):
            wanted = ", ".join(f"{bundle} {dict(bundle.resources)}" for bundle in plan.bundles)
            raise ActorError(
                f"the cluster did not free its bundles within {PLACEMENT_TIMEOUT_S} s: {wanted}. "
                "Another job may hold them: see the dashboard, or `ray status`"
            )
        yield group
    finally:
        remove_placement_group(group)


def start_actors(
    plan: Plan,
    group: Any,
    trainer: TrainerSpec,
    engine: EngineSpec,
    probe: Sequence[int],
    kv_cache_gib: int | None,
    after: Sequence[Any] = (),
) -> Actors:
    """Starts trainer ranks and engines, each in its bundle, all at once. They may not be ready yet.

    after: actors that must have loaded before a trainer takes memory of a GPU.
    """
    ranks_at = [index for index, bundle in enumerate(plan.bundles) if bundle.role in (TRAINER, BOTH)]
    address = meeting_place(plan, group) if len(ranks_at) > 1 or trainer.sharding else ""
    environment = {"env_vars": actor_environment("trainer", plan, None)}
    trainers = [
        ray.remote(Trainer)
        .options(runtime_env=environment, **_called(waits.rank_name(rank, len(ranks_at))), **_in_bundle(plan, group, index))
        .remote(trainer, RankSpec(rank, len(ranks_at), address), after)
        for rank, index in enumerate(ranks_at)
    ]
    if plan.colocate and plan.gpu:
        # vLLM measures what is free: a model that loads beside it would be taken for its own.
        waits.ask_ranks(trainers, "__ray_ready__", doing="loading its model", timeout_s=START_TIMEOUT_S)
    return Actors(tuple(trainers), tuple(start_engines(plan, group, engine, probe, kv_cache_gib).values()))


def start_engines(
    plan: Plan, group: Any, engine: EngineSpec, probe: Sequence[int] | None, kv_cache_gib: int | None
) -> dict[str, Any]:
    """Starts the plan's engines, each in its bundle, all at once; by their names. They may not be ready yet.

    probe: None for engines that several jobs share.
    """
    environment = {"env_vars": actor_environment("engine", plan, kv_cache_gib)}
    started = {}
    for number, index in enumerate(i for i, bundle in enumerate(plan.bundles) if bundle.role in (ENGINE, BOTH)):
        called = _called(f"engine {number}")
        options = {**called, **_in_bundle(plan, group, index), "runtime_env": environment}
        started[called["name"]] = ray.remote(RolloutEngine).options(**options).remote(engine, probe)
    return started


def namespace() -> str:
    """Where other drivers find the named actors of this one."""
    found: str = ray.get_runtime_context().namespace
    return found


def find(name: str, namespace: str) -> Any:
    """Another driver's actor. Raises ActorError when there is none."""
    try:
        return ray.get_actor(name, namespace)
    except ValueError as error:
        raise ActorError(f"there is no {name} any more: whoever started it has ended, or it died") from error


def start_measuring(
    plan: Plan | DatasetPlan, group: Any, index: int, environment: dict[str, str], cls: type, *args: Any
) -> Any:
    """Starts an actor of actors/measuring.py in one bundle, to have it for itself."""
    options = {**_in_bundle(plan, group, index), "runtime_env": {"env_vars": environment}}
    return ray.remote(cls).options(**options).remote(*args)


def meeting_place(plan: Plan | DatasetPlan, group: Any) -> str:
    """Where the trainer's ranks meet: at the first one's node."""
    options = {**_in_bundle(plan, group, 0), "num_cpus": 0, "num_gpus": 0}
    ref = ray.remote(ranks.meeting_place).options(**options).remote()
    address: str = waits.fetch(ref, "the node of trainer 0", PLACEMENT_TIMEOUT_S)
    return address


def start_reward(
    plan: Plan, group: Any, spec: RewardSpec | RewardModelSpec | JudgeSpec, after: Sequence[Any] = ()
) -> Any:
    """Starts the process of one reward. A reward model on a GPU has its bundle; all else reserves nothing.

    A judge gets its key from the environment of this process. after: as of start_actors, for a reward model.
    """
    environment = {"env_vars": actor_environment("reward", plan, None)}
    options: dict[str, Any] = {"num_cpus": 0, "runtime_env": environment, **_called(f"reward {spec.path}")}
    if isinstance(spec, RewardSpec):
        return ray.remote(RewardWorker).options(**options).remote(spec)
    if isinstance(spec, JudgeSpec):
        key = os.environ.get(spec.api_key_env) if spec.api_key_env else None
        return ray.remote(JudgeWorker).options(**options).remote(spec, key)
    index = plan.reward_bundle(spec.path)
    if index is not None:
        options |= _in_bundle(plan, group, index)
    return ray.remote(RewardModelWorker).options(**options).remote(spec, after)


def _in_bundle(plan: Plan | DatasetPlan, group: Any, index: int) -> dict[str, Any]:
    """Options of an actor that has all of one bundle, or half of one that two share."""
    resources = plan.bundles[index].resources
    share = 0.5 if plan.bundles[index].role == BOTH else 1.0
    return {
        "num_cpus": resources.get("CPU", 0) * share,
        "num_gpus": resources.get("GPU", 0) * share,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
    }


def start_free(cls: type, name: str) -> Any:
    """Starts an actor that reserves nothing."""
    return ray.remote(cls).options(num_cpus=0, **_called(name)).remote()


def _called(name: str) -> dict[str, str]:
    """The option that gives an actor its name in the dashboard, in `eagleray top` and in messages."""
    _starts[name] += 1
    return {"name": name if _starts[name] == 1 else f"{name}{STARTED_AGAIN}{_starts[name]}"}


def keep(value: Any) -> Any:
    """Puts a value into the object store; it lives as long as the driver does."""
    return ray.put(value)


def stop(actor: Any) -> None:
    """Ends an actor's process at once, also one that hangs."""
    ray.kill(actor, no_restart=True)
