"""`eagleray sweep SWEEP.yaml --plan`: how many trials fit at once, how small ones share GPUs, and how long it takes at most.

It starts nothing. How long a step takes it knows from an earlier run of the base job, in that job's output_dir.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from actors.errors import ConfigError, EaglerayError
from orchestrator import metrics
from orchestrator.config import load
from orchestrator.display import duration
from orchestrator.drawing import drawing
from orchestrator.fit import gb
from orchestrator.jobs import CONFIG
from orchestrator.journal import read_events, steps_of
from orchestrator.machines import machines
from orchestrator.metrics import METRICS_FILE
from orchestrator.plan import Plan
from orchestrator.plan_command import WIDTH, told
from orchestrator.planning import read
from orchestrator.schema import JobConfig
from orchestrator.sizing import described
from orchestrator.sweep_plan import Samples, SweepPlan, make
from orchestrator.values import value_of

# What an earlier run must have in common with the base job for its steps to take as long, and to be as many.
OF_A_STEP = (
    "base_model", "rl", "adapter", "lora_r", "sequence_len", "micro_batch_size", "gradient_accumulation_steps",
    "ray_num_workers", "gradient_checkpointing", "trl.num_generations", "trl.max_completion_length", "ray.engines",
)  # fmt: skip
OF_A_LENGTH = ("max_steps", "num_epochs", "val_set_size", "sample_packing")


@dataclass(frozen=True)
class Earlier:
    """What an earlier run of the base job tells of its trials; None = nothing."""

    folder: str
    step_s: float | None  # median seconds of a step
    steps: int | None  # in all


def show(
    config: JobConfig,
    where: str,
    trials: int,
    samples: Samples,
    *,
    scheduler: str = "none",
    max_concurrent: int | None = None,
    share_engines: bool = False,
) -> None:
    """Prints the plan of a sweep. config: the base job. where: auto, or what is said, such as 8x80GB.

    Raises ConfigError when not one trial fits.
    """
    with machines(where) as nodes:
        found = read(config)
        plan = make(found.config, nodes, found, trials, samples, max_concurrent=max_concurrent, share_engines=share_engines)
    console = Console(width=None if os.isatty(1) else WIDTH)
    for line in text(plan, earlier(found.config), scheduler):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    console.print(drawing(plan.job))
    if problems := plan.job.problems:
        base = f"`eagleray plan {config.source.path} --cluster {where}` says what would fit"
        raise ConfigError("\n  ".join(["the cluster cannot hold a trial of this sweep:", *problems, base]))


def text(plan: SweepPlan, before: Earlier, scheduler: str) -> list[str]:
    """The plan for a person, a line each."""
    job = plan.job
    where = described(job.plan.nodes) if job.plan.gpu else f"{len(job.plan.nodes)} node(s) without GPUs"
    known = job.plan.total_steps if isinstance(job.plan, Plan) else job.config.max_steps
    steps = known or before.steps
    total = f"{plan.trials:,} x {steps:,} = {plan.trials * steps:,}" if steps else "known once the rows are prepared"
    lines = [f"trials      {plan.trials:,}, {plan.at_once:,} at once on {where}, so {plan.rounds:,} round(s)"]
    if plan.engines:
        lines.append(f"engines     {plan.engines}, which all trials share")
    if plan.changes:
        lines.append(f"sharing     {plan.a_gpu} actors a GPU: each trial with {told(plan.changes)}")
        lines.append(f"            the largest of them needs {gb(plan.largest)}; set these keys in the base for other shares")
    return [*lines, f"steps       {total}", f"time        {_time(plan, before, steps, scheduler)}", "one trial   the largest:"]


def _time(plan: SweepPlan, before: Earlier, steps: int | None, scheduler: str) -> str:
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
    seconds = [record["step_s"] for record in records if math.isfinite(record.get("step_s", math.nan))]
    as_long = _alike(config, ran, OF_A_LENGTH) and _files(config) == _files(ran)
    return Earlier(config.output_dir, median(seconds) if seconds else None, steps if as_long else None)


def _files(config: JobConfig) -> list[str]:
    return [dataset.path for dataset in config.datasets or []]


def _alike(one: JobConfig, other: JobConfig, keys: Sequence[str]) -> bool:
    return all(value_of(one, key) == value_of(other, key) for key in keys)
