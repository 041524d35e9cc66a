"""`eagleray sweep SWEEP.yaml --plan`: how many trials fit at once, how small ones share GPUs, and how long it takes at most.

It starts nothing. How long a step takes it knows from an earlier run of the base job, in that job's output_dir.
"""

import os
import shlex
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors.errors import ConfigError, EaglerayError
from orchestrator import metrics
from orchestrator.config import load, overrides_of
from orchestrator.display import duration
from orchestrator.drawing import drawing
from orchestrator.fit import gb
from orchestrator.jobs import CONFIG
from orchestrator.journal import read_events, steps_of
from orchestrator.machines import machines
from orchestrator.metrics import METRICS_FILE
from orchestrator.plan_command import WIDTH, told
from orchestrator.planning import read
from orchestrator.schema import JobConfig
from orchestrator.sizing import described
from orchestrator.sweep_config import SweepConfig
from orchestrator.sweep_plan import OF_A_LENGTH, SweepPlan, of_sweep, steps_of_each
from orchestrator.values import value_of

# What an earlier run must have in common with the base job for its steps to take as long, and to be as many.
OF_A_STEP = (
    "base_model", "rl", "adapter", "lora_r", "sequence_len", "micro_batch_size", "gradient_accumulation_steps",
    "ray_num_workers", "gradient_checkpointing", "trl.num_generations", "trl.max_completion_length", "ray.engines",
)  # fmt: skip


@dataclass(frozen=True)
class Earlier:
    """What an earlier run of the base job tells of its trials; None = nothing."""

    folder: str
    step_s: float | None  # median seconds of a step
    steps: int | None  # in all


def show(config: SweepConfig, where: str) -> None:
    """Prints the plan of a sweep. where: auto, or what is said, such as 8x80GB.

    Raises ConfigError when not one trial fits, or when trials that must run at the same time cannot.
    """
    with machines(where) as nodes:
        found = read(config.base)
        plan = of_sweep(config, nodes, found)
    console = Console(width=None if os.isatty(1) else WIDTH)
    for line in text(plan, earlier(found.config), config.scheduler["name"], config.space.keys):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(drawing(plan.job))
    if problems := plan.job.problems:
        command = ["eagleray", "plan", config.base.source.path, *overrides_of(plan.values), "--cluster", where]
        helps = f"`{shlex.join(command)}` says what would fit"
        raise ConfigError("\n  ".join(["the cluster cannot hold a trial of this sweep:", *problems, helps]))


def text(plan: SweepPlan, before: Earlier, scheduler: str, varied: Collection[str] = ()) -> list[str]:
    """The plan for a person, a line each. varied: keys of the job that the space has."""
    job = plan.job
    where = described(job.plan.nodes) if job.plan.gpu else f"{len(job.plan.nodes)} node(s) without GPUs"
    alike = not {"max_steps", *OF_A_LENGTH} & {key.partition("[")[0] for key in varied}
    steps = steps_of_each(job, varied) or (before.steps if alike else None)
    unknown = "known once the rows are prepared" if alike else "not the same for all trials"
    total = f"{plan.trials:,} x {steps:,} = {plan.trials * steps:,}" if steps else unknown
    lines = [f"trials      {plan.trials:,}, {plan.at_once:,} at once on {where}, so {plan.rounds:,} round(s)"]
    if plan.engines:
        lines.append(f"engines     {plan.engines}, which all trials share")
    if plan.changes:
        lines.append(f"sharing     {plan.a_gpu} actors a GPU: each trial with {told(plan.changes)}")
        lines.append(f"            the largest of them needs {gb(plan.largest)}; set these keys in the base for other shares")
    time = _time(plan, before, steps, scheduler, varied)
    return [*lines, f"steps       {total}", f"time        {time}", "one trial   the largest:"]


def _time(plan: SweepPlan, before: Earlier, steps: int | None, scheduler: str, varied: Collection[str]) -> str:
    if other := [key for key in varied if key in OF_A_STEP]:
        return f"not known: steps take longer or shorter with another {', '.join(other)}"
    if before.step_s is None:
        return f"not known: {before.folder} holds no steps of such a job; run the base job for a few, and plan again"
    each = f"steps of {before.step_s:.3g} s, as in {before.folder}"
    if not steps or not plan.rounds:
        return each
    crowd = f", up to {plan.crowd} times as long where {plan.crowd} trials share" if plan.crowd > 1 else ""
    early = f"; {scheduler} stops some early" if scheduler == "asha" else ""
    seconds = plan.rounds * steps * before.step_s * plan.crowd
    return f"at most {duration(seconds)}: {each}{crowd}{early}; starting trials comes on top"


def earlier(config: JobConfig) -> Earlier:
    """Reads what lies in the job's output_dir, if it is of a job whose steps are like this one's."""
    folder = Path(config.output_dir)
    nothing = Earlier(config.output_dir, None, None)
    try:
        ran = load(folder / CONFIG)
        records = metrics.read(folder / METRICS_FILE)
        steps = steps_of(read_events(folder))
    except (EaglerayError, OSError):
        return nothing
    if not _alike(config, ran, OF_A_STEP):
        return nothing
    simple = OF_A_LENGTH - {"datasets", "test_datasets"}
    as_long = _alike(config, ran, ("max_steps", *simple)) and _files(config) == _files(ran)
    return Earlier(config.output_dir, metrics.usual_step_s(records), steps if as_long else None)


def _files(config: JobConfig) -> list[str]:
    return [dataset.path for dataset in config.datasets or []]


def _alike(one: JobConfig, other: JobConfig, keys: Iterable[str]) -> bool:
    return all(value_of(one, key) == value_of(other, key) for key in keys)
