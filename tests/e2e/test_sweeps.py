"""Whole sweeps: real Ray Tune, and trials that are real jobs on the tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from actors import storage
from orchestrator import trial_process
from orchestrator.sweep_results import read
from tests.e2e.conftest import RAY, REPOSITORY, finish, head_node, run, running, start
from tests.e2e.test_run import command, records

Job = Callable[..., Path]
RATES = {"learning_rate": [2e-2, 1e-5]}


@pytest.fixture
def sweep(tmp_path: Path, dataset_job: Job) -> Callable[..., Path]:
    """Writes a sweep over a small SFT job, with changes to both; returns its file."""

    def write(job: dict[str, Any], **keys: Any) -> Path:
        base = dataset_job("base.yaml", **{"eval_steps": 2, "save_steps": 2, **job})
        written = {"base": base.name, "output_dir": str(tmp_path / "sweep"), "metric": "eval/loss", "mode": "min", **keys}
        path = tmp_path / "sweep.yaml"
        path.write_text(yaml.safe_dump(written))
        return path

    return write


def events(trial: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trial / "events.jsonl").read_text().splitlines()]


def starts(trial: Path) -> int:
    return sum(event["kind"] == "start" for event in events(trial))


def wait_until(what: Callable[[], bool], process: Any, timeout_s: float = 200) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_eight_trials_some_of_which_are_stopped_early(sweep: Callable[..., Path], tmp_path: Path) -> None:
    rates = [3e-2, 1e-2, 1e-6, 2e-6, 3e-6, 4e-6, 5e-6, 6e-6]
    scheduler = {"name": "asha", "grace_period": 2, "reduction_factor": 2}
    config = sweep({"max_steps": 20}, space={"learning_rate": rates}, scheduler=scheduler)
    code, output = finish(start("sweep", config), 600)
    assert code == 0 and "Traceback" not in output, output
    folder = tmp_path / "sweep"
    result = read(folder)
    assert [trial.params["learning_rate"] for trial in result.trials] == rates
    states = [trial.state for trial in result.trials]
    assert states[0] == "done" and states.count("stopped") >= 2 and set(states) == {"done", "stopped"}
    assert all(trial.step < 20 for trial in result.trials if trial.state == "stopped")
    assert result.best is not None and result.best.number in (0, 1), "the two that learn"
    assert "done: 8 trials" in output and f"it lies  in {result.best.folder}" in output
    for trial in result.trials:
        assert starts(trial.folder) == 1
        assert yaml.safe_load((trial.folder / "config.yaml").read_text())["learning_rate"] == trial.params["learning_rate"]
        assert (trial.folder / "adapter_model.safetensors").exists() == (trial.state == "done")
    assert not list(trial_process.processes(folder))


@pytest.mark.slow
def test_a_population_copies_its_best(sweep: Callable[..., Path], tmp_path: Path) -> None:
    """The worse trial goes on with the better one's weights, and with a rate of its own."""
    scheduler = {"name": "pbt", "perturbation_interval": 4, "quantile_fraction": 0.5}
    space = {"learning_rate": {"loguniform": [1e-5, 1e-1]}}
    config = sweep({"max_steps": 10}, space=space, scheduler=scheduler, num_samples=2)
    code, output = finish(start("sweep", config), 400)
    assert code == 0 and "Traceback" not in output, output
    trials = [tmp_path / "sweep" / "trials" / name for name in ("0000", "0001")]
    (copied,) = [trial for trial in trials if starts(trial) > 1]
    (origin,) = [trial for trial in trials if trial != copied]
    log = (copied / "trial.log").read_text()
    step = int(re.findall(r"resumed from .*checkpoint-(\d+)", log)[0])
    rates = {record["step"]: record["learning_rate"] for record in records(copied, "train")}
    assert 4 <= step < 10 and rates[step + 1] != rates[step], "the rate is not the checkpoint's"
    losses = [{record["step"]: record["loss"] for record in records(trial, "train")} for trial in (copied, origin)]
    assert losses[0][step + 1] == pytest.approx(losses[1][step + 1], abs=1e-5), "the same weights on the same rows"
    assert losses[0][step] != pytest.approx(losses[1][step], abs=1e-3)
    assert json.loads((copied / "trial.json").read_text())["params"]["learning_rate"] == pytest.approx(rates[10])
    assert [trial.state for trial in read(tmp_path / "sweep").trials] == ["done", "done"]
    before = [starts(trial) for trial in trials]
    code, output = finish(start("sweep", config), 100)
    assert code == 0 and [starts(trial) for trial in trials] == before, "a sweep that is done runs nothing"


@pytest.mark.slow
def test_a_trial_that_is_killed_is_told_of_and_the_others_go_on(sweep: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    process = start("sweep", sweep({"max_steps": 4000, "save_steps": 1000, "eval_steps": 500}, space=RATES))
    wait_until(lambda: running(folder, 0) is not None and running(folder, 1) is not None, process)
    victim = running(folder, 0)
    assert victim is not None
    victim.kill()
    wait_until(lambda: events(folder / "trials" / "0000")[-1]["kind"] == "end", process, 60)
    time.sleep(3)
    assert process.poll() is None and running(folder, 1) is not None, "the other trial goes on"
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process, 120)
    assert code == 143 and "Traceback" not in output, output
    assert "trial 0 failed" in output and "its process was killed by signal 9 (SIGKILL)" in output
    assert "the same command goes on with the sweep" in output
    assert [trial.state for trial in read(folder).trials] == ["failed", "stopped"]
    assert not list(trial_process.processes(folder))


@pytest.mark.slow
def test_a_sweep_whose_driver_is_killed_goes_on_and_repeats_nothing(sweep: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    first, second = (folder / "trials" / name for name in ("0000", "0001"))
    space = {"_": [{"max_steps": 4}, {"max_steps": 200, "save_steps": 10, "eval_steps": 100}, {"max_steps": 6}]}
    config = sweep({}, space=space, max_concurrent=1)
    process = start("sweep", config)
    wait_until(lambda: any(storage.steps_saved(second)), process)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    finish(process, 60)
    deadline = time.monotonic() + 30
    while list(trial_process.processes(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not list(trial_process.processes(folder)), "trials end with the driver"
    for one in family:
        if one.is_running():
            one.kill()
    saved = storage.steps_saved(second)[0]
    finished = (first / "metrics.jsonl").read_text()

    code, output = finish(start("sweep", config, "num_samples=2"), 60)
    assert code == 1 and "holds another sweep: its trials is 3, not 6" in output, output
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**base, "weight_decay": 0.1}))
    code, output = finish(start("sweep", config), 400)
    assert code == 0 and "Traceback" not in output, output
    assert "goes on with the sweep" in output and "has changed since the sweep began" in output
    assert [starts(first), starts(second)] == [1, 2] and (first / "metrics.jsonl").read_text() == finished
    resumed = re.findall(r"resumed from .*checkpoint-(\d+)", (second / "trial.log").read_text())
    assert len(resumed) == 1 and int(resumed[0]) >= saved - 10
    assert [(trial.state, trial.step) for trial in read(folder).trials] == [("done", 4), ("done", 200), ("done", 6)]


@pytest.mark.slow
def test_when_all_trials_fail_the_sweep_does(sweep: Callable[..., Path], tmp_path: Path) -> None:
    """As with a file that a trial does not find, of which its own message is told; the same command goes on with it."""
    config = sweep({"max_steps": 2}, space={"datasets[0].path": ["none.jsonl"]})
    code, output = finish(start("sweep", config), 100)
    assert code == 1 and "Traceback" not in output, output
    assert "all 1 trials have failed, trial 0 with: " in output and "there is no file none.jsonl" in output
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    shutil.copy(base["datasets"][0]["path"], tmp_path / "none.jsonl")
    code, output = finish(start("sweep", config), 100)
    assert code == 0 and "done: 1 trials" in output, output


@pytest.mark.usefixtures("no_ray")
def test_a_sweep_that_cannot_be_is_one_message(sweep: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "space={learning_rate: [0]}": "learning_rate: with learning_rate=0: is 0; it must be greater than 0",
        "metric=eval/reward_margn": "did you mean eval/reward_margin?",
        "base=none.yaml": "there is no file none.yaml",
    }
    config = sweep({}, space=RATES)
    for override, expected in cases.items():
        code, output = command(capsys, "sweep", config, override)
        assert code == 1 and expected in output and output.count("eagleray: ") == 1, (override, output)
    base = yaml.safe_load((config.parent / "base.yaml").read_text())
    base["datasets"][0]["path"] = str(config.parent / "lost.jsonl")
    (config.parent / "base.yaml").write_text(yaml.safe_dump(base))
    code, output = command(capsys, "sweep", config)
    assert code == 1 and "lost.jsonl" in output and not (config.parent / "sweep").exists()


@pytest.mark.slow
def test_the_python_of_the_readme(dataset_job: Job, tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(from orchestrator\.api import .*?)```", text, re.DOTALL)
    assert len(lines.splitlines()) <= 12
    dataset_job("job.yaml", max_steps=4, eval_steps=2)
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SFT" in done.stdout and "done: 4 steps" in done.stdout and "done: 4 trials" in done.stdout
    result = read(tmp_path / "outputs" / "rates")
    assert {trial.state for trial in result.trials} <= {"done", "stopped"} and result.best is not None
    assert str(result.best.folder) in done.stdout.splitlines()[-1]
    assert (tmp_path / "rates.png").stat().st_size > 10_000


SWEEPS = """
import sys
from pathlib import Path

from orchestrator.api import load, sweep

folder = Path(sys.argv[1])
for method in ("dpo", "kto", "orpo", "reward_trainer"):
    job, rates = load(folder / f"{method}.yaml"), {"learning_rate": [2e-2, 1e-6]}
    found = sweep(job, rates, "eval/loss", "min", output_dir=folder / method)
    print(method, found.best.params, sorted(trial.state for trial in found.trials))
"""


@pytest.mark.slow
def test_the_other_methods_from_a_script_that_is_submitted(dataset_job: Job, tmp_path: Path) -> None:
    """Inside `ray job submit`, on a cluster that others have started, from a script."""
    rows = [
        {"prompt": f"w{3 + i % 40} ", "completion": f"w{4 + i % 40} w{'5' if i % 2 else '9'}", "label": i % 2 == 1}
        for i in range(40)
    ]
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = str(tmp_path / "pairs.jsonl")
    entries: dict[str, dict[str, Any]] = {
        "dpo": {"path": pairs, "type": "passthrough"},
        "kto": {"path": str(tmp_path / "judged.jsonl"), "type": "chatml.prompt_pairs"},
        "orpo": {"path": pairs, "type": "passthrough"},
        "reward_trainer": {"path": pairs, "type": "bradley_terry.chat_template", "field_input": "prompt"},
    }
    for method, entry in entries.items():
        dataset_job(f"{method}.yaml", rl=method, datasets=[entry], output_dir=str(tmp_path / "base"), chat_template="chatml")
    (tmp_path / "rates.py").write_text(SWEEPS)
    with head_node(cpus=2) as head:
        entrypoint = ["--working-dir", str(REPOSITORY), "--", "python", str(tmp_path / "rates.py"), str(tmp_path)]
        code, output = run([*RAY, "job", "submit", "--address", head.dashboard, *entrypoint], head.environment)
    assert code == 0, output
    for method in ("dpo", "kto", "orpo", "reward_trainer"):
        assert f"{method} {{'learning_rate': 0.02}} ['done', 'done']" in output, output
