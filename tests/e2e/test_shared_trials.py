"""Trials of a sweep that sample on one engine: real vLLM and real trainers of the tiny model, on more CPUs than there are."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import ray

from orchestrator.api import load, run, sweep
from orchestrator.metrics import read
from orchestrator.sweep_results import SweepResult
from tests.e2e.conftest import running

RATES = [3e-2, 1e-2, 1e-3, 1e-4]


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with TemporaryDirectory(prefix="er", dir="/tmp") as folder:
        paths = {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
        ray.init(address="local", num_cpus=8, log_to_driver=False, _temp_dir=folder, runtime_env={"env_vars": paths})
        yield
        ray.shutdown()


def swept(file: Path, folder: Path, at_once: int, space: dict[str, Any]) -> SweepResult:
    return sweep(load(file), space, "reward", "max", max_concurrent=at_once, share_engines=True, output_dir=folder)


def records(folder: Path) -> list[dict[str, Any]]:
    return [record for record in read(folder / "metrics.jsonl") if record["kind"] == "train"]


@pytest.mark.slow
def test_four_trials_on_one_engine_learn_what_each_learns_alone(job: Callable[..., Path], tmp_path: Path) -> None:
    file = job()
    result = swept(file, tmp_path / "sweep", 4, {"learning_rate": RATES})
    assert [trial.state for trial in result.trials] == ["done"] * 4
    shared = [records(trial.folder) for trial in result.trials]
    assert max(run[0]["time"] for run in shared) < min(run[-1]["time"] for run in shared), "they ran one after another"
    assert len({run[-1]["reward"] for run in shared}) == 4, "they all learnt the same, so nothing was told apart"
    for trial, together in zip(result.trials[:2], shared, strict=False):
        own = {"learning_rate": trial.params["learning_rate"], "output_dir": str(tmp_path / f"alone-{trial.number}")}
        run(load(file, **own, **{"ray.sync": "adapter"}))
        alone = records(Path(own["output_dir"]))
        for name in ("reward", "completion_tokens", "loss", "grad_norm"):
            assert [step[name] for step in together] == pytest.approx([step[name] for step in alone], rel=1e-4, abs=1e-6), name
        assert all(step["probe_gap"] < 1e-3 and step["engine_gap"] < 1e-3 for step in together)


@pytest.mark.slow
def test_a_killed_trial_leaves_its_place_to_the_next(job: Callable[..., Path], tmp_path: Path) -> None:
    """There are two places: without the first one's, the last trial would wait for the second one's end."""
    folder = tmp_path / "sweep"
    results: list[SweepResult] = []
    space = {"_": [{"max_steps": 5000}, {"max_steps": 300}, {"max_steps": 4}]}
    thread = threading.Thread(target=lambda: results.append(swept(job(), folder, 2, space)))
    thread.start()
    victim = process_of(folder, 0)
    victim.kill()
    thread.join(400)
    (result,) = results
    assert [trial.state for trial in result.trials] == ["failed", "done", "done"]
    assert "SIGKILL" in str(result.trials[0].message)
    second, third = (records(trial.folder) for trial in result.trials[1:])
    assert [step["step"] for step in second] == list(range(1, 301)) and len(third) == 4
    assert third[0]["time"] < second[-1]["time"]


def process_of(folder: Path, number: int) -> psutil.Process:
    """Of a trial that has trained."""
    metrics = folder / "trials" / f"{number:04d}" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if (found := running(folder, number)) and metrics.stat().st_size:
            return found
        time.sleep(0.1)
    raise AssertionError(f"trial {number} has not trained")
