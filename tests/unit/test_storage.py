"""Folders that are whole or absent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actors import storage
from actors.dataset_loop import train_loop
from actors.errors import CheckpointError


def filled(path: Path) -> Path:
    with storage.new_folder(path) as folder:
        (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
        (folder / "nested").mkdir()
        (folder / "nested" / "state.json").write_text('{"step": 3}')
        (folder / "empty.txt").write_bytes(b"")
    return path


def test_a_new_folder_holds_what_was_written_and_verifies(tmp_path: Path) -> None:
    path = filled(tmp_path / "run" / "checkpoint-3")
    assert (path / "weights.safetensors").read_bytes() == bytes(range(256)) * 40
    assert json.loads((path / "nested" / "state.json").read_text()) == {"step": 3}
    storage.verify(path)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


def test_the_folder_is_not_there_before_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with storage.new_folder(path) as folder:
        (folder / "a").write_text("a")
        assert folder != path and not path.exists()
    assert path.is_dir()


@pytest.mark.parametrize("error", [RuntimeError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_failure_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "checkpoint"
    with pytest.raises(type(error)), storage.new_folder(path) as folder:
        (folder / "weights.safetensors").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []
    storage.verify(filled(path))  # and the next attempt is not in its way


def test_what_a_killed_process_left_is_no_obstacle_and_not_taken_over(tmp_path: Path) -> None:
    killed = storage.new_folder(tmp_path / "checkpoint")
    folder = killed.__enter__()
    (folder / "stale.bin").write_bytes(b"half")
    path = filled(tmp_path / "checkpoint")
    assert not (path / "stale.bin").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=f"{path} exists already"), storage.new_folder(path):
        pytest.fail("the block was entered")
    storage.verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["weights.safetensors", "nested/state.json"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(flip, "is not what was written"), (truncate, "is not what was written"), (Path.unlink, "is missing")],
)
def test_verify_names_the_damaged_file(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    path = filled(tmp_path / "checkpoint")
    damage(path / name)
    with pytest.raises(CheckpointError, match=f"{path / name} {message}"):
        storage.verify(path)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}"])
def test_verify_names_a_manifest_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = filled(tmp_path / "checkpoint")
    if text is None:
        (path / storage.MANIFEST).unlink()
    else:
        (path / storage.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{path / storage.MANIFEST} cannot be read"):
        storage.verify(path)


def test_write_json_replaces_the_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    storage.write_json(file, {"a": [1, 2.5, None]})
    storage.write_json(file, {"b": "ü"})
    assert json.loads(file.read_text(encoding="utf-8")) == {"b": "ü"}
    with pytest.raises(TypeError):
        storage.write_json(file, {"c": object()})
    assert json.loads(file.read_text(encoding="utf-8")) == {"b": "ü"}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_only_the_drivers_own_folder_is_shared(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("this run")
    storage.ensure_shared(str(tmp_path / ".lock"), "this run")
    for marker, content in ((tmp_path / ".lock", "another"), (tmp_path / "none" / ".lock", "this run")):
        with pytest.raises(CheckpointError, match=f"output_dir: {marker.parent} .*use storage that all nodes mount"):
            storage.ensure_shared(str(marker), content)


def test_a_worker_of_a_dataset_job_looks_before_it_loads_anything(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="output_dir"):
        train_loop({"marker": (str(tmp_path / ".lock"), "this run"), "spec": None, "reports": None})
