"""What a sweep has found so far, read from its folder; also while it runs, and after it was killed.

    SWEEP/sweep.json                  what is searched: metric, mode, space, how many trials
    SWEEP/trials/0000/trial.json      {"number": 0, "params": {"learning_rate": 1e-5}}
    SWEEP/trials/0000/events.jsonl    its state: the last word of its last run (journal.py)
    SWEEP/trials/0000/metrics.jsonl   its curve

A trial is a whole output directory of a job. Nothing else keeps a trial's state, and looking writes nothing. Of a process
that ended before its job could say a word, whoever started it says it there (`Journal.tell("end", how="failed", text=...)`).
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from actors.errors import EaglerayError
from orchestrator import metrics
from orchestrator.jobs import CONFIG, folders_of
from orchestrator.journal import EVENTS_FILE, read_events, steps_of
from orchestrator.metrics import METRICS_FILE

if TYPE_CHECKING:
    import pandas

    from orchestrator.schema import JobConfig

SWEEP_FILE = "sweep.json"
VERSION = 1  # of that file
TRIALS = "trials"  # a folder a trial
TRIAL_FILE = "trial.json"
LOG_FILE = "trial.log"

Mode = Literal["min", "max"]
State = Literal["waiting", "running", "done", "stopped", "failed", "lost"]
UNFIT: tuple[State, ...] = ("failed", "lost")  # states whose trial may not be the best


@dataclass(frozen=True)
class Curve:
    """What metrics.jsonl says of one trial."""

    step: int = 0  # optimizer steps done
    steps: tuple[int, ...] = ()  # that have the sweep's metric
    values: tuple[float, ...] = ()  # of it, as many; NaN where it was not finite
    step_s: float | None = None  # median seconds of a step; None = not known


@dataclass(frozen=True)
class TrialResult:
    """One trial, at one moment."""

    number: int
    params: Mapping[str, Any]  # dotted keys
    folder: Path  # its output_dir
    state: State  # lost: its process is gone and left no word
    steps: int | None  # in all; None = not known yet
    curve: Curve
    value: float | None  # the best of its metric; None = it has none yet
    message: str  # why it failed or was lost; else ""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.curve.step

    @property
    def values(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Steps and values of the metric, of equal length."""
        return self.curve.steps, self.curve.values

    @property
    def last(self) -> float | None:
        """The newest value of the metric that is finite."""
        return next((value for value in reversed(self.curve.values) if math.isfinite(value)), None)

    @property
    def config(self) -> JobConfig:
        """The trial's whole configuration. Raises ConfigError when it has not begun."""
        from orchestrator.config import load

        config = load(self.folder / CONFIG)
        config.source = replace(config.source, elsewhere=tuple(folders_of(self.folder)))
        return config


@dataclass(frozen=True)
class SweepResult:
    """A sweep, at one moment."""

    folder: Path
    metric: str
    mode: Mode
    space: Mapping[str, str]  # what each key may be, for a person
    trials: tuple[TrialResult, ...]  # those that were made so far, by number
    planned: int | None  # trials in all; None = not known
    steps: int | None  # of each trial in all; None = not known

    @property
    def best(self) -> TrialResult | None:
        """The trial with the best value of the metric, of those that have one and did not fail; the first of equals."""
        fit = [trial for trial in self.ranked if trial.state not in UNFIT and trial.value is not None]
        return fit[0] if fit else None

    @property
    def ranked(self) -> list[TrialResult]:
        """The trials, best value first; those without a value last."""
        sign = 1.0 if self.mode == "min" else -1.0
        return sorted(self.trials, key=lambda trial: math.inf if trial.value is None else sign * trial.value)

    @property
    def keys(self) -> list[str]:
        """The parameters that trials have, in the order of the first that has each."""
        return list(dict.fromkeys(key for trial in self.trials for key in trial.params))

    def dataframe(self) -> pandas.DataFrame:
        """A row a trial, by number: trial, its parameters, state, step, best, last, output_dir."""
        import pandas

        keys = self.keys
        rows = [
            [trial.number, *(trial.params.get(key) for key in keys), trial.state, trial.step, trial.value, trial.last]
            + [str(trial.folder)]
            for trial in self.trials
        ]
        return pandas.DataFrame(rows, columns=["trial", *keys, "state", "step", "best", "last", "output_dir"])

    def plot(self, path: str | Path) -> Path:
        """Draws the curves and the parameters of all trials as one PNG; raises EaglerayError when there is no trial."""
        from orchestrator.sweep_report import draw

        return draw(self, Path(path))


def is_sweep(folder: Path) -> bool:
    """Whether a folder is the output_dir of a sweep."""
    return (folder / SWEEP_FILE).is_file()


def read(folder: Path) -> SweepResult:
    """Raises EaglerayError when the folder holds no sweep, or a file in it is damaged."""
    folder = folder.expanduser().resolve()
    if not is_sweep(folder):
        raise EaglerayError(f"{folder} holds no sweep: it has no {SWEEP_FILE}; give the output_dir of one")
    about = read_about(folder)
    found = [_trial(path.parent, about["metric"], about["mode"]) for path in sorted(folder.glob(f"{TRIALS}/*/{TRIAL_FILE}"))]
    return SweepResult(
        folder=folder,
        metric=about["metric"],
        mode=about["mode"],
        space=about.get("space") or {},
        trials=tuple(sorted(found, key=lambda trial: trial.number)),
        planned=about.get("trials"),
        steps=about.get("total_steps"),
    )


def read_about(folder: Path) -> dict[str, Any]:
    """What sweep.json says. Raises EaglerayError when it is damaged, or of another version."""
    about = _json(folder / SWEEP_FILE, ("version", "metric", "mode"))
    if about["version"] != VERSION:
        raise EaglerayError(f"{folder / SWEEP_FILE} is of version {about['version']}; this Eagleray reads version {VERSION}")
    return about


def _json(path: Path, needed: Sequence[str]) -> dict[str, Any]:
    try:
        about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if missing := [key for key in needed if key not in about]:
            raise ValueError(f"it has no {missing[0]}")
    except (ValueError, TypeError, OSError) as error:
        raise EaglerayError(f"{path} cannot be read as what a sweep wrote there: {error}") from error
    return about


def _trial(folder: Path, metric: str, mode: Mode) -> TrialResult:
    about = _json(folder / TRIAL_FILE, ("number", "params"))
    events = _events(folder)
    state = _state(events)
    curve = _curve(folder / METRICS_FILE, metric)
    finite = [value for value in curve.values if math.isfinite(value)]
    return TrialResult(
        number=about["number"],
        params=about["params"],
        folder=folder,
        state=state,
        steps=steps_of(events),
        curve=curve,
        value=(min if mode == "min" else max)(finite, default=None),
        message=_message(folder, events, state),
    )


def _state(events: Sequence[Mapping[str, Any]]) -> State:
    """The last word, unless a resumed run has said something since."""
    if not events:
        return "waiting"
    if events[-1]["kind"] == "end":
        how: State = events[-1]["how"]
        return how
    ends = [number for number, event in enumerate(events) if event["kind"] == "end"]
    since = events[ends[-1] + 1 :] if ends else events
    start = next((event for event in since if event["kind"] == "start"), None)
    return "lost" if start and _is_gone(start) else "running"


def _is_gone(start: Mapping[str, Any]) -> bool:
    """Whether the process that wrote this event has ended; that of another machine is taken to live."""
    if start.get("host") != socket.gethostname():
        return False
    try:
        process = psutil.Process(start["pid"])
        another: bool = process.create_time() > start["time"]  # that got its number since
        return another or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _message(folder: Path, events: Sequence[Mapping[str, Any]], state: State) -> str:
    """Why a trial has come to nothing: its own word, else the last line that its process printed."""
    if state not in UNFIT:
        return ""
    if state == "failed" and events[-1].get("text"):
        return str(events[-1]["text"])
    return last_lines(folder, 1).strip()


def last_lines(trial: Path, count: int) -> str:
    """What a trial's process printed last, without empty lines."""
    try:
        lines = (trial / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join([line for line in lines if line.strip()][-count:])


def _events(folder: Path) -> Sequence[dict[str, Any]]:
    try:
        now = (folder / EVENTS_FILE).stat()
    except FileNotFoundError:
        return ()
    return _events_of(folder, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=4096)  # as _curve_of
def _events_of(folder: Path, size: int, mtime_ns: int) -> Sequence[dict[str, Any]]:
    """Without what is told at each step, unless it is the last word: what is kept of a trial stays small."""
    events = read_events(folder)
    return [event for event in events if event["kind"] != "phase" or event is events[-1]]


def _curve(path: Path, metric: str) -> Curve:
    try:
        now = path.stat()
    except FileNotFoundError:
        return Curve()
    return _curve_of(path, metric, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=4096)  # a sweep that is watched is read every second, and most trials have ended or have not moved since
def _curve_of(path: Path, metric: str, size: int, mtime_ns: int) -> Curve:
    records = metrics.read(path)
    points = [(record["step"], record[metric]) for record in records if metric in record]
    return Curve(
        step=max((record["step"] for record in records), default=0),
        steps=tuple(step for step, _ in points),
        values=tuple(value for _, value in points),
        step_s=metrics.usual_step_s(records),
    )
