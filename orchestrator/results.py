"""What a run left, for those who use it: its adapter or model, a checkpoint, or what `eagleray merge` wrote; and how it loads.

`chat`, `eval` and `serve` begin with `find`, and load what `loadable` says.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from actors import adapter, device, hub, merge, model, storage
from actors.errors import EaglerayError
from actors.specs import ModelSpec
from orchestrator.checkpoints import RESULTS
from orchestrator.config import load
from orchestrator.display import Display
from orchestrator.jobs import CONFIG, folders_of, lora_spec, template_arguments
from orchestrator.plan import policy_dtype, trainer_dtype
from orchestrator.schema import JobConfig


@dataclass(frozen=True)
class Result:
    """An adapter or a whole model in a folder, and the run that it is of."""

    folder: Path  # where its files are
    run: Path  # output_dir; the same folder, or the one around it
    config: JobConfig  # of the run
    adapted: bool  # whether it is an adapter

    @property
    def name(self) -> str:
        """For people and for requests, such as grpo-sums or grpo-sums/checkpoint-20."""
        names = [self.run.name] if self.folder == self.run else [self.run.name, self.folder.name]
        return "/".join(names).replace(":", "-")  # Ray Serve takes what follows a colon for an adapter of its own

    @property
    def tokenizer(self) -> str | None:
        """The folder of the tokenizer that the rows were written with; None = the base model's own."""
        return str(self.folder) if (self.folder / "tokenizer_config.json").is_file() else None


@dataclass(frozen=True)
class Weights:
    """What an engine loads."""

    model: str  # a folder or a name of the hub
    adapter: Path | None  # to be put into it


def run_of(folder: Path) -> Path:
    """The output_dir that a folder is, or lies in."""
    inside = not (folder / CONFIG).is_file() and (folder.parent / CONFIG).is_file()
    return folder.parent if inside else folder


def holds_result(folder: Path) -> bool:
    """Whether an adapter or a model was saved there."""
    return any((folder / name).is_file() for name in RESULTS)


def find(folder: Path, display: Display) -> Result:
    """What a run's folder, a checkpoint or a merged model holds; of a run that has not ended, its newest checkpoint.

    Raises EaglerayError for a folder that has none, for a damaged checkpoint, and for a reward model, which does not answer.
    """
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise EaglerayError(f"there is no folder {folder}; give the output_dir of a run, or a checkpoint in it")
    run = run_of(folder)
    if not (run / CONFIG).is_file():
        raise EaglerayError(f"{folder} is no output_dir of a run: it has no {CONFIG}; give one, or a checkpoint in it")
    config = load(run / CONFIG)
    if config.rl == "reward_trainer":
        raise EaglerayError(
            f"{folder} holds a reward model, which scores answers and gives none; name it in trl.reward_funcs of a job"
        )
    if folder == run and not holds_result(run):
        newest = storage.newest_checkpoint(run)
        if newest is None:
            raise EaglerayError(f"{run} holds no adapter, no model and no whole checkpoint yet; wait for its first one")
        display.note(f"the run has not ended, so this is its newest checkpoint, {newest.name}")
        folder = newest
    if not holds_result(folder):
        raise EaglerayError(f"{folder} holds no adapter and no model; give the output_dir of a run, or a checkpoint in it")
    if (folder / storage.STATE).is_file():
        storage.verify(folder)
    config.source = replace(config.source, elsewhere=tuple(folders_of(run)))
    return Result(folder, run, config, (folder / adapter.CONFIG_FILE).is_file())


def step_of(result: Result) -> int | None:
    """After how many steps it was saved; None = at the end."""
    return int(storage.read_state(result.folder)["step"]) if (result.folder / storage.STATE).is_file() else None


def dtype_of(config: JobConfig) -> str:
    """What the job computed in. bf16: auto depends on the machine, and means here what it would mean to a job here."""
    resolve = policy_dtype if config.rl == "grpo" else trainer_dtype
    return resolve(config, device.has_gpu(), device.fastest_dtype(gpu=False))


def base_of(config: JobConfig, dtype: str) -> ModelSpec:
    """The base model as the job read it, never quantized. A dataset job saves its template with the result."""
    template = template_arguments(config).get("chat_template") if config.rl == "grpo" else None
    return ModelSpec(config.base_model, dtype, config.trust_remote_code, chat_template=template)


@contextmanager
def loadable(result: Result, display: Display) -> Iterator[Weights]:
    """A whole model as it is, and an adapter beside its base. One that engines cannot take is merged first, in a folder in
    output_dir, which all nodes mount; it lasts as long as the block.
    """
    if not result.adapted:
        yield Weights(str(result.folder), None)
        return
    base = base_of(result.config, dtype_of(result.config))
    hub.resolve(base.name)
    if adapter.is_of_linear_layers(result.folder):
        adapter.load(result.folder, model.expected_shapes(base, lora_spec(result.config)))
        yield Weights(base.name, result.folder)
        return
    with _merged(result, base, display) as folder:
        yield Weights(str(folder), None)


@contextmanager
def _merged(result: Result, base: ModelSpec, display: Display) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=".merged-", dir=result.run))
    except OSError as error:
        raise EaglerayError(f"the adapter cannot be merged in {result.run}: {error}") from error
    try:
        with display.phase("merging the adapter into its base model, since engines know none of its kind"):
            try:
                merge.merge(base, result.folder, folder)
            except (OSError, SafetensorError) as error:
                raise EaglerayError(f"the adapter could not be merged in {folder}: {error}") from error
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
