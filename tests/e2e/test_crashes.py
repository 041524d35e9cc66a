"""Real deaths of real processes: the report names the one that died, and the right cause."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.conftest import finish, run, start
from tests.e2e.test_dataset_jobs import Job
from tests.e2e.test_run import children

pytestmark = pytest.mark.slow


def wait_for_steps(process: Any, output_dir: Path, count: int) -> None:
    file = output_dir / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def kill(process: Any, title: str) -> list[int]:
    """Kills the job's processes of a title with SIGKILL; returns their ids."""
    killed = []
    with suppress(psutil.Error):  # the job itself may be ending
        for one in children(process.pid):
            with suppress(psutil.Error):
                if "".join(one.cmdline()[:1]).startswith(f"ray::{title}"):
                    one.kill()
                    killed.append(one.pid)
    return killed


def report(output_dir: Path) -> tuple[dict[str, Any], Path]:
    (folder,) = (output_dir / "crash").iterdir()
    facts: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert (folder / "report.md").read_text().startswith("# ")
    return facts, folder


def test_engines_that_are_killed_again_and_again(job: Callable[..., Path], tmp_path: Path) -> None:
    """Watched by `top` before."""
    process = start("run", job(max_steps=10_000, save_steps=10_000))
    wait_for_steps(process, tmp_path / "out", 2)
    engine, deadline = "", time.monotonic() + 60
    while " GiB" not in engine and time.monotonic() < deadline:  # the dashboard measures a new process after a while
        code, shown = run([sys.executable, "-m", "orchestrator", "top", str(tmp_path / "out"), "--once"], dict(os.environ))
        assert code == 0, shown
        (engine,) = [line for line in shown.splitlines() if "engine 0" in line]
    pids = []
    while process.poll() is None:
        pids += kill(process, "RolloutEngine")
        time.sleep(0.2)
    code, output = finish(process)
    assert code == 1 and "Traceback" not in output, output
    assert "alive" in engine and str(pids[0]) in engine and "● running" in shown and " GiB" in engine
    facts, folder = report(tmp_path / "out")
    assert facts["actor"]["name"] == "engine 0" and facts["actor"]["pid"] in pids
    assert facts["cause"]["name"] == "killed" and facts["step"] >= 2
    assert (folder / "logs" / "engine-0.err").is_file() and f"engine 0 (pid {facts['actor']['pid']}) on " in output


def test_a_trainer_that_is_killed(job: Callable[..., Path], tmp_path: Path) -> None:
    process = start("run", job(max_steps=10_000, save_steps=10_000))
    wait_for_steps(process, tmp_path / "out", 2)
    (pid,) = kill(process, "Trainer")
    code, output = finish(process)
    assert code == 1 and "Traceback" not in output, output
    facts, folder = report(tmp_path / "out")
    assert (facts["actor"]["name"], facts["actor"]["pid"]) == ("trainer", pid)
    assert facts["cause"]["name"] == "killed" and facts["step"] >= 2
    assert (folder / "logs" / "trainer.err").is_file() and f"trainer (pid {pid}) on " in output


def test_a_worker_of_a_dataset_job_that_is_killed(dataset_job: Job, tmp_path: Path) -> None:
    two_of_them = {"ray_num_workers": 2, "gradient_accumulation_steps": 1}
    config = dataset_job(max_steps=10_000, save_steps=10_000, eval_steps=10_000, **two_of_them)
    process = start("run", config)
    wait_for_steps(process, tmp_path / "out", 3)
    pids = kill(process, "RayTrainWorker")[:2]
    assert len(pids) == 2
    code, output = finish(process)
    assert code == 1 and "Traceback" not in output, output
    facts, _ = report(tmp_path / "out")
    assert facts["actor"]["name"] in ("worker 0", "worker 1") and facts["actor"]["pid"] in pids
    assert facts["cause"]["name"] == "killed" and facts["step"] >= 3
    assert {actor["name"] for actor in facts["actors"]} == {"worker 0", "worker 1", "reports"}


def test_a_worker_that_raises_is_told_with_its_log(dataset_job: Job, tmp_path: Path) -> None:
    """Here, because something of another name stands where it wants to save."""
    config = dataset_job(max_steps=40, save_steps=20, eval_steps=10_000)
    process = start("run", config)
    wait_for_steps(process, tmp_path / "out", 2)
    (tmp_path / "out" / "checkpoint-20").write_text("in the way")
    code, output = finish(process)
    assert code == 1 and "Traceback" not in output, output
    facts, folder = report(tmp_path / "out")
    assert facts["actor"]["name"] == "worker 0" and facts["error"]["message"].startswith("worker 0 failed: ")
    assert {"worker-0.err", "worker-0.out"} & {file.name for file in (folder / "logs").iterdir()}


def test_memory_that_runs_out(job: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ray's limit, which is set a little above what the machine uses with the job."""
    memory = psutil.virtual_memory()
    (tmp_path / "greedy.py").write_text(
        "import time\n\n"
        "def eats(completions):\n"
        "    eaten = []\n"
        "    while True:\n"
        "        eaten.append(bytearray(2**27))\n"
        "        time.sleep(0.05)\n"
    )
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - (memory.available - 5 * 2**30) / memory.total:.3f}")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    code, output = finish(start("run", job(trl__reward_funcs=["greedy.eats"])))
    assert code == 1 and "Traceback" not in output, output
    facts, _ = report(tmp_path / "out")
    assert facts["actor"]["name"] == "reward greedy.eats"
    assert facts["cause"]["name"] == "host-memory"
