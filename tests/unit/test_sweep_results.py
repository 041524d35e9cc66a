"""A sweep's folder, made by hand: what is read from it, how it is shown in a terminal, and its report."""

import csv
import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from matplotlib.figure import Figure
from rich.console import Console

from actors.errors import EaglerayError
from orchestrator import sweep_results, sweep_table
from orchestrator.cli import main
from orchestrator.journal import Journal, read_events
from orchestrator.sweep_drawing import Scale, bounds
from orchestrator.sweep_frame import left_s, table
from orchestrator.sweep_report import report
from orchestrator.sweep_results import SweepResult, read
from orchestrator.sweep_table import news, watching

START = {"time": 100.0, "kind": "start", "host": socket.gethostname()}
PLAN = {"time": 101.0, "kind": "plan", "steps": 10}


def end(how: str, text: str = "") -> dict[str, Any]:
    return {"time": 200.0, "kind": "end", "how": how, "text": text}


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def sweep(folder: Path, **changes: Any) -> Path:
    about = {"version": 1, "metric": "eval/loss", "mode": "min", "space": {}, "trials": 6, "total_steps": 10, **changes}
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(about))
    return folder


def trial(
    folder: Path,
    number: int,
    params: dict[str, Any],
    values: list[float | None] | None = None,
    events: list[dict[str, Any]] | None = None,
    step_s: float = 2.0,
) -> Path:
    """One whose metric has these values at the steps 1, 2, ..., in records of their own as evaluations are."""
    own = folder / "trials" / f"{number:04d}"
    own.mkdir(exist_ok=True)
    (own / "trial.json").write_text(json.dumps({"number": number, "params": params}))
    if events is not None:
        lines(own / "events.jsonl", events)
    if values is not None:
        records: list[dict[str, Any]] = []
        for step, value in enumerate(values, start=1):
            records.append({"time": 1.0, "kind": "train", "step": step, "loss": 9.0, "step_s": step_s})
            records.append({"time": 1.0, "kind": "eval", "step": step, "eval/loss": value})
        lines(own / "metrics.jsonl", records)
    return own


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Trials in every state; a pid of this process is one that lives."""
    made = sweep(tmp_path / "rates", space={"learning_rate": "loguniform [1e-06, 0.0001]"})
    alive = {**START, "time": time.time(), "pid": os.getpid()}
    trial(made, 0, {"learning_rate": 1e-4, "lora_r": 8}, [3.0, 1.0, 2.0], [alive, PLAN, end("done")])
    trial(made, 1, {"learning_rate": 1e-5, "lora_r": 16}, [3.0, None, 1.5], [alive, PLAN])
    trial(made, 2, {"learning_rate": 1e-6, "lora_r": 8}, [0.5], [alive, PLAN, end("failed", "GPU 0 is full")])
    trial(made, 3, {"learning_rate": 2e-6, "lora_r": 8}, [2.5, 2.0], [alive, PLAN, end("stopped")])
    trial(made, 4, {"learning_rate": 3e-6, "lora_r": 8})
    return made


def test_states_curves_and_the_best(folder: Path) -> None:
    found = read(folder)
    assert [t.state for t in found.trials] == ["done", "running", "failed", "stopped", "waiting"]
    assert [t.step for t in found.trials] == [3, 3, 1, 2, 0]
    assert [t.value for t in found.trials] == [1.0, 1.5, 0.5, 2.0, None]
    assert [t.last for t in found.trials] == [2.0, 1.5, 0.5, 2.0, None]
    steps, values = found.trials[1].values
    assert steps == (1, 2, 3) and values[0] == 3.0 and math.isnan(values[1]) and values[2] == 1.5
    assert found.trials[2].message == "GPU 0 is full"
    assert found.best is found.trials[0], "the failed trial's lower loss is not a result"
    assert [t.number for t in found.ranked] == [2, 0, 1, 3, 4]
    (folder / "sweep.json").write_text(json.dumps({"version": 1, "metric": "eval/loss", "mode": "max"}))
    highest = read(folder).best
    assert highest is not None and highest.number == 0 and highest.value == 3.0, "of equals the first"


def test_only_what_has_changed_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is drawn each second would read all that all trials have ever told."""
    before = read(folder)
    asked: list[Path] = []
    monkeypatch.setattr(sweep_results, "read_events", lambda path: asked.append(path) or read_events(path))
    assert read(folder) == before and asked == []
    Journal(folder / "trials" / "0000").tell("end", how="failed", text="out of memory")
    assert read(folder).trials[0].message == "out of memory" and asked == [folder / "trials" / "0000"]


def test_a_dataframe_has_a_row_a_trial(folder: Path) -> None:
    frame = read(folder).dataframe()
    assert list(frame.columns) == ["trial", "learning_rate", "lora_r", "state", "step", "best", "last", "output_dir"]
    assert list(frame["lora_r"]) == [8, 16, 8, 8, 8]
    assert frame.loc[0, "output_dir"] == str(folder / "trials" / "0000")
    assert math.isnan(frame.loc[4, "best"])


def test_a_trial_whose_process_is_gone_is_lost(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    own = trial(folder, 0, {}, [1.0], [{**START, "time": time.time(), "pid": child.pid}, PLAN])
    (own / "trial.log").write_text("loading\nKilled by the system\n\n")
    lost = read(folder).trials[0]
    assert (lost.state, lost.message) == ("lost", "Killed by the system")
    # Its number belongs to a process that began after the trial did.
    trial(folder, 0, {}, [1.0], [{**START, "time": 1000.0, "pid": os.getpid()}, PLAN])
    assert read(folder).trials[0].state == "lost"
    trial(folder, 0, {}, [1.0], [{**START, "host": "another-machine", "pid": child.pid}, PLAN])
    assert read(folder).trials[0].state == "running", "nobody here can know"


def test_a_trial_that_goes_on_runs_again(folder: Path) -> None:
    own = folder / "trials" / "0003"
    Journal(own).tell("phase", text="starting Ray")
    assert read(folder).trials[3].state == "running"
    with (own / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1.0, "kind": "eval", "step": 3, "eval/loss": 0.25}) + '\n{"time": 1.0, "ki')
    assert read(folder).trials[3].value == 0.25, "the file has grown since it was read"
    Journal(own).tell("end", how="done", text="")
    best = read(folder).best
    assert best is not None and best.number == 3


def test_what_is_no_sweep_or_damaged_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EaglerayError, match="holds no sweep"):
        read(tmp_path)
    (folder / "trials" / "0001" / "trial.json").write_text('{"number": 1')
    with pytest.raises(EaglerayError, match="0001/trial.json cannot be read"):
        read(folder)


def drawn(found: SweepResult, width: int, height: int = 40) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height, force_terminal=False).print(table(found, width, height))
    return out.getvalue().splitlines()


def test_the_table_has_a_row_a_trial_and_marks_the_best(folder: Path) -> None:
    text = drawn(read(folder), 100)
    assert text[1] == "1 running  2 waiting  1 done  1 stopped  1 failed", "the sixth trial is not made yet"
    (row,) = [line for line in text if line.startswith("★")]
    assert row.split() == ["★", "0", "done", "0.0001", "8", "3/10", "2.0000", "1.0000", "█▁▅"]
    (failure,) = [line for line in text if line.startswith("trial 2")]
    assert failure.startswith("trial 2 failed after step 1 of 10: GPU 0 is full")
    assert text[-1] == "best: trial 0, eval/loss 1.0000, learning_rate=0.0001 lora_r=8"


def test_a_narrow_terminal_never_cuts_a_number(folder: Path) -> None:
    words = {f"key_{letter}": f"a rather long word {letter}" for letter in "abc"}
    trial(folder, 0, {"learning_rate": 1.23e-5, **words}, [1.0], [{**START, "pid": os.getpid()}, PLAN, end("done")])
    text = drawn(read(folder), 80)
    assert max(map(len, text)) <= 80
    assert "1.23e-05" in next(line for line in text if line.startswith("★"))
    hidden = next(line for line in text if line.startswith("no room for"))
    assert "key_c" in hidden and "learning_rate" not in hidden


def test_of_many_trials_the_best_and_the_running_ones_are_shown(tmp_path: Path) -> None:
    made = sweep(tmp_path, trials=30)
    for number in range(30):
        over = [] if number == 29 else [end("done")]
        start = {**START, "time": time.time(), "pid": os.getpid()}
        trial(made, number, {"lora_r": number}, [abs(number - 20) + 1.0], [start, PLAN, *over])
    text = drawn(read(made), 80, height=15)
    numbers = [int(line.split()[-7]) for line in text if "█" in line or "▁" in line]
    assert numbers == [18, 19, 20, 21, 29], "five rows: the best, its neighbours, and the one that runs"
    assert "no room for 25 more trials" in text


def test_the_time_that_is_left(tmp_path: Path) -> None:
    made = sweep(tmp_path, trials=5)
    alive = {**START, "time": time.time(), "pid": os.getpid()}
    trial(made, 0, {}, [1.0] * 4, [alive, PLAN], step_s=2.0)  # 6 steps of 2 s
    trial(made, 1, {}, [1.0] * 8, [alive, PLAN], step_s=4.0)  # 2 steps of 4 s
    # Three more of 10 steps, each step as long as on average, 3 s; two run side by side.
    assert left_s(read(made)) == (6 * 2 + 2 * 4 + 3 * 10 * 3) / 2
    sweep(made, trials=2)
    assert left_s(read(made)) == 12, "no less than what the slowest needs"
    sweep(made, total_steps=None)
    assert left_s(read(made)) is None


def test_lines_tell_what_has_happened(folder: Path) -> None:
    before = read(folder)
    assert list(news(before, before)) == []
    alive = {**START, "time": time.time(), "pid": os.getpid()}
    trial(folder, 4, {"learning_rate": 3e-6, "lora_r": 8}, [0.75], [alive, PLAN])
    Journal(folder / "trials" / "0001").tell("end", how="failed", text="engine 0 died")
    assert list(news(before, read(folder))) == [
        "trial 1 failed after step 3 of 10: engine 0 died, eval/loss 1.5000 at best",
        "trial 4 starts: learning_rate=3e-06 lora_r=8",
        "best so far: trial 4, eval/loss 0.7500, learning_rate=3e-06 lora_r=8",
    ]


def test_a_pipe_gets_each_line_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_table, "EVERY_S", 0.01)
    out = io.StringIO()
    with watching(folder, Console(file=out, width=200)):
        Journal(folder / "trials" / "0001").tell("end", how="done", text="")
        (folder / "trials" / "0002" / "trial.json").write_text("{")  # as one that is just written
        time.sleep(0.05)
        trial(folder, 2, {"learning_rate": 1e-6}, [0.5], [end("failed", "GPU 0 is full")])
    assert out.getvalue().splitlines() == ["trial 1 is done after step 3 of 10, eval/loss 1.5000 at best"]
    assert not [thread for thread in threading.enumerate() if thread.name == "sweep table"]


def test_a_terminal_keeps_the_last_table(folder: Path) -> None:
    out = io.StringIO()
    with watching(folder, Console(file=out, width=100, height=30, force_terminal=True, _environ={"TERM": "xterm"})):
        Journal(folder / "trials" / "0001").tell("end", how="done", text="")
    assert "2 done" in out.getvalue() and "best: trial 0" in out.getvalue()


@pytest.mark.parametrize("trials", [1, 12])
@pytest.mark.parametrize("keys", [0, 1, 3])
def test_a_report_is_two_pictures_and_a_table(
    tmp_path: Path, trials: int, keys: int, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sweep(tmp_path, trials=trials)
    for number in range(trials):
        params = {"learning_rate": 10.0 ** -(number % 4 + 3), "optimizer": "ab"[number % 2], "lora_r": number}
        how = "failed" if number == 3 else "done"
        trial(made, number, dict(list(params.items())[:keys]), [2.0, 1.0 + number], [PLAN, end(how, "full")])
    assert main(["report", str(made)]) == 0
    names = ["report.png", "report-best.png", "trials.csv"]
    assert capsys.readouterr().out.splitlines() == [str(made / name) for name in names]
    for name in names[:2]:
        picture = image.imread(made / name)
        assert picture.shape[1] == 1600 and len({tuple(pixel) for pixel in picture[::5, ::5].reshape(-1, 4)}) > 3
    rows = list(csv.DictReader((made / "trials.csv").open()))
    assert [int(row["trial"]) for row in rows] == list(range(trials)), "the best first"
    assert float(rows[0]["best"]) == 1.0 and rows[-1]["output_dir"] == str(made / "trials" / f"{trials - 1:04d}")


def test_curves_and_coordinates_are_those_of_the_trials(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    report(folder)
    curves, parameters = figures[0].axes[:2]
    drawn_lines = {str(line.get_label()).partition(":")[0]: line for line in curves.get_lines()}
    assert list(drawn_lines["trial 0"].get_ydata()) == [3.0, 1.0, 2.0]
    assert list(drawn_lines["trial 1"].get_xdata()) == [1, 3], "the value that was not finite is left out"
    assert drawn_lines["trial 0"].get_linewidth() == max(line.get_linewidth() for line in curves.get_lines())
    assert [label.get_text() for label in parameters.get_xticklabels()] == ["learning_rate", "lora_r", "eval/loss"]
    # learning_rate 1e-5 lies in the middle of 1e-6 and 1e-4, lora_r 16 at the top, a loss of 1.5 two thirds up from 0.5 to 2.
    heights = [list(line.get_ydata()) for line in parameters.get_lines() if len(line.get_ydata()) == 3]
    assert [pytest.approx(height) for height in heights].count([0.5, 1.0, 2 / 3]) == 1


def test_scales() -> None:
    log = Scale.of([1e-6, 1e-4], "loguniform [1e-06, 0.0001]")
    assert log.kind == "log" and log.at(1e-5) == pytest.approx(0.5)
    assert Scale.of([0.01, 0.2], "uniform [0, 0.2]").kind == "linear"
    listed = Scale.of([32, 8, 16], "choice [8, 16, 32]")
    assert listed.ticks() == [8, 16, 32] and listed.at(16) == 0.5
    mixed = Scale.of([True, "auto", False, "auto"])
    assert mixed.ticks() == ["auto", False, True] and mixed.at("auto") == 0.0
    close = Scale.of([None, 0.1001, 0.10012, 0.1001])
    assert sorted(map(close.at, (None, 0.1001, 0.10012))) == [0.0, 0.5, 1.0], "values that read alike are two"
    assert Scale.of([["a"], None, ["a"]]).at(["a"]) == 0.0
    assert Scale.of([0.1], "uniform [0, 1]").at(0.1) == 0.5
    assert bounds([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 1e6])[1] < 4, "one that exploded presses no other flat"


def test_a_sweep_without_a_trial_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(sweep(tmp_path))]) == 1
    assert "holds no trial yet" in capsys.readouterr().err
