"""What the driver's own work costs as engines are added: steps of the real loop whose actors do nothing.

Ours: a step as a job takes it, `Loop.advance` with its rollouts, proofs, scoring, record, journal and display. Bare: the
same calls of the same actors with the same arguments, phase by phase, each phase one `ray.get`. Both pay for Ray's calls and
for the processes that answer; what ours has on top is the driver's. Placement, actors and their start are a job's too, on
nodes and GPUs that are only said: up to REAL engines have a process each. Beyond, each process stands for several
engines: the driver keeps its books on every one of them, but has fewer connections, and such rows say so. What is for 1,000
engines without a measurement is a line through the measured sizes, and says so.

With a pause, groups end one by one, as those of engines that do work: then the driver looks up for each.
"""

import itertools
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, linear_regression, median
from typing import Any
from unittest import mock

import psutil
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from actors.errors import ActorError
from actors.specs import OWN, RewardSpec, SamplingSpec
from orchestrator import cluster, online_specs, waits
from orchestrator.cluster import Actors
from orchestrator.data import PromptSet
from orchestrator.data import Row as Prompt
from orchestrator.display import Display
from orchestrator.grpo import MAX_SEED, Loop
from orchestrator.jobs import metrics_log
from orchestrator.metrics import MetricsLog
from orchestrator.plan import Node, make_plan
from orchestrator.policies import Policies
from orchestrator.schema import JobConfig
from orchestrator.scoring import Scorer
from orchestrator.watch import watched
from tests.benchmarks import common
from tests.benchmarks.idle import PAUSE, TOKENS, IdleEngine, IdleTrainer
from tests.benchmarks.results import Row

REAL = 64  # engines with a process each; 250 would fill 24 GB
SIZES = (1, 4, 16, 64)
SHARED = 1000  # engines that share REAL processes
PAUSE_S = 3.0  # in which a paused engine's groups end
MOST_PAIRS = 2  # of steps that take many seconds
PROMPTS = 4  # of an engine, a step
COMPLETIONS = 8  # of a prompt
NODE_GPUS = 8
TIMEOUT_S = 120.0
REWARD = "tests.benchmarks.idle.first_is_right"
PEER = "ray.get of the same calls"


def run(pairs: int) -> list[Row]:
    rows = [*_planning(pairs)]
    killed_at = None
    display = Display(Console(file=open(os.devnull, "w", encoding="utf-8")))  # noqa: SIM115 - as long as the process
    with tempfile.TemporaryDirectory(prefix="er", dir="/tmp") as folder, _fake_nodes(folder):
        config = _config(REAL, Path(folder) / "out")
        Path(config.output_dir).mkdir()
        try:
            with watched(config, display) as watch, cluster.connected() as here:
                watch.begin(here)
                with watch.looking(), _started(config, display, rows) as job:
                    rows += job.measured(pairs)
                    killed_at = time.perf_counter()
                    job.lose_an_engine()
        except ActorError as error:
            if killed_at is None:
                raise
            print(error, *error.__notes__, sep="\n", flush=True)
            rows.append(Row(f"an engine of {REAL} dies: until the message", "", (time.perf_counter() - killed_at,)))
    return rows


def _planning(pairs: int) -> Iterator[Row]:
    """On machines that are only said: 24 ranks with a GPU each, 976 engines that share a GPU with another."""
    nodes = [Node(f"n{i}", {"CPU": 128.0, "GPU": 8.0}, gpu_bytes=80 * 2**30) for i in range(64)]
    config = _config(976, Path("out"))
    config.ray_num_workers, config.ray.engine_gpus = 24, 0.5
    for what, there in (("", nodes), (", a node too few", nodes[1:])):
        plan = common.wall(partial(_planned, config, there))
        yield Row(f"plan of 1,000 bundles on {len(there)} nodes x 8 GPUs{what}", "", tuple(plan() for _ in range(pairs)))


def _planned(config: JobConfig, nodes: Sequence[Node]) -> list[str]:
    return make_plan(config, nodes, rows=10_000).problems


def _config(engines: int, output_dir: Path) -> JobConfig:
    config = JobConfig(rl="grpo", base_model="idle", learning_rate=1e-6, max_steps=100_000, output_dir=str(output_dir))
    config.micro_batch_size = engines * PROMPTS * COMPLETIONS
    config.trl.num_generations = COMPLETIONS
    config.trl.reward_funcs = [REWARD]
    config.ray.engines = engines
    return config


@contextmanager
def _fake_nodes(folder: str) -> Iterator[None]:
    """A cluster of processes of this machine: a head with the trainer's GPU, and nodes with NODE_GPUS each."""
    started = {"PYTHONPATH": common.ENVIRONMENT["PYTHONPATH"]}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dashboard = {"include_dashboard": True, "dashboard_port": free.getsockname()[1]}
    head = {"num_cpus": 1, "num_gpus": 1, "temp_dir": folder, **dashboard}
    no_prestart = {"prestart_worker_first_driver": False, "enable_worker_prestart": False}  # one a CPU, and none is used
    with mock.patch.dict(os.environ, started):
        nodes = Cluster(initialize_head=True, head_node_args={**head, "_system_config": no_prestart})
        try:
            for _ in range(REAL // NODE_GPUS):
                nodes.add_node(num_cpus=NODE_GPUS, num_gpus=NODE_GPUS, object_store_memory=200 * 2**20)
            with mock.patch.dict(os.environ, RAY_ADDRESS=nodes.address):
                yield
        finally:
            nodes.shutdown()


@contextmanager
def _started(config: JobConfig, display: Display, rows: list[Row]) -> Iterator["_Job"]:
    """A job's actors where its plan places them; what that took goes to `rows`."""
    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    plan = make_plan(config, cluster.nodes(), rows=len(_prompts(REAL).train))
    with cluster.placed(plan) as group, mock.patch.multiple(cluster, Trainer=IdleTrainer, RolloutEngine=IdleEngine):
        placed_s = time.perf_counter() - began
        specs = online_specs.trainer_spec(config, plan), online_specs.engine_spec(config, plan)
        actors = cluster.start_actors(plan, group, *specs, probe=(), kv_cache_gib=None)
        scorer = Scorer(plan, group, [RewardSpec(REWARD, ())], TIMEOUT_S)
        scorer.wait_ready()
        for index, engine in enumerate(actors.engines):
            waits.fetch(engine.ready.remote(), f"engine {index}, starting", cluster.START_TIMEOUT_S)
        rows.append(Row(f"{len(plan.bundles)} bundles placed by Ray on {len(plan.nodes)} nodes", "", (placed_s,)))
        rows.append(Row(f"{REAL} engines from plan to ready", "", (time.perf_counter() - began,)))
        with metrics_log(config, 0, display) as log:
            yield _Job(Path(config.output_dir), actors, scorer, display, log, before)


def _prompts(engines: int) -> PromptSet:
    return PromptSet(tuple(Prompt(f"prompt {i}", {}, "") for i in range(engines * PROMPTS)), (), ())


@dataclass
class _Job:
    """Running actors, and steps over as many engines as one likes."""

    output_dir: Path
    actors: Actors
    scorer: Scorer
    display: Display
    log: MetricsLog
    memory_before: int  # bytes of the driver, before there was an actor

    def measured(self, pairs: int) -> list[Row]:
        rows = []
        sizes = {engines: self._compared(engines, pairs) for engines in SIZES}
        rows += [Row(f"step, {_engines(n)}", PEER, ours.wall_s, bare.wall_s, "cost", 1.5) for n, (ours, bare) in sizes.items()]
        rows += _extrapolated(sizes)
        memory = [self._memory(f"driver after {REAL} engines")]
        ours, bare = self._compared(SHARED, min(pairs, MOST_PAIRS))
        rows.append(Row(f"step, {_engines(SHARED)}", PEER, ours.wall_s, bare.wall_s, "cost", 1.5))
        rows.append(Row(f"driver's CPU in it, {SHARED} engines", PEER, ours.cpu_s, bare.cpu_s, "cost"))
        memory.append(self._memory(f"driver after {SHARED} engines"))
        ours, bare = self._compared(REAL, min(pairs, MOST_PAIRS), {PAUSE: PAUSE_S})
        what = f"driver's CPU, {_engines(REAL)} whose groups end one by one within {PAUSE_S:g} s"
        rows.append(Row(what, PEER, ours.cpu_s, bare.cpu_s, "cost"))
        return [*rows, *memory, Row("process of an idle engine", "", (_engine_mib(),), unit="MiB")]

    def lose_an_engine(self) -> None:
        """Raises what a job does."""
        loop = self._loop(REAL)
        self.actors.engines[-1].end.remote()
        while True:
            self._step(loop)

    def _compared(self, engines: int, pairs: int, extra: dict[str, float] | None = None) -> tuple["_Timed", "_Timed"]:
        loop = self._loop(engines, extra or {})
        ours, bare = _Timed(partial(self._step, loop)), _Timed(_Bare(loop))
        common.in_turn(pairs, ours, bare)
        print(f"{engines} engines: {ours.said}; {PEER}: {bare.said} ({bare.call.said})", flush=True)
        return ours, bare

    def _loop(self, engines: int, extra: dict[str, float] | None = None) -> Loop:
        """A job's loop before its first step."""
        config = _config(engines, self.output_dir)
        config.trl.generation_kwargs = extra
        processes = self.actors.engines
        actors = Actors(self.actors.trainers, tuple(processes[i % len(processes)] for i in range(engines)))
        waits.ask_ranks(actors.trainers, "set_probe", (), doing="starting", timeout_s=TIMEOUT_S)
        prompts = _prompts(engines)
        plan = make_plan(config, cluster.nodes(), rows=len(prompts.train))
        policies = Policies(actors, plan.dtype, TIMEOUT_S)
        loop = Loop(config, plan, prompts, actors, policies, self.scorer, self.display.warn)
        loop.start()
        return loop

    def _step(self, loop: Loop) -> None:
        with self.display.phase(f"step {loop.step + 1}"):
            record = loop.advance()
        self.log.write("train", record)
        self.display.step(record, loop.plan.total_steps)

    def _memory(self, what: str) -> Row:
        grown = psutil.Process().memory_info().rss - self.memory_before
        return Row(f"{what}, more than without", "", (grown / 2**20,), unit="MiB")


class _Timed:
    """A side of `in_turn` that keeps its seconds, by the wall and of the driver's CPU."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.timings: list[tuple[float, float]] = []

    def __call__(self) -> float:
        cpu, began = time.process_time(), time.perf_counter()
        self.call()
        self.timings.append((time.perf_counter() - began, time.process_time() - cpu))
        return self.timings[-1][0]

    @property
    def wall_s(self) -> tuple[float, ...]:
        """After the warm-up."""
        return tuple(wall for wall, _ in self.timings[1:])

    @property
    def cpu_s(self) -> tuple[float, ...]:
        """After the warm-up."""
        return tuple(cpu for _, cpu in self.timings[1:])

    @property
    def said(self) -> str:
        return f"{median(self.wall_s):.3f} s, {median(self.cpu_s):.3f} s of CPU"


class _Bare:
    """The calls of one step of a loop, with a trainer of their own, since that counts versions."""

    def __init__(self, loop: Loop) -> None:
        self.engines, self.reward = loop.actors.engines, loop.scorer.functions[0].actor
        self.trainer = ray.remote(IdleTrainer).options(num_cpus=0).remote()
        self.sampling = SamplingSpec(COMPLETIONS, TOKENS, extra=loop.config.trl.generation_kwargs or {})
        self.prompts = [row.prompt for row in loop.prompts.train]
        self.seeds = [random.Random(i).randrange(MAX_SEED) for i in range(len(self.prompts))]
        self.advantages = [[1.0] * COMPLETIONS for _ in self.prompts]

    def __call__(self) -> None:
        clock = [time.perf_counter()]
        asked = zip(itertools.cycle(self.engines), self.prompts, self.seeds, strict=False)
        samples = [
            engine.sample.options(num_returns=2).remote(prompt, self.sampling, seed, 0, {}, OWN)
            for engine, prompt, seed in asked
        ]
        ray.get([header for header, _ in samples])
        groups = [group for _, group in samples]
        clock.append(time.perf_counter())
        ray.get([self.reward.score.remote(prompt, {}, group) for prompt, group in zip(self.prompts, groups, strict=True)])
        clock.append(time.perf_counter())
        ray.get(self.trainer.train.remote(self.advantages, *groups))
        clock.append(time.perf_counter())
        bucket, header_ref = self.trainer.publish.options(num_returns=2).remote()
        header = ray.get(header_ref)
        ray.get([engine.install.remote(header, bucket, policy=OWN) for engine in self.engines])
        clock.append(time.perf_counter())
        phases = zip(("sample", "score", "train", "publish and install"), itertools.pairwise(clock), strict=True)
        self.said = ", ".join(f"{name} {end - start:.2f} s" for name, (start, end) in phases)


def _engines(count: int) -> str:
    processes = f" in {REAL} processes" if count > REAL else ""
    return f"{count} engine{'s' * (count > 1)}{processes}"


def _extrapolated(sizes: dict[int, tuple[_Timed, _Timed]]) -> list[Row]:
    """What an engine more costs, and 1,000 of them."""
    lines = [linear_regression(list(sizes), [median(timed[side].wall_s) for timed in sizes.values()]) for side in (0, 1)]
    slopes = [line.slope for line in lines]
    thousand = [line.intercept + 1000 * line.slope for line in lines]
    return [
        Row(f"an engine more, up to {REAL}", PEER, (slopes[0],), (slopes[1],), "cost"),
        Row("step, 1,000 engines, extrapolated", f"{PEER}, extrapolated", (thousand[0],), (thousand[1],), "cost"),
    ]


def _engine_mib() -> float:
    """Memory of an engine's process that it shares with no other."""
    processes = [p for p in psutil.process_iter(["cmdline"]) if IdleEngine.__name__ in " ".join(p.info["cmdline"] or ())]
    return fmean(p.memory_full_info().uss for p in processes) / 2**20
