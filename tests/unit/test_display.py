"""The terminal output: its numbers, no escape codes outside a terminal, no failure over a lost stdout."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator import display
from orchestrator.display import Display, duration, number, percent

ROOT = Path(__file__).parents[2]
RECORD = {
    "step": 3,
    "reward": 0.4567,
    "accuracy": 0.125,
    "completion_length": 17.26,
    "kl": 0.00123,
    "staleness": 1.0,
    "sample_s": 9.876,
    "train_s": 12.34,
    "sync_s": 0.05,
    "step_s": 20.0,
    "tokens_per_s": 611.4,
}


def plain(width: int = 80) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=width, force_terminal=False)), out


def test_a_row_has_the_records_numbers_below_their_headings():
    shown, out = plain()
    shown.step(RECORD, 12)
    heading, row = out.getvalue().splitlines()
    cells = dict(zip(heading.split(), row.replace(" %", "%").split(), strict=True))
    assert cells == {
        "step": "3/12",
        "reward": "0.457",
        "accuracy": "12.5%",
        "length": "17.3",
        "KL": "0.0012",
        "stale": "1.0",
        "sample": "9.88s",
        "train": "12.3s",
        "sync": "0.05s",
        "tok/s": "611",
        "ETA": "3m00s",  # 9 steps of 20 s
    }
    assert len(heading) == len(row)


def test_four_digit_steps_fit_80_columns():
    shown, out = plain(80)
    shown.step({**RECORD, "step": 1234}, 9999)
    assert max(len(line) for line in out.getvalue().splitlines()) <= 80


def test_a_metric_that_is_missing_shows_as_a_dash():
    shown, out = plain()
    shown.step({"step": 1, "reward": 1.0}, 5)
    assert out.getvalue().splitlines()[1].split() == ["1/5", "1.000"] + 9 * ["-"]


def test_the_heading_comes_again_every_20_rows():
    shown, out = plain()
    for step in range(1, 42):
        shown.step({**RECORD, "step": step}, 41)
    lines = out.getvalue().splitlines()
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, 21, 42]
    assert len(lines) == 41 + 3


def test_the_eta_follows_the_last_ten_steps():
    shown, out = plain()
    for step in range(1, 12):
        shown.step({"step": step, "step_s": 1000.0 if step == 1 else 6.0}, 21)
    *_, tenth, eleventh = (line.split()[-1] for line in out.getvalue().splitlines())
    assert tenth == "19m19s"  # 11 steps left of (1000 + 9 * 6) / 10 s: 1159.4 s
    assert eleventh == "1m00s"  # 10 steps left of 6 s: the slow first step is forgotten


def test_an_evaluation_line():
    shown, out = plain()
    shown.evaluation("before training", {"eval/reward": 0.131}, 8, 64)
    assert out.getvalue() == "held-out accuracy 12.5 % (8/64), reward 0.13  [before training]\n"


def test_where_reward_models_alone_score_nobody_is_right():
    shown, out = plain()
    shown.evaluation("before training", {"eval/reward": -0.5}, 0, 0)
    shown.evaluation("step 5", {"eval/reward": 2.25}, 0, 0)
    shown.summary("Done", [])
    assert "held-out reward -0.50  [before training]\n" in out.getvalue()
    assert "held-out reward -0.50 (before training) -> 2.25 (step 5)\n" in out.getvalue()
    assert "accuracy" not in out.getvalue()


def test_the_summary_tells_the_gain_the_given_lines_and_the_wall_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    shown, out = plain()
    for label, solved in (("before training", 8), ("step 5", 9), ("step 10", 32)):
        shown.evaluation(label, {}, solved, 64)
    now[0] = 100.0 + 245.0
    shown.summary("Done", ["adapter ./out/adapter"])
    assert out.getvalue().split("\n\n")[1].splitlines() == [
        "Done",
        "  held-out accuracy 12.5 % (before training) -> 50.0 % (step 10)",
        "  adapter ./out/adapter",
        "  wall time 4m05s",
    ]


def test_a_summary_without_evaluations_claims_none():
    shown, out = plain()
    shown.summary("Done", [])
    assert "accuracy" not in out.getvalue() and "wall time" in out.getvalue()


def everything(shown: Display) -> None:
    shown.header("Title", ["model [bold]x[/bold]", "a line that is longer than the eighty columns " + 60 * "x"])
    with shown.phase("loading engine"):
        shown.note("a note")
    shown.warn("a warning")
    shown.evaluation("before training", {}, 1, 2)
    shown.step(RECORD, 12)
    shown.summary("Done", ["adapter ./out"])


def test_no_escape_codes_outside_a_terminal():
    shown, out = plain()
    everything(shown)
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()
    assert "model [bold]x[/bold]" in out.getvalue()
    assert "columns " + 60 * "x" in out.getvalue()  # a log is not broken at 80 columns


def test_a_terminal_has_colour_and_the_same_text():
    logged, log = plain()
    everything(logged)
    out = io.StringIO()
    everything(Display(Console(file=out, width=80, force_terminal=True, color_system="standard", _environ={})))
    assert "\x1b[1m" in out.getvalue() and "\x1b[33m" in out.getvalue()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "", out.getvalue())
    for line in log.getvalue().splitlines():
        if line != "loading engine ...":
            assert line in text
    assert re.search(r"loading engine  \ds", text)


def test_a_plain_log_names_a_phase_once_and_only_before_the_first_row():
    shown, out = plain()
    for _ in range(2):
        with shown.phase("loading engine"):
            pass
    shown.step(RECORD, 12)
    with shown.phase("sampling"):
        pass
    assert [line for line in out.getvalue().splitlines() if "..." in line] == ["loading engine ..."]


def test_progress_is_told_now_and_then(monkeypatch):
    shown, out = plain()
    with shown.phase("preparing rows"):
        shown.progress(1, 5000)
        assert "of" not in out.getvalue(), "not at once"
        monkeypatch.setattr(display, "PROGRESS_EVERY_S", -1.0)
        shown.progress(1234, 5000)
    assert out.getvalue().splitlines() == ["preparing rows ...", "preparing rows: 1,234 of 5,000"]


def test_a_phase_passes_errors_on_and_ends_its_spinner():
    out = io.StringIO()
    shown = Display(Console(file=out, width=80, force_terminal=True, _environ={}))
    with pytest.raises(ZeroDivisionError), shown.phase("outer"), shown.phase("inner"):
        raise ZeroDivisionError
    assert out.getvalue().count("\x1b[?25l") == out.getvalue().count("\x1b[?25h") == 1  # cursor hidden, shown again


def test_a_closed_stream_is_no_failure():
    shown, out = plain()
    out.close()
    everything(shown)
    assert out.closed


SCRIPT = """
import sys
from orchestrator.display import Display
shown = Display()
for step in range(1, 2001):
    with shown.phase("sampling"):
        shown.step({"step": step, "step_s": 1.0}, 2000)
print("reached the end", file=sys.stderr)
"""


def run_script(redirect: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = f"set -o pipefail; '{sys.executable}' -c '{SCRIPT}' {redirect}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("redirect", ["| head -n 1", ">&-"])
def test_a_run_outlives_the_reader_of_its_output(redirect):
    done = run_script(redirect)
    assert done.returncode == 0
    assert done.stderr == "reached the end\n"


def test_a_pipe_gets_no_escape_codes_even_under_force_color():
    done = run_script("", FORCE_COLOR="1", TTY_COMPATIBLE="1")
    assert "\x1b" not in done.stdout
    assert done.stdout.splitlines()[-1].split()[0] == "2000/2000"


def test_a_narrow_encoding_replaces_what_it_lacks():
    raw = io.BytesIO()
    shown = Display(Console(file=io.TextIOWrapper(raw, "ascii", write_through=True), force_terminal=False))
    shown.note("né")
    shown.note("after")
    assert raw.getvalue() == b"n?\nafter\n"


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [
        (0.0, 4, "0.0000"),
        (0.00001234, 4, "1.2e-5"),
        (-0.125, 3, "-0.125"),
        (1234567.0, 0, "1.2e6"),
        (float("nan"), 3, "nan"),
    ],
)
def test_numbers_fit_their_column(value, decimals, text):
    assert number(value, decimals) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (245, "4m05s"),
        (3600, "1h00m"),
        (7620, "2h07m"),
        (273600, "3d04h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_percent():
    assert (percent(0.125), percent(1.0)) == ("12.5 %", "100.0 %")
