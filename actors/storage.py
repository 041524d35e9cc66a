"""Folders that are whole or absent: safetensors and JSON, written beside and renamed, with digests in a manifest.

They lie on storage that all nodes mount, which ensure_shared() asks before anything is trained.
No pickle is ever read. A new kind of file in a checkpoint needs nothing here: seal() covers whatever lies in the folder.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from actors.errors import CheckpointError

MANIFEST = "manifest.json"
STATE = "state.json"  # of a checkpoint: its step, and the job that a resumed one must be
READ_BYTES = 16 * 2**20
READERS = 8  # files that are read at once


def write_json(path: Path, value: object) -> None:
    """Writes beside and renames, so that a reader sees the old file or the new one."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(beside)
    os.replace(beside, path)


def ensure_shared(marker: str, content: str) -> None:
    """Raises CheckpointError unless the driver's file is seen here, so that what is saved lands where the driver looks."""
    path = Path(marker)
    if not path.is_file() or path.read_text(encoding="utf-8") != content:
        raise CheckpointError(
            f"output_dir: {path.parent} on {socket.gethostname()} is not the driver's folder of that name; "
            "use storage that all nodes mount"
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill; it becomes `path`, with a manifest, only if the block ends without an error.

    Raises CheckpointError if `path` exists already.
    """
    if path.exists():
        raise CheckpointError(f"{path} exists already; nothing is overwritten")
    beside = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        seal(beside)
        os.rename(beside, path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def seal(folder: Path) -> None:
    """Writes the manifest, last of all: a digest of every file that is there."""
    files = _files(folder)
    names = [str(file.relative_to(folder)) for file in files]
    digests = dict(zip(names, _digests(files), strict=True))
    for file in files:
        _sync(file)
    write_json(folder / MANIFEST, {"digests": digests})


def digest_of(file: Path) -> str:
    """xxh3-128 of a file, hex, read piece by piece: an optimizer's state may be larger than the memory that is free."""
    whole = xxhash.xxh3_128()
    with file.open("rb") as content:
        while piece := content.read(READ_BYTES):
            whole.update(piece)
    return whole.hexdigest()


def _digests(files: Sequence[Path]) -> list[str]:
    """Side by side: one thread reads a model and its optimizer in shards for minutes, while the other ranks wait."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest_of, files))


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def steps_saved(output_dir: Path) -> list[int]:
    """Steps that have a checkpoint, the newest first."""
    names = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    paths = (checkpoint_path(output_dir, step) for step in steps_saved(output_dir))
    return next((path for path in paths if (path / MANIFEST).is_file()), None)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the driver has to know of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def verify(path: Path) -> None:
    """Raises CheckpointError, naming the file, unless every file of the folder is as it was written."""
    try:
        digests = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["digests"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}); use another checkpoint") from error
    files = [path / name for name in digests]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; use another checkpoint")
    for file, found, expected in zip(files, _digests(files), digests.values(), strict=True):
        if found != expected:
            raise CheckpointError(f"{file} is not what was written (its digest differs); use another checkpoint")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
