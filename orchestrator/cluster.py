"""The only module that starts Ray, placement groups and actors of ours, and that waits for their answers.

Ray Train's workers, Ray Data's tasks and Ray Serve's replicas are started by those libraries, from dataset_job.py, prepare.py
and serve.py.

Every wait has a limit and turns what Ray raises into a message for a person, which begins with the actor's name. A new kind
of actor gets a function here, and its role a word in ROLES of dashboard.py.
"""

import logging
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors import device, errors, ranks
from actors.engine import RolloutEngine
from actors.errors import ActorError, EaglerayError
from actors.judge import JudgeWorker
from actors.reward_model import RewardModelWorker
from actors.rewards import RewardWorker
from actors.specs import EngineSpec, JudgeSpec, RankSpec, RewardModelSpec, RewardSpec, TrainerSpec
from actors.trainer import Trainer
from orchestrator import hardware
from orchestrator.causes import GUESSES
from orchestrator.dashboard import STARTED_AGAIN
from orchestrator.dataset_plan import DatasetPlan
from orchestrator.environment import actor_environment
from orchestrator.plan import BOTH, ENGINE, TRAINER, Node, Plan

PLACEMENT_TIMEOUT_S = 120  # an autoscaler may have to start a node
START_TIMEOUT_S = 1800  # an engine downloads, loads and compiles its model


AFTER_FAILURE_S = 5  # in which the other ranks of a trainer may say what happened
NO_ANSWER = "{who} did not answer within {timeout_s:g} s; its stack is in the dashboard under Actors"
POLL_S = 0.5  # how often a wait looks for Ctrl-C


class Interrupted(BaseException):
    """The job was asked to end: Ctrl-C, or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


_signals: list[int] = []  # received and not yet acted on
_starts: Counter[str] = Counter()  # of actors by name: Ray gives a name away once


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM make the next wait raise Interrupted; a second one ends the process.

    An exception raised by the handler itself could surface inside Ray's own code, which turns it into another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def remember(signum: int, frame: Any) -> None:
        _signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    _signals.clear()
    before = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Meanwhile(Protocol):
    """Work that goes on while the driver waits for something else."""

    def refs(self) -> list[Any]:
        """What it waits for."""

    def look(self) -> bool:
        """Acts on those that have ended."""


def wait(ref: Any, timeout_s: float, meanwhile: Meanwhile | None = None) -> bool:
    """Whether the value behind a ref is there within the limit. Raises Interrupted, and as `meanwhile` does."""
    deadline = time.monotonic() + timeout_s
    while not ended([ref]):
        if time.monotonic() > deadline:
            return False
        wait_any([ref, *(meanwhile.refs() if meanwhile else [])], max(0.0, deadline - time.monotonic()))
        if meanwhile:
            meanwhile.look()
    return True


def ended(refs: Sequence[Any]) -> list[Any]:
    """Those of the refs behind which there is a value, or a failure, now."""
    return list(ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0]) if refs else []


def wait_any(refs: Sequence[Any], timeout_s: float = POLL_S) -> None:
    """Returns when one of the refs has a value, and after POLL_S at the latest. Raises Interrupted."""
    if _signals:
        raise Interrupted(_signals.pop())
    ray.wait(list(refs), num_returns=1, timeout=min(POLL_S, timeout_s), fetch_local=False)


@dataclass(frozen=True)
class Connection:
    """The cluster that this driver is connected to."""

    job_id: str  # Ray's, of this driver
    node_id: str  # where the driver runs
    logs: Path  # Ray's folder of logs there, which the dashboard shows
    dashboard: str | None  # its address, with http://

    def __str__(self) -> str:
        return f"{self.dashboard} (its token: ray get-auth-token)" if self.dashboard else "no dashboard"


@dataclass(frozen=True)
class Actors:
    """Handles of everything that a plan placed."""

    trainers: tuple[Any, ...]  # by rank
    engines: tuple[Any, ...]


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
    """Joins the cluster of RAY_ADDRESS, or starts one on this machine.

    Only a cluster that was asked for is joined: Ray itself would attach to any that runs here.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        context = ray.init(
            address=address,
            log_to_driver=False,  # actors' output is in the dashboard and in Ray's log folder
            logging_level=logging.ERROR,
            configure_logging=True,
            **({"include_dashboard": True, "dashboard_host": "127.0.0.1"} if address == "local" else {}),
        )
    except Exception as error:  # Ray raises a bare one when its processes are not up in time
        where = "started on this machine" if address == "local" else f"reached at RAY_ADDRESS={address}"
        raise ActorError(f"Ray could not be {where}: {error}") from error
    if threading.current_thread() is threading.main_thread():
        # Ray puts two of its own in its place: one in Python, which exits, and one in front of it, which prints a stack.
        signal.signal(signal.SIGTERM, on_sigterm)
    _starts.clear()
    here = ray.get_runtime_context()
    logs = Path(context.address_info["session_dir"], "logs")
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else None
    try:
        yield Connection(here.get_job_id(), here.get_node_id(), logs, dashboard)
    finally:
        ray.shutdown()


@contextmanager
def placed(plan: Plan | DatasetPlan) -> Iterator[Any]:
    """Reserves the plan's bundles as one placement group for as long as the block runs."""
    group = placement_group([dict(bundle.resources) for bundle in plan.bundles], strategy=plan.strategy)
    try:
        if not wait(group.ready(), PLACEMENT_TIMEOUT_S):
            wanted = ", ".join(f"{bundle} {dict(bundle.resources)}" for bundle in plan.bundles)
            raise ActorError(
                f"the cluster did not free its bundles within {PLACEMENT_TIMEOUT_S} s: {wanted}. "
                "Another job may hold them: see the dashboard, or `ray status`"
            )
        yield group
    finally:
        remove_placement_group(group)


def start_actors(
    plan: Plan, group: Any, trainer: TrainerSpec, engine: EngineSpec, probe: Sequence[int], kv_cache_gib: int | None
) -> Actors:
    """Starts trainer ranks and engines, each in its bundle, all at once. They may not be ready yet."""
    ranks_at = [index for index, bundle in enumerate(plan.bundles) if bundle.role in (TRAINER, BOTH)]
    address = meeting_place(plan, group) if len(ranks_at) > 1 or trainer.sharding else ""
    environment = {"env_vars": actor_environment("trainer", plan, None)}
    trainers = [
        ray.remote(Trainer)
        .options(runtime_env=environment, **_called(_rank(rank, len(ranks_at))), **_in_bundle(plan, group, index))
        .remote(trainer, RankSpec(rank, len(ranks_at), address))
        for rank, index in enumerate(ranks_at)
    ]
    if plan.colocate and plan.gpu:
        # vLLM measures what is free: a model that loads beside it would be taken for its own.
        ask_ranks(trainers, "__ray_ready__", doing="loading its model", timeout_s=START_TIMEOUT_S)
    return Actors(tuple(trainers), start_engines(plan, group, engine, probe, kv_cache_gib))


def start_engines(
    plan: Plan, group: Any, engine: EngineSpec, probe: Sequence[int], kv_cache_gib: int | None
) -> tuple[Any, ...]:
    """Starts the plan's engines, each in its bundle, all at once. They may not be ready yet."""
    environment = {"env_vars": actor_environment("engine", plan, kv_cache_gib)}
    return tuple(
        ray.remote(RolloutEngine)
        .options(runtime_env=environment, **_called(f"engine {number}"), **_in_bundle(plan, group, index))
        .remote(engine, probe)
        for number, index in enumerate(i for i, bundle in enumerate(plan.bundles) if bundle.role in (ENGINE, BOTH))
    )


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
    address: str = fetch(ref, "the node of trainer 0", PLACEMENT_TIMEOUT_S)
    return address


def start_reward(plan: Plan, group: Any, spec: RewardSpec | RewardModelSpec | JudgeSpec) -> Any:
    """Starts the process of one reward. A reward model on a GPU has its bundle; all else reserves nothing.

    A judge gets its key from the environment of this process.
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
    return ray.remote(RewardModelWorker).options(**options).remote(spec)


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


def pause(seconds: float) -> None:
    """Sleeps, unless the job is asked to end: raises Interrupted then."""
    if _signals:
        raise Interrupted(_signals.pop())
    time.sleep(seconds)


def told(error: BaseException) -> str:
    """What an exception of Ray's says, for a person: its last line, and the end of its traceback."""
    text = str(error) or type(error).__name__
    return f"{_last_line(text)}\n{_tail(text)}"


def keep(value: Any) -> Any:
    """Puts a value into the object store; it lives as long as the driver does."""
    return ray.put(value)


def stop(actor: Any) -> None:
    """Ends an actor's process at once, also one that hangs."""
    ray.kill(actor, no_restart=True)


def fetch(ref: Any, who: str, timeout_s: float) -> Any:
    """The value behind a ref. Raises EaglerayError: an actor's own as it was, ActorError for all else that can happen.

    Raises Interrupted when the job is asked to end meanwhile.
    """
    if not wait(ref, timeout_s):
        raise ActorError(NO_ANSWER.format(who=who, timeout_s=timeout_s))
    try:
        return ray.get(ref)
    except RayError as error:
        if own := _own(error):
            raise own from error
        if isinstance(error, RayTaskError):
            text = f"{who} failed: {type(error.cause).__name__}: {error.cause}\n{_tail(str(error))}"
        elif isinstance(error, RayActorError):
            text = f"{who} died: {GUESSES.sub('', _last_line(str(error))).strip()}"
        else:
            text = f"{who} is lost: {type(error).__name__}: {_last_line(str(error))}"
        raise ActorError(text) from error


def ask_ranks(trainers: Sequence[Any], method: str, *args: Any, doing: str, timeout_s: float) -> Any:
    """Calls a method of every rank, each with the same arguments; returns rank 0's answer. Raises as `fetch` does."""
    return fetch_ranks([getattr(trainer, method).remote(*args) for trainer in trainers], doing, timeout_s)


def fetch_ranks(refs: Sequence[Any], doing: str, timeout_s: float, meanwhile: Meanwhile | None = None) -> Any:
    """Rank 0's answer, when every rank has one. Raises as `fetch` and `meanwhile` do.

    One rank's end makes the others fail in their collectives, so after the first failure the others get a moment, and
    what a rank said for people, or that one died, is told rather than that one lost its peer.
    """
    deadline = time.monotonic() + timeout_s
    waiting = {ref: _rank(rank, len(refs)) for rank, ref in enumerate(refs)}
    failures: list[EaglerayError] = []
    while waiting:
        wait_any([*waiting, *(meanwhile.refs() if meanwhile else [])])
        if meanwhile:
            meanwhile.look()
        done = ended(list(waiting))
        late = time.monotonic() > deadline
        for ref in list(waiting) if late else done:
            who = f"{'the ' if len(refs) == 1 else ''}{waiting.pop(ref)}, {doing}"
            if ref not in done:
                failures.append(ActorError(NO_ANSWER.format(who=who, timeout_s=timeout_s)))
                continue
            try:
                fetch(ref, who, timeout_s)
            except EaglerayError as error:
                failures.append(error)
                deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
    if failures:
        own = (error for error in failures if type(error) is not ActorError)
        died = (error for error in failures if " died: " in str(error))
        raise next(own, None) or next(died, failures[0])
    return ray.get(refs[0])


def _rank(rank: int, world: int) -> str:
    return f"trainer {rank}" if world > 1 else "trainer"


def fetch_each(refs: Any, who: str, timeout_s: float) -> Iterator[Any]:
    """The values that a generator in a task yields, as they come; timeout_s is for each. Raises as `fetch` does."""
    while True:
        if not wait(refs, timeout_s):
            raise ActorError(f"{who} did not answer within {timeout_s:g} s; its stack is in the dashboard under Jobs")
        try:
            ref = next(refs)
        except StopIteration:
            return
        yield fetch(ref, who, timeout_s)


def _own(error: RayError) -> EaglerayError | None:
    """The message for a person behind what Ray raised, if the actor raised one, in a method or in its constructor."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, EaglerayError):
        return error.cause
    # Of a constructor's exception Ray keeps the traceback's text alone; ours come last in it.
    found = list(re.finditer(r"^actors\.errors\.(\w+): ", str(error), re.MULTILINE))
    if isinstance(error, RayActorError) and found:
        own: EaglerayError = getattr(errors, found[-1][1])(str(error)[found[-1].end() :].strip())
        return own
    return None


def _last_line(text: str) -> str:
    """Where a traceback says what happened: its last exception, which may take a few lines."""
    lines = text.strip().splitlines()
    begins = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    said = lines[begins[-1] :] if begins else lines[-1:]
    return " ".join(line.strip() for line in said[:4])


def _tail(text: str, count: int = 8) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-count:])
