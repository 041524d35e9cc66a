"""The panels of a sweep's picture: the curves of its trials, and which parameters led where.

The better a trial, the darker; the best is red, and one that failed or has no value is grey and dashed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

from orchestrator.display import written
from orchestrator.report import BLUE, GREY, MARK_UP_TO, RED, frame, say
from orchestrator.sweep_frame import told, value_told
from orchestrator.sweep_results import UNFIT, SweepResult, TrialResult

NAMED = 6  # curves that the legend tells of
LONGEST = 26  # letters of a value
LETTERS_OF_PARAMS = 60  # in the legend
CATEGORIES = 8  # values that an axis has side by side as such
LOG_FROM = 30  # times the least value of an axis that the most is, for a logarithmic one where the space does not say
SHADES = LinearSegmentedColormap.from_list("worse to better", ("#cfd6df", BLUE, "#0f2a50"))
DASHES = (0, (4, 3))


@dataclass(frozen=True)
class Look:
    """How trials are drawn: the better, the darker."""

    best: TrialResult | None
    norm: Normalize
    shades: Colormap

    @classmethod
    def of(cls, sweep: SweepResult) -> Look:
        values = [trial.value for trial in sweep.trials if trial.value is not None]
        low, high = bounds(values) if values else (0.0, 1.0)
        return cls(sweep.best, Normalize(low, high, clip=True), SHADES if sweep.mode == "max" else SHADES.reversed())

    def line(self, trial: TrialResult) -> dict[str, Any]:
        """Keywords of a line."""
        if trial is self.best:
            return {"color": RED, "linewidth": 2.8, "zorder": 5}
        if trial.state in UNFIT or trial.value is None:
            return {"color": GREY, "linewidth": 1.2, "linestyle": DASHES, "zorder": 2}
        return {"color": self.shades(self.norm(trial.value)), "linewidth": 1.5, "zorder": 3}

    def bar(self, axes: Axes, label: str) -> None:
        """What the shades mean."""
        assert axes.figure is not None
        bar = axes.figure.colorbar(ScalarMappable(self.norm, self.shades), ax=axes, pad=0.01, aspect=30)
        bar.set_label(label)
        bar.outline.set_visible(False)  # type: ignore[operator]


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """The range to draw: of all values, unless a few lie so far off that they would press the others into a line."""
    low, high = min(values), max(values)
    q1, q3 = np.quantile(values, (0.1, 0.9))
    reach = 2 * (q3 - q1)
    if reach > 0:
        low, high = max(low, q1 - reach), min(high, q3 + reach)
    return (float(low), float(high)) if high > low else (low - 0.5, high + 0.5)


def curves(axes: Axes, sweep: SweepResult, look: Look) -> None:
    frame(axes, "Curves")
    axes.set_xlabel("step")
    axes.set_ylabel(sweep.metric)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    named = {trial.number for trial in sweep.ranked[:NAMED] if trial.value is not None}
    seen: list[float] = []
    for trial in sorted(sweep.trials, key=lambda trial: (trial.number not in named, sweep.ranked.index(trial))):
        points = [(step, value) for step, value in zip(*trial.values, strict=True) if math.isfinite(value)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        seen += values
        label = f"trial {trial.number}: {short(told(trial.params), LETTERS_OF_PARAMS)}" if trial.number in named else None
        mark = "o" if len(points) <= MARK_UP_TO else ""
        axes.plot(steps, values, marker=mark, markersize=3.5, label=label, **look.line(trial))
        if trial.number in named:
            axes.annotate(f"{trial.number}", (steps[-1], values[-1]), (6, 4), textcoords="offset points", fontsize=9, zorder=6)
        if trial.state in UNFIT:
            axes.plot(steps[-1:], values[-1:], "x", color=GREY, markersize=9, markeredgewidth=2, zorder=4)
    if not seen:
        say(axes, "no trial has a value yet")
        return
    low, high = bounds(seen)
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    handles = axes.get_legend_handles_labels()[0]
    if any(trial.state in UNFIT for trial in sweep.trials):
        handles.append(Line2D([], [], color=GREY, linestyle=DASHES, marker="x", label="failed"))
    axes.legend(handles=handles, loc="best", framealpha=0.85, edgecolor="none", fontsize=9)


@dataclass(frozen=True)
class Scale:
    """An axis from 0 to 1 for the values of a parameter, or of the metric."""

    kind: Literal["categories", "log", "linear"]
    values: tuple[Any, ...]  # the categories in their order; else the least and the most

    @classmethod
    def of(cls, values: Sequence[Any], space: str = "") -> Scale:
        """values: those that trials have. space: what they may be, as sweep.json says it."""
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            ordered = sorted(values, key=value_told)
            return cls("categories", tuple(value for i, value in enumerate(ordered) if value not in ordered[:i]))
        kind = space.partition(" ")[0]  # such as loguniform
        drawn = kind not in ("", "grid", "choice")  # from a range
        distinct = tuple(sorted(set(values)))
        if not drawn and len(distinct) <= CATEGORIES:
            return cls("categories", distinct)
        low, high = distinct[0], distinct[-1]
        over_decades = kind.startswith("log") or (not drawn and high >= LOG_FROM * low)
        return cls("log" if low > 0 and over_decades else "linear", (low, high))

    def at(self, value: Any) -> float:
        """Where a value lies; one beyond the ends lies at the end."""
        if self.kind == "categories":
            return self.values.index(value) / (len(self.values) - 1) if len(self.values) > 1 else 0.5
        low, high = self.values
        if low == high:
            return 0.5
        share = math.log(value / low) / math.log(high / low) if self.kind == "log" else (value - low) / (high - low)
        return min(1.0, max(0.0, share))

    def ticks(self) -> list[Any]:
        """Values to write beside it."""
        if self.kind == "categories":
            return list(self.values)
        low, high = self.values
        locator = LogLocator(subs=(1.0, 2.0, 5.0)) if self.kind == "log" else MaxNLocator(6)
        inside = [float(f"{tick:.12g}") for tick in locator.tick_values(low, high) if low <= tick <= high]
        return inside if len(inside) > 1 else sorted({low, high})


def scatter(axes: Axes, sweep: SweepResult, look: Look) -> None:
    """The metric over the one parameter that there is."""
    (key,) = sweep.keys
    frame(axes, f"{sweep.metric} by {key}")
    scale = _scale(sweep, key)
    for trial in sweep.trials:
        if trial.value is None or key not in trial.params:
            continue
        mark = "x" if trial.state in UNFIT else "o"
        axes.plot(scale.at(trial.params[key]), trial.value, mark, markersize=9, markeredgewidth=2, **look.line(trial))
    ticks = scale.ticks()
    axes.set_xticks([scale.at(tick) for tick in ticks], [short(value_told(tick)) for tick in ticks])
    axes.set_xlim(-0.04, 1.04)
    axes.set_xlabel(key)
    axes.set_ylabel(f"{sweep.metric}, best of a trial")
    if values := [trial.value for trial in sweep.trials if trial.value is not None]:
        low, high = bounds(values)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    else:
        say(axes, "no trial has a value yet")


def parallel(axes: Axes, sweep: SweepResult, look: Look) -> None:
    """A line a trial through its parameters to the metric."""
    axes.set_title("Parameters", loc="left", fontsize=13, fontweight="bold")
    axes.spines[:].set_visible(False)
    keys = sweep.keys
    scales = {key: _scale(sweep, key) for key in keys}
    values = [trial.value for trial in sweep.trials if trial.value is not None]
    metric = Scale("linear", bounds(values)) if values else None
    for trial in reversed(sweep.ranked):
        there = [(x, scales[key].at(trial.params[key])) for x, key in enumerate(keys) if key in trial.params]
        if metric and trial.value is not None:
            there.append((len(keys), metric.at(trial.value)))
        axes.plot(*zip(*there, strict=True), **look.line(trial), alpha=0.9)
    for x, scale in enumerate([*scales.values(), metric]):
        axes.axvline(x, color="#22262b", linewidth=1.0, zorder=4)
        for tick in scale.ticks() if scale else ():
            text = value_told(tick) if x < len(keys) else written(sweep.metric, tick)
            mark = axes.annotate(short(text), (x, scale.at(tick) if scale else 0), (5, 0), textcoords="offset points")
            mark.set(va="center", fontsize=9, zorder=6)
            mark.set_bbox({"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.5})
    axes.set_xticks(range(len(keys) + 1), [*(short(key) for key in keys), sweep.metric], fontsize=11, fontweight="bold")
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set_yticks([])
    axes.set_xlim(-0.1, len(keys) + 0.35)
    axes.set_ylim(-0.05, 1.05)
    if values:
        look.bar(axes, sweep.metric)


def _scale(sweep: SweepResult, key: str) -> Scale:
    values = [trial.params[key] for trial in sweep.trials if key in trial.params]
    return Scale.of(values, str(sweep.space.get(key, "")))


def short(text: str, letters: int = LONGEST) -> str:
    """A text cut to so many letters."""
    return text if len(text) <= letters else text[: letters - 1] + "…"
