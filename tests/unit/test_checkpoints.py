"""Where a run goes on, and that nothing of an earlier run is lost on the way."""

from pathlib import Path

import pytest

from actors import storage
from actors.errors import CheckpointError, ConfigError
from orchestrator.checkpoints import RESULTS, claimed, prune, resume_point, set_newer_aside
from orchestrator.schema import JobConfig


def saved(output_dir: Path, *steps: int) -> None:
    for step in steps:
        with storage.new_folder(output_dir / f"checkpoint-{step}") as folder:
            (folder / "weights").write_text(f"of step {step}")


def damage(output_dir: Path, step: int) -> None:
    (output_dir / f"checkpoint-{step}" / "weights").write_text("something else")


def go_on(output_dir: Path, **keys: object) -> Path | None:
    warnings: list[str] = []
    return resume_point(JobConfig(**{"auto_resume_from_checkpoints": True, **keys}), output_dir, warnings.append)


def test_a_damaged_checkpoint_is_passed_over_and_its_step_can_be_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, 2, 4, 6)
    damage(tmp_path, 6)
    resumed = go_on(tmp_path)
    assert resumed == tmp_path / "checkpoint-4"
    moved = set_newer_aside(resumed, 4, tmp_path)
    assert [path.name for path in moved] == ["aside-1-checkpoint-6"]
    assert (moved[0] / "weights").read_text() == "something else"  # nothing is lost
    saved(tmp_path, 6)
    prune(tmp_path, 2)
    assert storage.steps_saved(tmp_path) == [6, 4]  # the damaged one took no whole one's place
    damage(tmp_path, 6)
    assert [path.name for path in set_newer_aside(tmp_path / "checkpoint-4", 4, tmp_path)] == ["aside-2-checkpoint-6"]


def test_a_run_without_a_whole_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    assert go_on(tmp_path) is None  # a new folder is a new run
    saved(tmp_path, 2)
    damage(tmp_path, 2)
    with pytest.raises(CheckpointError, match="no whole checkpoint of it to go on from"):
        go_on(tmp_path)


def test_an_adapter_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / RESULTS[0]).write_text("mine")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        go_on(tmp_path)
    with pytest.raises(ConfigError, match="holds an earlier run"):
        go_on(tmp_path, auto_resume_from_checkpoints=False)


def test_a_checkpoint_from_elsewhere_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    saved(elsewhere, 2)
    chosen = str(elsewhere / "checkpoint-2")
    assert go_on(here, resume_from_checkpoint=chosen) == elsewhere / "checkpoint-2"
    assert set_newer_aside(elsewhere / "checkpoint-2", 2, here) == []
    saved(here, 4)
    with pytest.raises(ConfigError, match="is not part of"):
        go_on(here, resume_from_checkpoint=chosen)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), claimed(tmp_path / "file" / "out"):
        pass
