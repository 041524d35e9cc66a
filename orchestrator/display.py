"""What a run shows in the terminal while it goes.

A header, one table row per step, a line per evaluation, a summary: lines are only ever appended, so a terminal,
a pipe, a file and `ray job logs` show the same text. A terminal has colour and, below the last line, a spinner
with what the run is waiting for. A column of the table is a line in ONLINE_COLUMNS or DATASET_COLUMNS; its number
comes from the step's record (`metrics.py`), and WRITTEN says how it is written.

Showing is never a reason to stop: when the other end of stdout is gone, the run goes on in silence.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.status import Status
from rich.text import Text

Record = Mapping[str, float]

HEADER_EVERY = 20  # rows: the header stays in sight on a terminal of common height
PROGRESS_EVERY_S = 30.0
RECENT_STEPS = 10  # the ETA follows the last steps: lengths, and so times, drift while a policy learns
WIDE = 96  # columns from which the table can afford two spaces between columns


def number(value: float, decimals: int, width: int = 6) -> str:
    """A number for a narrow column: fixed decimals, or an exponent where those would show 0 or overflow."""
    if not math.isfinite(value):
        return str(value)
    text = f"{value:.{decimals}f}"
    if len(text) <= width and (value == 0 or float(text) != 0):
        return text
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def percent(share: float) -> str:
    """`0.125` as `12.5 %`."""
    return f"{100 * share:.1f} %"


def gib(count: float) -> str:
    """Bytes as `1.5 GiB`."""
    return f"{count / 2**30:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people, in at most two units: `8s`, `4m05s`, `2h07m`, `3d04h`."""
    s = round(seconds)
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _seconds(value: float) -> str:
    return f"{value:.2f}s" if value < 10 else f"{value:.1f}s"


# How a metric is written, wherever a person reads it; a metric that is not here has three decimals.
WRITTEN: dict[str, Callable[[float], str]] = {
    **dict.fromkeys(("accuracy", "token_accuracy", "pair_accuracy", "truncated"), percent),
    **dict.fromkeys(("sample_s", "score_s", "train_s", "sync_s", "step_s"), _seconds),
    "loss": lambda value: number(value, 4, 7),
    "kl": lambda value: number(value, 4),
    "grad_norm": lambda value: number(value, 2),
    "learning_rate": lambda value: number(value, 6),
    "completion_length": lambda value: number(value, 1),
    "staleness": lambda value: number(value, 1, 5),
    "tokens_per_s": lambda value: number(value, 0),
}


def written(metric: str, value: float) -> str:
    """A metric's value for people, also of one of held-out rows, such as eval/loss."""
    write = WRITTEN.get(metric.removeprefix("eval/"))
    return write(value) if write else number(value, 3)


Columns = Mapping[str, tuple[int, str]]  # heading -> (width, the record's metric)

# With 4-digit steps and the ETA, 80 columns in all.
ONLINE_COLUMNS: Columns = {
    "reward": (6, "reward"),
    "accuracy": (8, "accuracy"),
    "length": (6, "completion_length"),
    "KL": (6, "kl"),
    "stale": (5, "staleness"),
    "sample": (6, "sample_s"),
    "train": (6, "train_s"),
    "sync": (6, "sync_s"),
    "tok/s": (6, "tokens_per_s"),
}
_LOSS: Columns = {"loss": (7, "loss"), "grad": (6, "grad_norm"), "rate": (7, "learning_rate")}
_PAIRS: Columns = {"margin": (7, "reward_margin"), "accuracy": (8, "pair_accuracy")}
_TIME: Columns = {"step time": (9, "step_s")}
DATASET_COLUMNS: dict[str | None, Columns] = {
    None: {**_LOSS, "tokens right": (12, "token_accuracy"), **_TIME},
    "kto": {**_LOSS, "liked": (7, "reward_chosen"), "disliked": (8, "reward_rejected"), "KL": (6, "kl"), **_TIME},
    **dict.fromkeys(("dpo", "ipo", "orpo", "reward_trainer"), {**_LOSS, **_PAIRS, **_TIME}),
}
# What is said of held-out rows: words -> metric
HELD_OUT = {
    "loss": "eval/loss",
    "tokens right": "eval/token_accuracy",
    "margin": "eval/reward_margin",
    "pair accuracy": "eval/pair_accuracy",
}


@dataclass
class _Phase:
    """What a run is waiting for."""

    name: str
    began: float  # time.monotonic()
    done: str = ""  # such as: 12,000 of 90,000


class Display:
    """The run's voice in the terminal; every method prints and returns, and none raises over a lost stdout.

    Without a console it writes to stdout, in colour only where stdout is a terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.columns = ONLINE_COLUMNS  # a job of another shape sets its own
        self.listener: Callable[[str, str], object] = lambda kind, text: None  # hears what is waited for, and warnings
        if console is None:
            # Asked here, since rich would take FORCE_COLOR, common in job environments, for a terminal.
            console = Console(force_terminal=sys.stdout is not None and sys.stdout.isatty())
        self.steps_done = 0
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._lost = False
        self._began = time.monotonic()
        self._rows = 0
        self._step_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._phases: list[_Phase] = []  # the last one shows
        self._told = 0.0  # time.monotonic() of the last line about progress
        self._announced: set[str] = set()
        self._status: Status | None = None
        self._evaluations: list[tuple[str, str]] = []  # such as: accuracy, 12.5 % (before training)
        self._held_out: list[Record] = []

    def header(self, title: str, lines: Sequence[str]) -> None:
        """What is about to run: a title and the lines below it."""
        self._block(title, lines)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what the run is waiting for while the block runs; phases may nest, and the innermost shows.

        A terminal shows a spinner and the seconds so far. Elsewhere each phase gets one line, the first time, and
        only until the first step's row: from then on the rows tell that the run moves.
        """
        self._phases.append(_Phase(name, time.monotonic()))
        self.listener("phase", name)
        if self._live:
            self._guard(self._start_spinner)
        elif self._rows == 0 and name not in self._announced:
            self._announced.add(name)
            self._print(f"{name} ...")
        try:
            yield
        finally:
            self._phases.pop()
            if not self._phases and self._status is not None:
                self._guard(self._status.stop)
                self._status = None

    def progress(self, done: int, total: int) -> None:
        """How far the innermost phase is, beside the spinner; elsewhere a line now and then."""
        phase = self._phases[-1]
        phase.done = f"{done:,} of {total:,}"
        if not self._live and time.monotonic() - max(phase.began, self._told) > PROGRESS_EVERY_S:
            self._told = time.monotonic()
            self._print(f"{phase.name}: {phase.done}")

    def step(self, record: Record, max_steps: int) -> None:
        """One row of the table; a metric that the record lacks, or that is NaN, shows as `-`. The record must hold `step`."""
        step = self.steps_done = int(record["step"])
        if "step_s" in record:
            self._step_s.append(record["step_s"])
        left_s = (max_steps - step) * sum(self._step_s) / len(self._step_s) if self._step_s else math.nan
        cells = [(max(5, 2 * len(str(max_steps)) + 1), "step", f"{step}/{max_steps}")]
        for heading, (width, name) in self.columns.items():
            known = not math.isnan(record.get(name, math.nan))
            cells.append((width, heading, written(name, record[name]) if known else "-"))
        cells.append((6, "ETA", duration(left_s) if math.isfinite(left_s) else "-"))
        gap = "  " if self._console.width >= WIDE else " "
        if self._rows % HEADER_EVERY == 0:
            self._print(gap.join(heading.rjust(width) for width, heading, _ in cells), "bold")
        self._print(gap.join(text.rjust(width) for width, _, text in cells))
        self._rows += 1

    def evaluation(self, label: str, record: Record, solved: int, total: int) -> None:
        """One line for an evaluation: `solved` of `total` held-out completions were right; a total of 0: nobody can say."""
        reward = number(record["eval/reward"], 2) if "eval/reward" in record else ""
        what, value, line = "reward", reward, f"reward {reward}"
        if total:
            what, value = "accuracy", percent(solved / total)
            line = f"accuracy {value} ({solved}/{total})" + (f", {line}" if reward else "")
        self._evaluations.append((what, f"{value} ({label})"))
        self._print(f"held-out {line}  [{label}]", "bold green")

    def held_out(self, record: Record) -> None:
        """One line for an evaluation on held-out rows, with whatever of HELD_OUT the record has."""
        self._held_out.append(record)
        shown = [f"{words} {written(name, record[name])}" for words, name in HELD_OUT.items() if name in record]
        self._print(f"held-out {', '.join(shown)}  [after step {int(record['step'])}]", "bold green")

    def note(self, text: str) -> None:
        """A line that people may want to know."""
        self._print(text)

    def warn(self, text: str) -> None:
        """A line that people should act on."""
        self.listener("warning", text)
        self._print(f"warning: {text}", "yellow")

    def summary(self, title: str, lines: Sequence[str]) -> None:
        """How it ended: what the first and the last evaluation found, `lines`, and the wall time."""
        shown = [text for _, text in self._evaluations]
        gain = [f"held-out {self._evaluations[0][0]} {' -> '.join(shown[:1] + shown[1:][-1:])}"] if shown else []
        if self._held_out:
            first, last = self._held_out[0], self._held_out[-1]
            for words, name in HELD_OUT.items():
                if name in first and name in last:
                    gain.append(f"held-out {words} {written(name, first[name])} -> {written(name, last[name])}")
        self._block(title, [*gain, *lines, f"wall time {duration(time.monotonic() - self._began)}"])

    def _block(self, title: str, lines: Sequence[str]) -> None:
        self._print("")
        self._print(title, "bold")
        for line in lines:
            self._print(f"  {line}")
        self._print("")

    def _print(self, line: str, style: str = "") -> None:
        encoding = self._console.encoding
        text = Text(line.encode(encoding, "replace").decode(encoding), style)
        # soft_wrap: rich would otherwise break a long line at the width it guesses for a file, 80.
        self._guard(lambda: self._console.print(text, soft_wrap=True))

    def _start_spinner(self) -> None:
        if self._status is None:
            self._status = self._console.status(_Waiting(self._phases))
            self._status.start()

    def _guard(self, show: Callable[[], None]) -> None:
        """Run something that writes; once stdout is closed or its reader is gone, write nothing more."""
        if self._lost:
            return
        try:
            show()
        except (OSError, ValueError, SystemExit):
            # ValueError is Python's word for a closed file, SystemExit rich's answer to a broken pipe.
            self._lost = True


class _Waiting:
    """The spinner's text; rich asks for it at every redraw, and so the seconds run."""

    def __init__(self, phases: list[_Phase]) -> None:
        self._phases = phases

    def __rich__(self) -> Text:
        # A copy, since rich draws from a thread of its own while the run may leave the last phase.
        for phase in self._phases[-1:]:
            since = duration(time.monotonic() - phase.began)
            return Text.assemble(phase.name, (f"  {phase.done}" if phase.done else "", "bold"), (f"  {since}", "dim"))
        return Text("")
