"""What online and dataset jobs share: their result, their paths, their adapter."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.specs import LoraSpec
from orchestrator.schema import JobConfig


@dataclass(frozen=True)
class RunResult:
    """What a job leaves behind."""

    output_dir: Path  # with the adapter or the model in it
    steps: int
    evaluations: tuple[dict[str, Any], ...]  # the first is before training


def search_paths(config: JobConfig) -> list[str]:
    """Folders in which datasets and functions are looked for: the current one, then the configuration's."""
    folders = [Path.cwd(), Path(config.source.path).resolve().parent]
    return list(dict.fromkeys(str(folder) for folder in folders))


def with_absolute_paths(config: JobConfig) -> JobConfig:
    """Actors run in other folders than the driver, so every path that they get is absolute.

    In a Ray job relative outputs lie in ~/eagleray: Ray deletes the job's own folder.
    """
    base_model = Path(config.base_model).expanduser()
    resume = config.resume_from_checkpoint
    return replace(
        config,
        base_model=str(base_model.resolve()) if base_model.is_dir() else config.base_model,
        output_dir=str(_kept(config.output_dir)),
        resume_from_checkpoint=str(_kept(resume)) if resume else None,
    )


def _kept(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_absolute() and "runtime_resources" in Path.cwd().parts:
        path = Path.home() / "eagleray" / path
    return path.resolve()


def lora_spec(config: JobConfig) -> LoraSpec:
    """The adapter's shape."""
    targets = config.lora_target_modules
    if config.lora_target_linear or not targets:
        targets = "all-linear"
    return LoraSpec(
        r=config.lora_r or 0,
        alpha=config.lora_alpha or 0,
        dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=config.peft_use_rslora,
        use_dora=config.peft_use_dora,
        modules_to_save=tuple(config.lora_modules_to_save or ()),
    )
