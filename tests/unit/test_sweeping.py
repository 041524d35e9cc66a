"""What a sweep makes of the folder that it is given, before Ray starts."""

import logging
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import ConfigError, EaglerayError
from orchestrator import sweep_plan, sweep_search, sweeps, waits
from orchestrator.cli import main
from orchestrator.plan import Plan


def config(**changes: Any) -> Any:
    """A sweep as far as its folder is concerned."""
    space = SimpleNamespace(texts=lambda: {"learning_rate": "grid [0.1]"}, keys=("learning_rate",))
    about = {"metric": "eval/loss", "mode": "min", "space": space, "trials": 1, "scheduler": {"name": "none"}, "seed": 42}
    return SimpleNamespace(**{**about, "share_engines": False, **changes})


def test_a_file_of_a_persons_is_not_overwritten(tmp_path: Path) -> None:
    """As with base: base.yaml and output_dir: . in one file."""
    assert not sweeps._holds_this(config(), tmp_path)
    (tmp_path / "base.yaml").write_text("rl: grpo")
    with pytest.raises(ConfigError, match="holds a file base.yaml, which the sweep would overwrite; choose another folder"):
        sweeps._holds_this(config(), tmp_path)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "sweep.json cannot be read as what a sweep wrote there: "),
        ("[]", "sweep.json cannot be read as what a sweep wrote there: it has no version"),
        ('{"version": 2, "metric": "eval/loss", "mode": "min"}', "is of version 2; this Eagleray reads version 1"),
        ('{"version": 1, "metric": "loss", "mode": "min"}', 'holds another sweep: its metric is "loss", not "eval/loss"'),
    ],
)
def test_a_folder_that_holds_no_such_sweep_is_one_message(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "sweep.json").write_text(written)
    with pytest.raises(EaglerayError, match=said):
        sweeps._holds_this(config(), tmp_path)


@pytest.mark.parametrize(
    ("keys", "max_steps", "expected"),
    [
        (["learning_rate"], None, 50),
        (["learning_rate", "num_epochs"], None, None),
        (["datasets[0].path"], None, None),
        (["num_epochs"], 20, 20),
        (["max_steps"], 20, None),
    ],
)
def test_how_long_trials_are_is_said_where_all_are_alike(keys: list[str], max_steps: int | None, expected: int | None) -> None:
    """50 steps are those of the base, which the others would have without these keys."""
    plan = object.__new__(Plan)
    object.__setattr__(plan, "total_steps", max_steps or 50)
    job: Any = SimpleNamespace(plan=plan, config=SimpleNamespace(max_steps=max_steps))
    assert sweep_plan.steps_of_each(job, keys) == expected


def test_a_process_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a notebook, which may use Tune for something else."""
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "60")
    monkeypatch.delenv("TUNE_DISABLE_AUTO_INIT", raising=False)
    level = logging.getLogger("ray.tune").level
    with sweep_search.quiet_tune():
        assert os.environ["TUNE_GLOBAL_CHECKPOINT_S"] == "2" and os.environ["TUNE_DISABLE_AUTO_INIT"] == "1"
    assert os.environ["TUNE_GLOBAL_CHECKPOINT_S"] == "60" and "TUNE_DISABLE_AUTO_INIT" not in os.environ
    assert logging.getLogger("ray.tune").level == level


def test_a_wait_for_what_is_left_hears_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_search.trial_process, "processes", lambda folder: [SimpleNamespace(pid=1)])
    monkeypatch.setattr(waits, "_signals", [signal.SIGINT])
    with pytest.raises(waits.Interrupted):
        sweep_search.wait_for_processes(tmp_path, 30, waits.pause)


def test_a_cluster_is_only_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["sweep", "sweep.yaml", "--cluster", "8x80GB"])
    assert ended.value.code == 2 and "--cluster says what --plan plans for" in capsys.readouterr().err
