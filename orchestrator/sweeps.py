"""A sweep: its folder, Ray Tune's search, and what is told at its end.

    OUTPUT_DIR/sweep.json, base.yaml    what is searched, and the base job as it was when the sweep began
    OUTPUT_DIR/trials/0000/             a trial: a whole output directory of a job, with trial.json and trial.log
    OUTPUT_DIR/.tune/                   Ray Tune's own state, from which a sweep that was stopped or killed goes on

The search itself is sweep_search.py's; a trial is an actor (trials.py) that starts a job's process.
"""

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import storage
from actors.errors import ActorError, ConfigError, EaglerayError
from orchestrator import checkpoints, cluster, planning, shared_engines, sweep_plan, sweep_results, waits
from orchestrator.config import dump, load
from orchestrator.display import Display
from orchestrator.jobs import CONFIG
from orchestrator.plan import ensure_placeable
from orchestrator.planning import Planned
from orchestrator.shared_engines import Loading, SharedEngines
from orchestrator.sweep_config import SweepConfig
from orchestrator.sweep_frame import best_told
from orchestrator.sweep_results import SWEEP_FILE, TRIALS, UNFIT, VERSION, SweepResult
from orchestrator.sweep_search import AGAIN, TUNE_FOLDER, Live, lived, quiet_tune, search, wait_for_processes
from orchestrator.sweep_table import watching
from orchestrator.trial_process import BASE_FILE
from orchestrator.trials import STOPPING, Setting

LEFT_OVER_S = 30.0  # in which the trials of a driver that was killed have ended


def sweep(config: SweepConfig, display: Display) -> SweepResult:
    """Runs a sweep to its end, or goes on with the one that its folder holds.

    Raises EaglerayError for anything a person can act on, also when every trial has failed; waits.Interrupted on Ctrl-C or
    SIGTERM.
    """
    folder = config.output_dir
    resumed = _holds_this(config, folder)
    if resumed:
        config = replace(config, base=_base_of(folder, config, display))
    found = planning.read(config.base)
    planned = planning.planned(found.config, cluster.local_nodes(), found)
    with checkpoints.claimed(folder), waits.interruptible(), ExitStack() as stack:
        if not resumed:
            _begin(config, folder, planned)
        (folder / STOPPING).unlink(missing_ok=True)
        if left := wait_for_processes(folder, LEFT_OVER_S, waits.pause):
            raise ConfigError(f"output_dir: {folder} has trials that still run: end the processes {', '.join(map(str, left))}")
        with display.phase("starting Ray"):
            here = stack.enter_context(cluster.connected())
        fits = sweep_plan.of_sweep(config, cluster.nodes(), found)
        ensure_placeable(fits.job.plan.problems)
        if fits.at_once < min(config.max_concurrent or 0, config.trials):
            display.warn(f"max_concurrent is {config.max_concurrent}, and there is room for {fits.at_once} trials at a time")
        lines = [f"{key}: {text}" for key, text in config.space.texts().items()]
        about = f"{config.trials} trials, {fits.at_once} at a time; {config.metric}, {config.mode}"
        searched = f"scheduler   {_told(config.scheduler)}"
        display.header(f"sweep: {config.base.source.path} -> {folder}", [about, *lines, searched, f"dashboard   {here}"])
        if resumed:
            display.note(f"goes on with the sweep that {folder} holds")
        engines, loading = stack.enter_context(_shared_engines(config, fits.at_once))
        if engines:
            display.note("the trials start while the engines that they share load their model")
        setting = Setting(
            sweep=str(folder),
            metric=config.metric,
            mode=config.mode,
            path=config.base.source.path,
            folders=tuple(config.base.source.folders),
            here=str(Path.cwd()),
            environment={**os.environ, "RAY_ADDRESS": here.address},
            changes=fits.changes,
            engines=engines.record() if engines else None,
            places=fits.at_once,
        )
        live = stack.enter_context(lived(Live(folder, fits.at_once, engines, loading)))
        with watching(folder), quiet_tune():
            search(config, live, setting, display)
    return _result(folder, display)


def _shared_engines(
    config: SweepConfig, places: int
) -> AbstractContextManager[tuple[SharedEngines, Loading] | tuple[None, None]]:
    """The engines that all trials share, as long as the block runs, and how they load; None = each trial has its own."""
    if not config.share_engines:
        return nullcontext((None, None))
    return shared_engines.started(config.base, config.variants, places)


def _holds_this(config: SweepConfig, folder: Path) -> bool:
    """Whether the folder holds this sweep, begun. Raises ConfigError when it holds another one, or a run."""
    if not (folder / SWEEP_FILE).is_file():
        if (folder / CONFIG).exists() or (folder / TRIALS).exists() or storage.steps_saved(folder):
            raise ConfigError(f"output_dir: {folder} holds a run; choose another folder for the sweep")
        if (folder / BASE_FILE).exists():
            raise ConfigError(
                f"output_dir: {folder} holds a file {BASE_FILE}, which the sweep would overwrite; choose another folder"
            )
        return False
    if not (folder / TRIALS).is_dir():  # nothing was begun, so nothing is lost
        return False
    kept = sweep_results.read_about(folder)
    for key, value in _about(config).items():
        if kept.get(key) != value:
            raise ConfigError(
                f"output_dir: {folder} holds another sweep: its {key} is {_told(kept.get(key))}, not {_told(value)}; "
                "choose another folder, or put it back to go on"
            )
    return True


def _about(config: SweepConfig) -> dict[str, Any]:
    """What makes a sweep the same one."""
    return {
        "metric": config.metric,
        "mode": config.mode,
        "space": config.space.texts(),
        "trials": config.trials,
        "scheduler": dict(config.scheduler),
        "share_engines": config.share_engines,
        "seed": config.seed,
    }


def _base_of(folder: Path, config: SweepConfig, display: Display) -> Any:
    """The base job that a sweep began with."""
    base = load(folder / BASE_FILE)
    if replace(base, output_dir="") != replace(config.base, output_dir=""):
        display.warn(f"{config.base.source.path} has changed since the sweep began, which goes on as {folder / BASE_FILE} says")
    base.source = config.base.source
    return base


def _begin(config: SweepConfig, folder: Path, planned: Planned) -> None:
    shutil.rmtree(folder / TUNE_FOLDER, ignore_errors=True)
    storage.write_json(
        folder / SWEEP_FILE,
        {
            "version": VERSION,
            "base": config.base.source.path,
            "folder": str(Path.cwd()),
            "total_steps": sweep_plan.steps_of_each(planned, config.space.keys),
            **_about(config),
        },
    )
    (folder / BASE_FILE).write_text(dump(config.base), encoding="utf-8")  # last: without the other file it is a person's


def _result(folder: Path, display: Display) -> SweepResult:
    """Tells the best trial. Raises ActorError when every trial has failed."""
    result = sweep_results.read(folder)
    failed = [trial for trial in result.trials if trial.state in UNFIT]
    if failed and len(failed) == len(result.trials):
        last = failed[-1]
        raise ActorError(
            f"all {len(failed)} trials have failed, trial {last.number} with: {last.message}\n  log {last.folder}\n  {AGAIN}"
        )
    best = result.best
    if best is None:
        raise EaglerayError(f"no trial has a value of {result.metric}; {folder} has what they left")
    display.summary(
        f"done: {len(result.trials)} trials" + (f", {len(failed)} of them failed; {AGAIN}" if failed else ""),
        [
            f"best     {best_told(result, best)}",
            f"it lies  in {best.folder}",
            f"report   eagleray report {folder}",
        ],
    )
    return result


def _told(value: Any) -> str:
    """For a message: a scheduler as it is written."""
    if isinstance(value, Mapping) and "name" in value and len(value) == 1:
        return str(value["name"])
    return json.dumps(value)
