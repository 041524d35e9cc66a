"""The pictures and the table of a sweep, in its folder: report.png, report-best.png and trials.csv.

report.png has the panels of sweep_drawing.py: the curves of all trials, and below them parallel coordinates, or a scatter where
there is one parameter.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.transforms import Bbox

from actors.errors import EaglerayError
from orchestrator.display import written
from orchestrator.report import DPI, GREY, RED, WIDTH_PX, new_figure, save
from orchestrator.sweep_drawing import Look, curves, parallel, scatter, short
from orchestrator.sweep_frame import columns
from orchestrator.sweep_results import UNFIT, SweepResult, read

PANEL_PX, ROW_PX, AROUND_TABLE_PX = 620, 34, 80
LISTED = 15  # trials in the table of the best
LETTER = 0.6  # width of a letter, in its size


def report(folder: Path) -> list[Path]:
    """Writes all that there is to see of a sweep, also while it runs, and returns the paths.

    Raises EaglerayError when the folder holds no sweep, or one without a trial.
    """
    sweep = read(folder)
    return [
        draw(sweep, sweep.folder / "report.png"),
        _draw_best(sweep, sweep.folder / "report-best.png"),
        _write_csv(sweep, sweep.folder / "trials.csv"),
    ]


def draw(sweep: SweepResult, path: Path) -> Path:
    """Draws report.png to any path. Raises EaglerayError for a sweep without a trial."""
    _ensure_begun(sweep)
    panels = [curves, *([scatter] if len(sweep.keys) == 1 else [parallel] if sweep.keys else [])]
    figure = new_figure(len(panels) * PANEL_PX)
    figure.suptitle(_title(sweep), fontsize=17, fontweight="bold")
    look = Look.of(sweep)
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False).flat, panels, strict=True):
        panel(axes, sweep, look)
    return save(figure, path)


def _ensure_begun(sweep: SweepResult) -> None:
    if not sweep.trials:
        raise EaglerayError(f"{sweep.folder} holds no trial yet; report again when one has started")


def _title(sweep: SweepResult) -> str:
    of = f" of {sweep.planned}" if sweep.planned and sweep.planned > len(sweep.trials) else ""
    count = f"{len(sweep.trials)}{of} trial{'s' if of or len(sweep.trials) > 1 else ''}"
    best = sweep.best
    leads = f", best {written(sweep.metric, best.value)} in trial {best.number}" if best and best.value is not None else ""
    return f"{sweep.folder.name}: {sweep.metric} ({sweep.mode}), {count}{leads}"


def _draw_best(sweep: SweepResult, path: Path) -> Path:
    """The table of the best trials."""
    shown = [trial for trial in sweep.ranked if trial.state not in UNFIT][:LISTED]
    shown += [trial for trial in sweep.ranked if trial.state in UNFIT][: LISTED - len(shown)]
    told = columns(sweep, shown)
    headings = [name.rpartition(".")[2] for name in told]
    rows = [[short(text) for text in row] for row in zip(*told.values(), strict=True)]
    figure = new_figure(AROUND_TABLE_PX + ROW_PX * (len(rows) + 1))
    figure.suptitle(_title(sweep), fontsize=15, fontweight="bold")
    axes = figure.subplots()
    axes.axis("off")
    letters = [2 + max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    cells = axes.table(
        rows, colLabels=headings, colLoc="right", colWidths=[n / sum(letters) for n in letters], bbox=Bbox.unit()
    )
    cells.auto_set_font_size(False)
    cells.set_fontsize(min(12.0, WIDTH_PX / (sum(letters) * LETTER * DPI / 72)))
    for (row, _), cell in cells.get_celld().items():
        cell.set(edgecolor="none", facecolor="#eef1f4" if row % 2 else "white")
        if row == 0:
            cell.set_text_props(color=GREY, fontweight="bold")
        elif shown[row - 1] is sweep.best:
            cell.set_text_props(color=RED, fontweight="bold")
        elif shown[row - 1].state in UNFIT:
            cell.set_text_props(color=GREY)
    return save(figure, path)


def _write_csv(sweep: SweepResult, path: Path) -> Path:
    """All trials, the best first."""
    frame = sweep.dataframe().set_index("trial")
    frame.loc[[trial.number for trial in sweep.ranked]].to_csv(path)
    return path
