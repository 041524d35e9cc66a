"""A sweep in the terminal while it goes: `with watching(folder):` around whatever runs it.

A thread looks into the sweep's folder once a second. A terminal shows a table that is drawn anew, a row a trial; elsewhere a trial
gets a line when it starts and when it ends, and so does each new leader. Showing is never a reason to stop.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.errors import EaglerayError
from orchestrator.display import Display, duration, written
from orchestrator.frame import sparkline
from orchestrator.sweep_results import UNFIT, SweepResult, TrialResult, read

EVERY_S = 1.0
AROUND_ROWS = 8  # lines of a terminal that the table's rows leave to the rest, and to the prompt
CURVES = (8, 30)  # columns of a curve, fewest and most
OF_PARAMS = 0.45  # of the terminal's width, at most
STATES = {  # in the order in which they are counted up
    "running": "green",
    "waiting": "dim",
    "done": "bold green",
    "stopped": "yellow",
    "failed": "bold red",
    "lost": "bold red",
}


@contextmanager
def watching(folder: Path, console: Console | None = None) -> Iterator[None]:
    """Shows the sweep of a folder as long as the block runs, and once more at its end. Its sweep.json is there already.

    What the folder holds when the block begins is taken as told: a sweep that is resumed says nothing twice.
    """
    console = console or Console(force_terminal=sys.stdout is not None and sys.stdout.isatty())
    live = console.is_terminal and not console.is_dumb_terminal
    with ExitStack() as stack:
        view = stack.enter_context(_LiveTable(folder, console)) if live else _Lines(folder, Display(console))
        over = threading.Event()
        thread = threading.Thread(target=_look_until, args=(over, view), name="sweep table", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _look_until(over: threading.Event, view: _LiveTable | _Lines) -> None:
    last = False
    while not last:
        last = over.wait(EVERY_S)
        try:
            view.look()
        except EaglerayError:  # a file that cannot be read just now
            continue
        except (OSError, ValueError, SystemExit):  # what is written to is gone: see Display
            return


class _LiveTable:
    """For a terminal."""

    def __init__(self, folder: Path, console: Console) -> None:
        self._folder, self._console = folder, console
        self._live = Live(Text(""), console=console, auto_refresh=False)

    def __enter__(self) -> _LiveTable:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def look(self) -> None:
        self._live.update(table(read(self._folder), self._console.width, self._console.height), refresh=True)


class _Lines:
    """For a pipe, a file and the log of a Ray job."""

    def __init__(self, folder: Path, display: Display) -> None:
        self._folder, self._display = folder, display
        self._seen = read(folder)

    def look(self) -> None:
        before, self._seen = self._seen, read(self._folder)
        for line in news(before, self._seen):
            self._display.note(line)


def news(before: SweepResult, now: SweepResult) -> Iterator[str]:
    """What has happened between two looks at a sweep, a line each."""
    states = {trial.number: trial.state for trial in before.trials}
    for trial in now.trials:
        was = states.get(trial.number, "waiting")
        if trial.state == was:
            continue
        if was == "waiting":
            yield f"trial {trial.number} starts: {told(trial.params)}"
        elif trial.state == "running":
            yield f"trial {trial.number} goes on after step {trial.step}: {told(trial.params)}"
        if trial.state not in ("waiting", "running"):
            yield f"trial {trial.number} {_ended(trial, now)}"
    leads, led = now.best, before.best
    if leads is not None and (led is None or leads.number != led.number):
        yield f"best so far: {best_told(now, leads)}"


def _ended(trial: TrialResult, sweep: SweepResult) -> str:
    of = f" of {trial.steps}" if trial.steps else ""
    how = {"done": "is done", "lost": "was lost"}.get(trial.state, trial.state)
    value = "" if trial.value is None else f", {sweep.metric} {written(sweep.metric, trial.value)} at best"
    return f"{how} after step {trial.step}{of}{value}" + (f": {trial.message}" if trial.message else "")


def best_told(sweep: SweepResult, best: TrialResult) -> str:
    """The best trial for a person."""
    value = "" if best.value is None else f", {sweep.metric} {written(sweep.metric, best.value)}"
    return f"trial {best.number}{value}, {told(best.params)}"


def told(params: Mapping[str, Any]) -> str:
    """A trial's parameters for a person, such as learning_rate=1e-05 lora_r=8."""
    return " ".join(f"{key}={value_told(value)}" for key, value in params.items())


def value_told(value: Any) -> str:
    """One parameter, with three digits of a number that was drawn."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def left_s(sweep: SweepResult) -> float | None:
    """Seconds until all trials are done, if none is stopped early and as many run as now; None = not known.

    Steps that are left, as long as those of the trial, or of the sweep so far, were; what a trial takes to start is not in it.
    """
    running = [trial for trial in sweep.trials if trial.state == "running"]
    seconds = [trial.curve.step_s for trial in sweep.trials if trial.curve.step_s is not None]
    if not running or not seconds or sweep.steps is None:
        return None
    usual = sum(seconds) / len(seconds)
    lefts = [max(0, (trial.steps or sweep.steps) - trial.step) * (trial.curve.step_s or usual) for trial in running]
    return max(*lefts, (sum(lefts) + _waiting(sweep) * sweep.steps * usual) / len(running))


def _waiting(sweep: SweepResult) -> int:
    """Trials that have not begun, also those that were not even made."""
    to_come = max(0, (sweep.planned or 0) - len(sweep.trials))
    return to_come + sum(trial.state == "waiting" for trial in sweep.trials)


def table(sweep: SweepResult, width: int, height: int) -> RenderableType:
    """The whole view, in a terminal of so many columns and lines."""
    best = sweep.best
    shown = _shown(sweep, best, max(3, height - AROUND_ROWS))
    parts: list[RenderableType] = [_head(sweep), _rows(sweep, shown, best, width)]
    if len(shown) < len(sweep.trials):
        parts.append(_one_line(Text(f"and {len(sweep.trials) - len(shown)} more", "dim")))
    parts.append(
        _one_line(Text(f"best: {best_told(sweep, best)}" if best else "no trial has a value yet", "bold" if best else "dim"))
    )
    return Group(*parts)


def _shown(sweep: SweepResult, best: TrialResult | None, rows: int) -> list[TrialResult]:
    """As many trials as fit, by number: the best, those that run, then better before worse."""
    first = sorted(sweep.ranked, key=lambda trial: (trial is not best, trial.state != "running"))
    return sorted(first[:rows], key=lambda trial: trial.number)


def _head(sweep: SweepResult) -> Text:
    counts = Counter({"waiting": _waiting(sweep)})
    counts.update(trial.state for trial in sweep.trials if trial.state != "waiting")
    text = Text.assemble((f"{sweep.folder.name}  ", "bold"), f"{sweep.metric} ({sweep.mode})")
    for state, style in STATES.items():
        if counts[state]:
            text.append(f"   {counts[state]} {state}", style)
    left = left_s(sweep)
    if left is not None:
        text.append(f"   at most {duration(left)} left", "dim")
    return _one_line(text)


def _rows(sweep: SweepResult, shown: list[TrialResult], best: TrialResult | None, width: int) -> Table:
    rows = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    keys = sweep.keys
    of_key = max(4, int(OF_PARAMS * width / max(1, len(keys))) - 1)
    rows.add_column("", width=1)
    rows.add_column("trial", justify="right", no_wrap=True)
    rows.add_column("state", no_wrap=True, min_width=7)
    for key in keys:
        rows.add_column(key.rpartition(".")[2], justify="right", no_wrap=True, max_width=of_key)
    for heading in ("step", "last", "best"):
        rows.add_column(heading, justify="right", no_wrap=True)
    fewest, most = CURVES
    rows.add_column("curve", no_wrap=True, overflow="ellipsis", ratio=1)
    for trial in shown:
        leads = trial is best
        step = f"{trial.step}/{trial.steps}" if trial.steps else str(trial.step)
        curve = (
            Text(trial.message, "red")
            if trial.state in UNFIT
            else Text(sparkline(trial.values[1], min(most, max(fewest, width // 5))), "cyan")
        )
        rows.add_row(
            Text("★" if leads else "", "bold yellow"),
            str(trial.number),
            Text(trial.state, STATES[trial.state]),
            *(value_told(trial.params[key]) if key in trial.params else "-" for key in keys),
            step,
            *("-" if value is None else written(sweep.metric, value) for value in (trial.last, trial.value)),
            curve,
            style="bold" if leads else "",
        )
    return rows


def _one_line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ellipsis"
    return text
