"""`eagleray merge`: the adapter that a run left, and its base model, as one model in a folder of its own."""

from pathlib import Path

from safetensors import SafetensorError

from actors import adapter, storage
from actors import merge as weights
from actors.errors import EaglerayError
from orchestrator.config import load
from orchestrator.jobs import CONFIG
from orchestrator.results import base_of, dtype_of, holds_result, run_of


def merge(folder: Path, into: Path | None = None) -> list[str]:
    """Merges what lies in a run's folder, or in one of its checkpoints; returns where it is and how to load it, as lines.

    into: by default merged/ in the run's folder, merged-checkpoint-20/ for its checkpoint-20. Raises EaglerayError for a
    folder that has no adapter, a damaged one, and a target that holds something.
    """
    folder = folder.expanduser().resolve()
    run = run_of(folder)
    of_checkpoint = run != folder
    _ensure_adapter(folder, run)
    if of_checkpoint:
        storage.verify(folder)
    target = into.expanduser().resolve() if into else run / (f"merged-{folder.name}" if of_checkpoint else "merged")
    if target.exists():
        if not target.is_dir() or any(target.iterdir()):
            raise EaglerayError(f"{target} exists already and nothing is overwritten; remove it, or name another by --into")
        target.rmdir()  # it is written beside and renamed
    config = load(run / CONFIG)
    dtype = dtype_of(config)
    try:
        with storage.new_folder(target) as beside:
            name = weights.merge(base_of(config, dtype), folder, beside)
    except (OSError, SafetensorError) as error:
        raise EaglerayError(f"{target} was not written: {error}") from error
    lines = [f"merged   {target}, in {dtype}", f'load     transformers.{name}.from_pretrained("{target}")']
    if config.load_in_4bit or config.load_in_8bit:
        lines.append("note     the job's base model was quantized; that rounding is not in the merged weights")
    return lines


def _ensure_adapter(folder: Path, run: Path) -> None:
    if not folder.is_dir():
        raise EaglerayError(f"there is no folder {folder}; give the output_dir of a run, or a checkpoint in it")
    if not (folder / adapter.CONFIG_FILE).is_file():
        if holds_result(folder):
            raise EaglerayError(f"{folder} holds a whole model, so there is nothing to merge; load it as it is")
        saved = sorted(path.name for path in folder.glob("checkpoint-*"))
        remedy = f"give one of its checkpoints: {', '.join(saved)}" if saved else "give the output_dir of a finished run"
        raise EaglerayError(f"{folder} holds no adapter; {remedy}")
    if not (run / CONFIG).is_file():
        raise EaglerayError(f"{run} has no {CONFIG}, which names the base model; give the output_dir of a run")
