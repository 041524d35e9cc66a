"""A sweep: its folder, Ray Tune's search, and what is told at its end.

    OUTPUT_DIR/sweep.json, base.yaml    what is searched, and the base job as it was when the sweep began
    OUTPUT_DIR/trials/0000/             a trial: a whole output directory of a job, with trial.json and trial.log
    OUTPUT_DIR/.tune/                   Ray Tune's own state, from which a sweep that was stopped or killed goes on

Tune runs in a thread, so that this one hears Ctrl-C. A trial is an actor (trials.py) that starts a job's process.
"""

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from actors import storage
from actors.errors import ActorError, ConfigError, EaglerayError
from orchestrator import checkpoints, cluster, planning, shared_engines, sweep_plan, sweep_results, trial_process, waits
from orchestrator.config import dump, load
from orchestrator.display import Display
from orchestrator.jobs import CONFIG
from orchestrator.plan import Node, Plan, ensure_placeable
from orchestrator.planning import Planned, Read
from orchestrator.shared_engines import SharedEngines
from orchestrator.sweep_config import SweepConfig
from orchestrator.sweep_frame import best_told
from orchestrator.sweep_plan import SweepPlan
from orchestrator.sweep_results import SWEEP_FILE, TRIALS, UNFIT, VERSION, SweepResult
from orchestrator.sweep_table import watching
from orchestrator.trial_process import BASE_FILE, policy_name
from orchestrator.trials import GRACE_S, STOPPING, Setting, Trial, number_of

TUNE_FOLDER = ".tune"
TUNE_ENVIRONMENT = {  # it keeps what it goes on from, and shows and writes nothing else
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_INIT": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "RAY_AIR_NEW_OUTPUT": "0",  # whose silent mode prints a banner
}
OF_A_LENGTH = {  # keys that decide how many steps a job has that does not say so
    "num_epochs", "micro_batch_size", "gradient_accumulation_steps", "ray_num_workers", "sequence_len",
    "sample_packing", "datasets", "test_datasets", "val_set_size", "trl.num_generations",
}  # fmt: skip
FOREVER = 10**9  # steps: at the last one of its scheduler Tune would end a trial before it has saved its result
AGAIN = "the same command goes on with the trials that failed"
COPIES = 3  # of a trial's checkpoints that Tune keeps for others
POLL_S = 0.5
CALLBACK_S = 10.0  # in which Tune gets to its next step, unless it waits for a checkpoint
STOP_S = GRACE_S + 5.0  # in which the trials' actors have ended all jobs that are to stop
LEFT_OVER_S = 30.0  # in which the trials of a driver that was killed have ended


@dataclass
class Live:
    """What callbacks know of the sweep that runs; not in them, which Tune keeps on disk."""

    folder: Path
    places: int  # trials at a time
    engines: SharedEngines | None = None  # that its trials share
    stopping: bool = False
    lost: str = ""  # what happened to an engine, without which no trial can go on


_live: list[Live] = []  # the one


class Interruption(tune.Callback):  # type: ignore[misc]  # Ray's annotations are not read
    """Ends Tune between two of its steps, when all trials have stopped: for Tune they still run, and so go on the next time.

    Nor does Tune end by itself before they have.
    """

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Raises ActorError if the sweep is being interrupted, or has lost an engine."""
        live = _live[0]
        if live.stopping or live.lost:
            (live.folder / STOPPING).touch()
            _wait_for_processes(live.folder, STOP_S)  # their actors stop them
            raise ActorError(live.lost or "the sweep was interrupted")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Lets jobs that were stopped last save what they have: Tune may be done now, and ends their actors, and so them."""
        if all(trial.is_finished() for trial in trials):
            _wait_for_processes(_live[0].folder, STOP_S)


class Draws(BasicVariantGenerator):  # type: ignore[misc]
    """Draws as many trials as there is room for now. Tune's own goes on with as many as there was room for at the start."""

    def next_trial(self) -> Any:
        """None = not now."""
        self.max_concurrent = _live[0].places
        return super().next_trial()


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """Of trials that all run at the same time. Tune's own would stop one whenever another waits, which starts anew at once."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """CONTINUE, or NOOP for a trial that copies another one."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if decision == self.PAUSE else decision


class Departure(tune.Callback):  # type: ignore[misc]  # Ray's annotations are not read
    """Frees the places of a trial on shared engines where its actor has died with its job, so that neither could do so.

    Of one that is stopped Tune tells before its job has ended, which would fail without its place: its actor frees that.
    """

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Its job has ended, perhaps because an engine has."""
        if engines := _live[0].engines:
            engines.of(policy_name(number_of(trial.trial_id))).close()
            try:
                engines.actors()
            except ActorError as error:
                _live[0].lost = str(error)


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
        if left := _wait_for_processes(folder, LEFT_OVER_S, waits.pause):
            raise ConfigError(f"output_dir: {folder} has trials that still run: end the processes {', '.join(map(str, left))}")
        with display.phase("starting Ray"):
            here = stack.enter_context(cluster.connected())
        fits = _fitting(config, found, cluster.nodes())
        ensure_placeable(fits.job.plan.problems)
        _ensure_room(config, fits, display)
        lines = [f"{key}: {text}" for key, text in config.space.texts().items()]
        about = f"{config.trials} trials, {fits.at_once} at a time; {config.metric}, {config.mode}"
        searched = f"scheduler   {_told(config.scheduler)}"
        display.header(f"sweep: {config.base.source.path} -> {folder}", [about, *lines, searched, f"dashboard   {here}"])
        if resumed:
            display.note(f"goes on with the sweep that {folder} holds")
        engines = stack.enter_context(_shared_engines(config, fits.at_once, display))
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
        live = stack.enter_context(_lived(Live(folder, fits.at_once, engines)))
        with watching(folder), _quiet_tune():
            _search(config, live, setting, display)
    return _result(folder, display)


def _shared_engines(config: SweepConfig, places: int, display: Display) -> AbstractContextManager[SharedEngines | None]:
    """The engines that all trials share, as long as the block runs; None = each has its own."""
    return shared_engines.started(config.base, config.variants, places, display) if config.share_engines else nullcontext()


@contextmanager
def _lived(live: Live) -> Iterator[Live]:
    _live.append(live)
    try:
        yield live
    finally:
        _live.remove(live)


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
            "total_steps": _total_steps(config, planned),
            **_about(config),
        },
    )
    (folder / BASE_FILE).write_text(dump(config.base), encoding="utf-8")  # last: without the other file it is a person's


def _total_steps(config: SweepConfig, planned: Planned) -> int | None:
    """Of each trial; None = not known, or they differ."""
    varied = {key.partition("[")[0] for key in config.space.keys}
    if "max_steps" in varied or (config.base.max_steps is None and varied & OF_A_LENGTH):
        return None
    return planned.plan.total_steps if isinstance(planned.plan, Plan) else config.base.max_steps


def _fitting(config: SweepConfig, found: Read, nodes: Sequence[Node]) -> SweepPlan:
    """How many trials run at a time, and how they share GPUs."""
    return sweep_plan.make(
        found.config,
        nodes,
        found,
        config.trials,
        config.sizes,
        max_concurrent=config.max_concurrent,
        share_engines=config.share_engines,
    )


def _ensure_room(config: SweepConfig, fits: SweepPlan, display: Display) -> None:
    """Raises ConfigError when trials that must run at the same time cannot."""
    if fits.at_once < config.trials and config.scheduler["name"] == "pbt":
        raise ConfigError(
            f"pbt compares trials that run at the same time, here {config.trials}, and there is room for {fits.at_once}: "
            "lower num_samples, or what a trial reserves"
        )
    if fits.at_once < min(config.max_concurrent or 0, config.trials):
        display.warn(f"max_concurrent is {config.max_concurrent}, and the cluster has room for {fits.at_once} trials at a time")


@contextmanager
def _quiet_tune() -> Iterator[None]:
    """What it has to say is told by the table. Around a sweep alone: a notebook's process lives on."""
    logger = logging.getLogger("ray.tune")
    before, level = {name: os.environ.get(name) for name in TUNE_ENVIRONMENT}, logger.level
    os.environ.update(TUNE_ENVIRONMENT)
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _search(config: SweepConfig, live: Live, setting: Setting, display: Display) -> None:
    """Ray Tune, until all trials have ended."""
    errors: list[Exception] = []

    def fit() -> None:
        try:
            _tuner(config, live.folder, setting).fit()
        except Exception as error:  # carried to the thread that tells the person
            errors.append(error)

    thread = threading.Thread(target=fit, name="ray-tune", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            waits.pause(POLL_S)
    except waits.Interrupted:
        display.note("stopping the trials, which keep their checkpoints")
        live.stopping = True
        thread.join(CALLBACK_S)
        (live.folder / STOPPING).touch()
        thread.join(2 * GRACE_S)
        display.note("stopped; the same command goes on with the sweep")
        raise
    if live.lost:
        raise ActorError(f"shared engines: {live.lost}; {AGAIN}")
    if errors:
        raise ActorError(f"Ray Tune failed: {waits.told(errors[0])}") from errors[0]


def _tuner(config: SweepConfig, folder: Path, setting: Setting) -> Any:
    trainable = tune.with_parameters(Trial, setting=setting)
    state = folder / TUNE_FOLDER
    if list(state.glob("experiment_state-*.json")):
        return tune.Tuner.restore(
            str(state), trainable=trainable, param_space=dict(config.space.domains), resume_errored=True
        )
    shutil.rmtree(state, ignore_errors=True)  # of a driver that was killed before Tune knew of any trial
    return tune.Tuner(
        trainable,
        param_space=dict(config.space.domains),
        tune_config=tune.TuneConfig(
            metric=config.metric,
            mode=config.mode,
            num_samples=config.num_samples,
            search_alg=Draws(random_state=config.seed),
            scheduler=_scheduler(config),
            trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(folder),
            callbacks=[Interruption(), Departure()],
            checkpoint_config=tune.CheckpointConfig(num_to_keep=COPIES, checkpoint_at_end=False),
            verbose=0,
        ),
    )


def _name(trial: Any) -> str:
    name: str = trial.trial_id
    return name


def _scheduler(config: SweepConfig) -> Any:
    options = {key: value for key, value in config.scheduler.items() if key != "name"}
    if config.scheduler["name"] == "asha":
        return AsyncHyperBandScheduler(time_attr="step", max_t=FOREVER, **options)
    if config.scheduler["name"] == "pbt":
        return Population(
            time_attr="step",
            hyperparam_mutations=config.space.mutations(),
            custom_explore_fn=config.space.clipped,
            log_config=False,
            **options,
        )
    return FIFOScheduler()


def _wait_for_processes(sweep: Path, timeout_s: float, pause: Callable[[float], None] = time.sleep) -> list[int]:
    """Until no trial of the sweep runs on this machine; returns the pids of those that still do. Raises as `pause` does."""
    deadline = time.monotonic() + timeout_s
    while (left := [process.pid for process in trial_process.processes(sweep)]) and time.monotonic() < deadline:
        pause(POLL_S)
    return left


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
