"""A sweep as text for a terminal: a row a trial, its curve in small. It computes and draws, and asks nobody."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.display import duration, written
from orchestrator.frame import one_line, sparkline
from orchestrator.sweep_results import UNFIT, SweepResult, TrialResult

FAILURES = 3  # that are told below the table
AROUND_ROWS = 7 + FAILURES  # lines of a terminal that the table's rows leave to the rest, and to the prompt
CURVES = (12, 30)  # columns of a curve, fewest and most
NARROWEST = 5  # letters of a parameter
GAP = 2  # columns between columns
STAR = "★  "
STATES = {  # in the order in which they are counted up
    "running": "green",
    "waiting": "dim",
    "done": "bold green",
    "stopped": "yellow",
    "failed": "bold red",
    "lost": "bold red",
}


def table(sweep: SweepResult, width: int, height: int) -> RenderableType:
    """The whole view, in a terminal of so many columns and lines."""
    best = sweep.best
    shown = _shown(sweep, best, max(3, height - AROUND_ROWS))
    rows, left_out = _rows(sweep, shown, best, width)
    parts: list[RenderableType] = [*_head(sweep), rows]
    hidden = [f"{len(sweep.trials) - len(shown)} more trials"] if len(shown) < len(sweep.trials) else []
    if hidden := [*hidden, *left_out]:
        parts.append(one_line(Text(f"no room for {', '.join(hidden)}", "dim")))
    unfit = [trial for trial in sweep.trials if trial.state in UNFIT]
    parts += [one_line(Text(f"trial {trial.number} {ended(trial, sweep)}", "red")) for trial in unfit[-FAILURES:]]
    leader = Text(f"best: {best_told(sweep, best)}", "bold") if best else Text("there is no best trial yet", "dim")
    return Group(*parts, one_line(leader))


def _shown(sweep: SweepResult, best: TrialResult | None, rows: int) -> list[TrialResult]:
    """As many trials as fit, by number: the best, those that run, then better before worse."""
    first = sorted(sweep.ranked, key=lambda trial: (trial is not best, trial.state != "running"))
    return sorted(first[:rows], key=lambda trial: trial.number)


def _head(sweep: SweepResult) -> list[Text]:
    title = Text.assemble((sweep.folder.name, "bold"), f"  {sweep.metric} ({sweep.mode})")
    left = left_s(sweep)
    if left is not None:
        title.append(f"  about {duration(left)} left", "dim")
    counts = Counter({"waiting": _waiting(sweep)})
    counts.update(trial.state for trial in sweep.trials if trial.state != "waiting")
    counted = Text("  ").join(Text(f"{counts[state]} {state}", style) for state, style in STATES.items() if counts[state])
    return [one_line(title), one_line(counted)]


def _rows(sweep: SweepResult, shown: list[TrialResult], best: TrialResult | None, width: int) -> tuple[Table, list[str]]:
    """Columns as wide as what is in them; parameters give way where that is too much, and curves get what is left.

    Also returns the parameters that there was no room for.
    """
    cells = columns(sweep, shown)
    params = {key: cells[key] for key in sweep.keys}
    headings = {name: name.rpartition(".")[2] for name in cells}
    wide = {name: max(map(len, (headings[name], *column))) for name, column in cells.items()}
    _narrow(wide, params, width - len(STAR) - CURVES[0])
    curve = width - len(STAR) - sum(wide.values()) - GAP * len(wide)
    rows = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    rows.add_column(width=1)
    for name, letters in wide.items():
        side: JustifyMethod = "left" if name == "state" else "right"
        rows.add_column(headings[name], width=letters, justify=side, no_wrap=True, overflow="ellipsis")
    rows.add_column("curve", width=curve, no_wrap=True)
    for i, trial in enumerate(shown):
        rows.add_row(
            Text(STAR.strip() if trial is best else "", "bold yellow"),
            *(Text(cells[name][i], STATES[trial.state] if name == "state" else "") for name in wide),
            Text(sparkline(trial.values[1], min(curve, CURVES[1])), "red" if trial.state in UNFIT else "cyan"),
            style="bold" if trial is best else "",
        )
    return rows, [key for key in params if key not in wide]


def columns(sweep: SweepResult, trials: Sequence[TrialResult]) -> dict[str, list[str]]:
    """What a table says of trials, by column."""
    return {
        "trial": [str(trial.number) for trial in trials],
        "state": [trial.state for trial in trials],
        **{key: [value_told(trial.params[key]) if key in trial.params else "-" for trial in trials] for key in sweep.keys},
        "step": [f"{trial.step}/{trial.steps}" if trial.steps else str(trial.step) for trial in trials],
        "last": [_value_told(sweep, trial.last) for trial in trials],
        "best": [_value_told(sweep, trial.value) for trial in trials],
    }


def _narrow(wide: dict[str, int], params: Mapping[str, list[str]], width: int) -> None:
    """Cuts headings and words of parameters, the widest first, then leaves out the last parameters, until all columns fit.

    A number is never cut: it would read as another.
    """
    least = {key: max(map(len, (key[:NARROWEST], *filter(_is_number, values)))) for key, values in params.items()}
    while sum(wide.values()) + GAP * len(wide) > width:
        there = [key for key in params if key in wide]
        if loose := [key for key in there if wide[key] > least[key]]:
            wide[max(loose, key=lambda key: wide[key])] -= 1
        elif there:
            del wide[there[-1]]
        else:
            return


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _value_told(sweep: SweepResult, value: float | None) -> str:
    return "-" if value is None else written(sweep.metric, value)


def ended(trial: TrialResult, sweep: SweepResult) -> str:
    """How a trial came to its end, for a person."""
    of = f" of {trial.steps}" if trial.steps else ""
    how = {"done": "is done", "lost": "was lost"}.get(trial.state, trial.state)
    why = f": {trial.message}" if trial.message else ""
    value = "" if trial.value is None else f", {sweep.metric} {written(sweep.metric, trial.value)} at best"
    return f"{how} after step {trial.step}{of}{why}{value}"


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
        return json.dumps(value)
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
