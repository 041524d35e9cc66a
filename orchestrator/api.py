"""Eagleray from Python: load a job, plan it, run it, search over it.

    from orchestrator.api import load, run, sweep

    config = load("job.yaml", learning_rate=1e-5, **{"trl.beta": 0.1})
    result = run(config)

Each function does what the command of its name does. All raise EaglerayError (actors/errors.py) with a message for a person,
and waits.Interrupted on Ctrl-C. They join a Ray that is initialized already, as in a notebook, else the cluster of RAY_ADDRESS,
as in a Ray job, else they start one on this machine.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator import config as job_file
from orchestrator import planning
from orchestrator import run as jobs
from orchestrator.display import Display
from orchestrator.jobs import RunResult
from orchestrator.machines import machines
from orchestrator.planning import Planned
from orchestrator.runnable import ensure_runnable
from orchestrator.schema import JobConfig
from orchestrator.sweep_results import SweepResult

__all__ = ["JobConfig", "Planned", "RunResult", "SweepResult", "load", "plan", "run", "sweep"]


def load(path: str | Path, **overrides: Any) -> JobConfig:
    """Reads a job file; overrides are values by key, dotted ones as `**{"trl.beta": 0.1}`.

    Raises ConfigError, a line per problem, for everything that cannot be taken at its word.
    """
    return job_file.load(path, job_file.overrides_of(overrides))


def plan(config: JobConfig, cluster: str = "auto") -> Planned:
    """What a job would start where, and whether it fits (`.problems` is empty then); `print` shows it. Starts nothing.

    cluster: such as 8x80GB or 2x8x80GB; auto is the cluster that is joined already, or that of RAY_ADDRESS, else
    this machine. Raises ConfigError for a job that no cluster can hold.
    """
    ensure_runnable(config)
    with machines(cluster) as nodes:
        found = planning.read(config)
        return planning.planned(found.config, nodes, found)


def run(config: JobConfig) -> RunResult:
    """Runs a job to its end and shows its steps. Raises EaglerayError when it fails."""
    return jobs.run(config, Display())


def sweep(
    config: JobConfig,
    space: Mapping[str, Any],
    metric: str,
    mode: str,
    num_samples: int = 1,
    scheduler: str | Mapping[str, Any] = "none",
    max_concurrent: int | None = None,
    share_engines: bool = False,
    *,
    output_dir: str | Path,
    seed: int = 42,
) -> SweepResult:
    """Runs many jobs that differ from `config` in the keys of `space`, and returns all of them and the best.

    space: by dotted key a domain of ray.tune, or a list, which is a grid. metric: a name of METRICS in metrics.py; mode: min or
    max. num_samples: draws of the random keys, and so often each combination of the grids. scheduler: none, asha, or pbt with
    its options, `{"name": "pbt", "perturbation_interval": 20}`. max_concurrent: trials at once, by default as many as there is
    room for. share_engines: GRPO trials with adapter: lora sample on the same engines. output_dir: where an unfinished sweep
    that is the same goes on. seed: of the draws.
    """
    from orchestrator import sweep_config, sweeps  # here: they load Ray Tune

    given = {
        "space": space,
        "metric": metric,
        "mode": mode,
        "num_samples": num_samples,
        "scheduler": scheduler,
        "max_concurrent": max_concurrent,
        "share_engines": share_engines,
        "output_dir": output_dir,
        "seed": seed,
    }
    return sweeps.sweep(sweep_config.make(config, **given), Display())
