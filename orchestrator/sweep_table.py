"""A sweep in the terminal while it goes: `with watching(folder):` around whatever runs it.

A thread looks into the sweep's folder once a second. A terminal shows a table that is drawn anew (sweep_frame.py); elsewhere
a trial gets a line when it starts and when it ends, and so does each new leader. Showing is never a reason to stop.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from actors.errors import EaglerayError
from orchestrator.display import Display
from orchestrator.sweep_frame import best_told, ended, table, told
from orchestrator.sweep_results import SweepResult, read

EVERY_S = 1.0


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
            yield f"trial {trial.number} {ended(trial, now)}"
    leads, led = now.best, before.best
    if leads is not None and (led is None or leads.number != led.number):
        yield f"best so far: {best_told(now, leads)}"
