"""The search of a sweep: Ray Tune in a thread, so that this one hears Ctrl-C, and what Tune is told of trials and of room.

A scheduler is a branch in `_scheduler` and a line in SCHEDULERS of sweep_config.py.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search import BasicVariantGenerator

from actors.errors import ActorError
from orchestrator import trial_process, waits
from orchestrator.display import Display
from orchestrator.shared_engines import Loading, SharedEngines
from orchestrator.sweep_config import SweepConfig
from orchestrator.trial_process import policy_name
from orchestrator.trials import GRACE_S, STOPPING, Setting, Trial, number_of

TUNE_FOLDER = ".tune"
TUNE_ENVIRONMENT = {  # it keeps what it goes on from, and shows and writes nothing else
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_INIT": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "RAY_AIR_NEW_OUTPUT": "0",  # whose silent mode prints a banner
}
FOREVER = 10**9  # steps: at the last one of its scheduler Tune would end a trial before it has saved its result
AGAIN = "the same command goes on with the trials that failed"
COPIES = 3  # of a trial's checkpoints that Tune keeps for others
POLL_S = 0.5
CALLBACK_S = 10.0  # in which Tune gets to its next step, unless it waits for a checkpoint
STOP_S = GRACE_S + 5.0  # in which the trials' actors have ended all jobs that are to stop


@dataclass
class Live:
    """What callbacks know of the sweep that runs; not in them, which Tune keeps on disk."""

    folder: Path
    places: int  # trials at a time
    engines: SharedEngines | None = None  # that its trials share
    loading: Loading | None = None  # those of them that are not ready yet
    stopping: bool = False
    lost: str = ""  # what happened to an engine, without which no trial can go on

    def look(self) -> None:
        """Sees whether an engine could not load: that tells more than the end of a trial which waited for it."""
        if self.loading and (why := self.loading.failure()):
            self.lost = why


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
            wait_for_processes(live.folder, STOP_S)  # their actors stop them
            raise ActorError(live.lost or "the sweep was interrupted")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Lets jobs that were stopped last save what they have: Tune may be done now, and ends their actors, and so them."""
        if all(trial.is_finished() for trial in trials):
            wait_for_processes(_live[0].folder, STOP_S)


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
                _live[0].lost = _live[0].lost or str(error)


@contextmanager
def lived(live: Live) -> Iterator[Live]:
    _live.append(live)
    try:
        yield live
    finally:
        _live.remove(live)


@contextmanager
def quiet_tune() -> Iterator[None]:
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


def search(config: SweepConfig, live: Live, setting: Setting, display: Display) -> None:
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
            live.look()
        live.look()
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


def wait_for_processes(sweep: Path, timeout_s: float, pause: Callable[[float], None] = time.sleep) -> list[int]:
    """Until no trial of the sweep runs on this machine; returns the pids of those that still do. Raises as `pause` does."""
    deadline = time.monotonic() + timeout_s
    while (left := [process.pid for process in trial_process.processes(sweep)]) and time.monotonic() < deadline:
        pause(POLL_S)
    return left
