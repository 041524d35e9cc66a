"""The output folder: one run at a time, checkpoints that are whole, and where a run goes on.

output_dir/
  adapter_model.safetensors, adapter_config.json   the result
  checkpoint-12/   the trainer's files, state.json, manifest.json with digests
  config.yaml, origin.json, metrics.jsonl, tensorboard/, quarantine.json, rollouts/
"""

import fcntl
import itertools
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors import storage
from actors.errors import CheckpointError, ConfigError
from orchestrator.schema import JobConfig

RESULTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
LOCK = ".lock"


@contextmanager
def claimed(output_dir: Path) -> Iterator[str]:
    """Holds the folder for this run; yields what stands in its lock file, unlike that of any other run.

    Raises ConfigError when another run holds it, or it cannot be made.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock = open(output_dir / LOCK, "a")  # noqa: SIM115  (closed below)
    except OSError as error:
        raise ConfigError(f"output_dir: {output_dir} cannot be written ({error}); choose another one") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
        except OSError as error:
            raise ConfigError(f"output_dir: {output_dir} is in use by another run; choose another one") from error
        lock.truncate(0)
        content = uuid.uuid4().hex
        lock.write(content)
        lock.flush()
        yield content


def resume_point(config: JobConfig, output_dir: Path, warn: Any) -> Path | None:
    """The checkpoint to go on from, whole, or None for a new run.

    Raises ConfigError when the folder holds a run and the job does not say to go on, so that nothing is overwritten;
    CheckpointError when the checkpoint that was asked for is damaged. With auto_resume_from_checkpoints a damaged one
    is passed over with a warning.
    """
    saved = storage.steps_saved(output_dir)
    used = bool(saved) or any((output_dir / name).exists() for name in RESULTS)
    if config.resume_from_checkpoint:
        path = Path(config.resume_from_checkpoint).resolve()
        storage.verify(path)
        if used and path.parent != output_dir:
            raise ConfigError(
                f"output_dir: {output_dir} holds a run that resume_from_checkpoint ({path}) is not part of; "
                "choose another folder"
            )
        return path
    if not config.auto_resume_from_checkpoints:
        if used:
            raise ConfigError(
                f"output_dir: {output_dir} holds an earlier run; go on with it by auto_resume_from_checkpoints: true, "
                "or choose another folder"
            )
        return None
    for step in saved:
        path = storage.checkpoint_path(output_dir, step)
        try:
            storage.verify(path)
            return path
        except CheckpointError as error:
            warn(str(error))
    if used:
        raise CheckpointError(
            f"output_dir: {output_dir} holds an earlier run and no whole checkpoint of it to go on from; "
            "choose another folder"
        )
    return None


def set_newer_aside(resumed: Path, step: int, output_dir: Path) -> list[Path]:
    """Renames the folder's checkpoints of later steps than the resumed one: damaged, or of a future that is redone.

    The run makes checkpoints under their names again. Returns where they lie now.
    """
    moved = []
    for newer in storage.steps_saved(output_dir) if resumed.parent == output_dir else []:
        if newer > step:
            path = storage.checkpoint_path(output_dir, newer)
            aside = next(p for n in itertools.count(1) if not (p := path.with_name(f"aside-{n}-{path.name}")).exists())
            moved.append(path.rename(aside))
    return moved


def ensure_same_job(saved: dict[str, Any], job: dict[str, Any], path: Path) -> None:
    """Raises ConfigError when a resumed job would not be the one that was saved."""
    for key, value in job.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"{key}: the checkpoint {path} was made with {saved.get(key)}, this job has {value}; "
                "put it back, or start anew in another output_dir"
            )


def prune(output_dir: Path, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints."""
    if keep is not None:
        for step in storage.steps_saved(output_dir)[max(keep, 1) :]:
            shutil.rmtree(storage.checkpoint_path(output_dir, step))
