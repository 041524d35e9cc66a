"""The picture of a run: its metrics.jsonl as one PNG of curves.

`report` draws what `metrics.py` logged. A panel is a function that takes the axes and the run's curves; a new one
is a line in `PANELS`, and a panel whose metrics the run did not log says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter
from omegaconf import OmegaConf

from actors.errors import EaglerayError
from orchestrator.metrics import METRICS, METRICS_FILE, Kind, entry, read

WIDTH_PX, ROW_PX, DPI = 1600, 460, 100
BLUE, ORANGE, GREEN, RED, GREY = "#2f6fb5", "#e07b28", "#3a9a5b", "#c2413b", "#8a8f98"
FAMILY = ("#7b61b8", "#3a9a5b", "#c2413b", "#1fa3a3", "#b8860b", "#d1609f")
MARK_UP_TO = 40  # points: beyond that, markers and noise hide the trend

Points = tuple[list[float], list[float]]  # steps and values, of equal length


class Curves:
    """The values of a run, by metric: `train("loss")` gives the steps that have it and its values there."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        self._records = records

    def of(self, kind: Kind, name: str) -> Points:
        """Steps and values, of equal length, of the records that have the metric."""
        points = [(r["step"], r[name]) for r in self._records if r["kind"] == kind and name in r]
        return [step for step, _ in points], [value for _, value in points]

    def train(self, name: str) -> Points:
        """`of` for the training steps."""
        return self.of("train", name)

    def family(self, key: str) -> list[str]:
        """The training metrics that belong to a family of METRICS, such as `reward/*`, in order of name."""
        names = {name for r in self._records if r["kind"] == "train" for name in r if name not in ("time", "kind")}
        return sorted(name for name in names if entry(name)[0] == key)


def report(output_dir: Path, out: Path | None = None) -> Path:
    """Draw the curves of the run in `output_dir` to `out`, by default its report.png, and return that path.

    Raises EaglerayError when the folder has no metrics.jsonl or that holds no training step yet.
    """
    path = output_dir / METRICS_FILE
    records = read(path)
    if not any(record["kind"] == "train" for record in records):
        raise EaglerayError(f"{path} holds no training step yet; report again after the first step")
    curves = Curves(records)
    of_rows = any(curves.train(name)[0] for name in ("token_accuracy", "pair_accuracy", "reward_chosen"))
    panels = DATASET_PANELS if of_rows else PANELS
    rows = len(panels) // 2
    figure = new_figure(rows * ROW_PX)
    figure.suptitle(_title(output_dir), fontsize=17, fontweight="bold")
    last = max(record["step"] for record in records)
    for axes, (title, draw) in zip(figure.subplots(rows, 2).flat, panels.items(), strict=True):
        frame(axes, title)
        axes.set_xlabel("step")
        axes.set_xlim(-0.02 * last - 0.5, 1.02 * last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw(axes, curves)
        twins = axes.get_shared_x_axes().get_siblings(axes)
        if not any(one.has_data() for one in twins):
            say(axes, "no data")
    return save(figure, out or output_dir / "report.png")


def new_figure(height_px: int) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(WIDTH_PX / DPI, height_px / DPI), dpi=DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """As PNG, into a folder that need not be there yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=DPI)
    return path


def _title(output_dir: Path) -> str:
    """The run's name and, if its config.yaml is there, the model it trains."""
    name = output_dir.resolve().name
    config = output_dir / "config.yaml"
    model = OmegaConf.select(OmegaConf.load(config), "base_model") if config.is_file() else None
    return f"{name}: {model}" if model else name


def frame(axes: Axes, title: str) -> None:
    """How every panel looks."""
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold")
    axes.grid(True, color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def say(axes: Axes, text: str) -> None:
    """In a panel that has nothing to show."""
    axes.text(0.5, 0.5, text, {"color": GREY, "size": 13, "ha": "center"}, transform=axes.transAxes)
    axes.set_yticks([])


def _line(axes: Axes, points: Points, label: str, color: str, width: float = 1.8) -> None:
    """A curve with a mark per step; one of many steps is drawn faint, below its running mean."""
    steps, values = points
    if not any(math.isfinite(value) for value in values):
        return
    if len(steps) <= MARK_UP_TO:
        axes.plot(steps, values, "o-", label=label, color=color, linewidth=width, markersize=3.5)
    else:
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(steps, running_mean(values), label=label, color=color, linewidth=width)


def running_mean(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, 2 % of the run to either side, over those that are finite."""
    reach = max(1, len(values) // 50)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.minimum(np.arange(len(values)) + reach + 1, len(values))
    starts = np.maximum(np.arange(len(values)) - reach, 0)
    near = counts[ends] - counts[starts]
    means: list[float] = np.where(near > 0, (sums[ends] - sums[starts]) / np.maximum(near, 1), math.nan).tolist()
    return means


def _twin(axes: Axes, curves: Curves, left: str, right: str, labels: tuple[str, str], share: bool) -> None:
    """Two metrics of different units over the same steps; each axis has the colour of its curve."""
    _line(axes, curves.train(left), left, BLUE)
    axes.set_ylabel(labels[0], color=BLUE)
    other = axes.twinx()
    _line(other, curves.train(right), right, ORANGE)
    if not other.has_data():
        other.remove()
        return
    other.spines["top"].set_visible(False)
    other.set_ylabel(labels[1], color=ORANGE)
    if share:
        other.yaxis.set_major_formatter(PercentFormatter(1.0))
        other.set_ylim(bottom=0, top=None if any(value > 0 for value in curves.train(right)[1]) else 1)
    if not axes.has_data():
        axes.set_yticks([])
        axes.set_ylabel("")


def _legend(axes: Axes, loc: Literal["best", "upper left"] = "best", ncols: int = 1) -> None:
    if axes.has_data():
        axes.legend(loc=loc, ncols=ncols, framealpha=0.8, edgecolor="none")


def _reward(axes: Axes, curves: Curves) -> None:
    functions = curves.family("reward/*")
    for index, name in enumerate(functions):
        _line(axes, curves.train(name), name.removeprefix("reward/"), FAMILY[index % len(FAMILY)], 1.2)
    _line(axes, curves.train("reward"), "weighted sum", BLUE, width=2.2)
    steps, rewards = curves.of("eval", "eval/reward")
    if steps:
        axes.plot(steps, rewards, "D-", label="held-out prompts", color=RED, markersize=7, linewidth=1.2)
    axes.set_ylabel("mean reward")
    _legend(axes)


def _accuracy(axes: Axes, curves: Curves) -> None:
    _line(axes, curves.train("accuracy"), "training prompts", BLUE)
    steps, shares = curves.of("eval", "eval/accuracy")
    if steps:
        axes.plot(steps, shares, "D-", label="held-out prompts", color=RED, markersize=7, linewidth=1.2)
        for step, share in {steps[0]: shares[0], steps[-1]: shares[-1]}.items():
            label = axes.annotate(f"{100 * share:.1f} %", (step, share), (0, 9), textcoords="offset points")
            label.set(ha="center", color=RED)
            label.set_bbox({"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5})
    axes.set_ylabel("completions that are right")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    highest = max([0.01, *filter(math.isfinite, [*curves.train("accuracy")[1], *shares])])
    axes.set_ylim(0, min(1.05, 1.25 * highest))
    _legend(axes)


def _length(axes: Axes, curves: Curves) -> None:
    labels = ("mean completion length [tokens]", "completions cut at the limit")
    _twin(axes, curves, "completion_length", "truncated", labels, share=True)


def _kl(axes: Axes, curves: Curves) -> None:
    _twin(
        axes,
        curves,
        "kl",
        "clip_fraction",
        ("KL to the reference [nats/token]", "tokens clipped"),
        share=True,
    )


def _loss(axes: Axes, curves: Curves) -> None:
    _twin(axes, curves, "loss", "grad_norm", ("loss [nats]", "gradient norm before clipping"), share=False)


def _gaps(axes: Axes, curves: Curves) -> None:
    names = {"engine_gap": ("sampled tokens", BLUE), "probe_gap": ("probe after the sync", ORANGE)}
    values: list[float] = []
    for name, (label, color) in names.items():
        points = curves.train(name)
        values += points[1]
        _line(axes, points, label, color)
    # A broken sync is orders of magnitude above bf16 noise; below one order a linear axis reads better.
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.set_ylabel(f"|trainer - engine logprob| [{METRICS['engine_gap'][0]}]")
    _legend(axes)


def _seconds(axes: Axes, curves: Curves) -> None:
    parts = {
        "sample": ("sample_s", BLUE),
        "score": ("score_s", GREEN),
        "train": ("train_s", ORANGE),
        "sync": ("sync_s", RED),
    }
    floor: dict[float, float] = {}
    for label, (name, color) in parts.items():
        steps, values = curves.train(name)
        if not steps:
            continue
        bottoms = [floor.get(step, 0.0) for step in steps]
        if len(steps) <= MARK_UP_TO:
            axes.bar(steps, values, 0.8, bottoms, label=label, color=color)
        else:
            values = running_mean(values)
            tops = [bottom + value for bottom, value in zip(bottoms, values, strict=True)]
            axes.fill_between(steps, bottoms, tops, label=label, color=color, linewidth=0)
        floor |= {step: bottom + value for step, bottom, value in zip(steps, bottoms, values, strict=True)}
    # The parts overlap when sampling runs ahead of training: then they add up to more than the step took.
    _line(axes, curves.train("step_s"), "whole step", "#22262b", width=1.2)
    axes.set_ylabel("time per step [s]")
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])  # room for the legend, which bars leave nowhere else
    _legend(axes, "upper left", ncols=5)


def _speed(axes: Axes, curves: Curves) -> None:
    _line(axes, curves.train("tokens_per_s"), "tokens_per_s", BLUE)
    axes.set_ylabel("completion tokens / s")
    if axes.has_data():
        axes.set_ylim(bottom=0)


def _held_out(axes: Axes, curves: Curves, names: dict[str, tuple[str, str]], unit: str) -> None:
    """Training curves, and the held-out values of the same metrics as marks. names: metric -> label, color."""
    for name, (label, color) in names.items():
        _line(axes, curves.train(name), label, color)
        steps, values = curves.of("eval", f"eval/{name}")
        if steps:
            axes.plot(steps, values, "D--", label=f"{label}, held out", color=color, markersize=6, linewidth=1)
    axes.set_ylabel(unit)
    _legend(axes)


def _row_loss(axes: Axes, curves: Curves) -> None:
    _held_out(axes, curves, {"loss": ("loss", BLUE)}, "loss [nats]")


def _row_accuracy(axes: Axes, curves: Curves) -> None:
    names = {"token_accuracy": ("tokens right", BLUE), "pair_accuracy": ("pairs right", ORANGE)}
    _held_out(axes, curves, names, "share")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _row_rewards(axes: Axes, curves: Curves) -> None:
    names = {
        "reward_chosen": ("better answers", GREEN),
        "reward_rejected": ("worse answers", RED),
        "reward_margin": ("difference", BLUE),
    }
    _held_out(axes, curves, names, "reward")


def _row_gradient(axes: Axes, curves: Curves) -> None:
    _twin(axes, curves, "grad_norm", "learning_rate", ("gradient norm before clipping", "learning rate"), share=False)


DATASET_PANELS: dict[str, Callable[[Axes, Curves], None]] = {
    "Loss": _row_loss,
    "Accuracy": _row_accuracy,
    "Rewards": _row_rewards,
    "Gradient and learning rate": _row_gradient,
}

PANELS: dict[str, Callable[[Axes, Curves], None]] = {
    "Reward": _reward,
    "Accuracy": _accuracy,
    "Completion length": _length,
    "KL and clipping": _kl,
    "Loss and gradient": _loss,
    "Trainer against engine": _gaps,
    "Where the time goes": _seconds,
    "Speed": _speed,
}
