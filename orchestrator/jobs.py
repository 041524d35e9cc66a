"""What online and dataset jobs share: their result, their paths, their adapter, their log, and what is said of a stop."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from actors import storage
from actors.formats.templates import CHAT_TEMPLATES, OWN
from actors.reading import BadRow
from actors.specs import LoraSpec
from orchestrator import metrics, wandb_run
from orchestrator.config import dump
from orchestrator.display import Display
from orchestrator.metrics import MetricsLog
from orchestrator.schema import JobConfig

CONFIG = "config.yaml"  # of the run: resolved, defaults included
QUARANTINE = "quarantine.json"  # rows that were left out
ORIGIN = "origin.json"  # where it was started, since the configuration names files and functions as they were found there


@dataclass(frozen=True)
class RunResult:
    """What a job leaves behind."""

    output_dir: Path  # with the adapter or the model in it
    steps: int
    evaluations: tuple[dict[str, Any], ...]  # the first is before training

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, oldest first; the names are in METRICS of metrics.py."""
        return metrics.read(self.output_dir / metrics.METRICS_FILE)

    @property
    def checkpoint(self) -> Path | None:
        """The newest one; None where none was saved."""
        return storage.newest_checkpoint(self.output_dir)

    @property
    def adapter(self) -> Path | None:
        """The folder that PeftModel.from_pretrained takes; None where all weights were trained."""
        from actors.adapter import CONFIG_FILE  # here: it loads torch

        return self.output_dir if (self.output_dir / CONFIG_FILE).is_file() else None

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What was sampled, with its rewards, a completion each, by file; empty without trl.log_completions."""
        files = sorted((self.output_dir / "rollouts").glob("*.jsonl"))
        return [{"file": path.stem, **json.loads(line)} for path in files for line in path.read_bytes().splitlines()]


def with_absolute_paths(config: JobConfig) -> JobConfig:
    """Actors run in other folders than the driver, so every path that they get is absolute.

    In a Ray job relative outputs lie in ~/eagleray: Ray deletes the job's own folder.
    """
    base_model = Path(config.base_model).expanduser()
    resume = config.resume_from_checkpoint
    start = config.lora_model_dir
    return replace(
        config,
        base_model=str(base_model.resolve()) if base_model.is_dir() else config.base_model,
        output_dir=str(kept(config.output_dir)),
        resume_from_checkpoint=str(kept(resume)) if resume else None,
        lora_model_dir=str(local_folder(config, start) or kept(start)) if start else None,
    )


def local_folder(config: JobConfig, name: str) -> Path | None:
    """The folder of that name in the current folder, beside the configuration, or among the outputs of Ray jobs."""
    places = [*(Path(base) / Path(name).expanduser() for base in config.source.folders), kept(name)]
    return next((place.resolve() for place in places if place.is_dir()), None)


def kept(name: str) -> Path:
    """Where a folder that a job writes or reads again lies: absolute, and in a Ray job outside of its own folder."""
    path = Path(name).expanduser()
    if not path.is_absolute() and "runtime_resources" in Path.cwd().parts:
        path = Path.home() / "eagleray" / path
    return path.resolve()


def write_config(config: JobConfig, output_dir: Path) -> None:
    """What whoever uses the result must know of the job."""
    (output_dir / CONFIG).write_text(dump(config), encoding="utf-8")
    storage.write_json(output_dir / ORIGIN, {"folder": str(Path.cwd()), "config": config.source.path})


def folders_of(output_dir: Path) -> list[str]:
    """Where a run looked for the files and functions that its configuration names, and where they may be by now."""
    try:
        origin = json.loads((output_dir / ORIGIN).read_text(encoding="utf-8"))
    except FileNotFoundError:  # a folder that was copied without it
        origin = {"folder": str(Path.cwd()), "config": str(output_dir / CONFIG)}
    starts = (Path(origin["folder"]), Path.cwd())  # a Ray job's own folder is deleted at its end
    return list(dict.fromkeys(str(place) for start in starts for place in (start, (start / origin["config"]).resolve().parent)))


def trained_lora(config: JobConfig) -> LoraSpec | None:
    """The adapter's shape; None = all weights are trained."""
    return lora_spec(config) if config.adapter else None


def lora_spec(config: JobConfig) -> LoraSpec:
    """The shape of an adapter that there is."""
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
        start=config.lora_model_dir,
    )


def write_quarantine(output_dir: Path, bad: Sequence[BadRow]) -> None:
    """Lists the rows that a job leaves out; where there are none, an earlier run's list goes."""
    if bad:
        storage.write_json(output_dir / QUARANTINE, [{"place": row.place, "reason": row.reason} for row in bad])
    else:
        (output_dir / QUARANTINE).unlink(missing_ok=True)


def unusable(count: int) -> str:
    """What a person is told of them."""
    return f"{count} rows cannot be used; {QUARANTINE} in output_dir has their places and reasons"


def warmup_steps(config: JobConfig, total_steps: int) -> int:
    """Of total_steps optimizer steps. A file that says nothing has Axolotl's default, 3 % of them and 100 at most."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    if config.warmup_ratio is not None:
        return ceil(config.warmup_ratio * total_steps)
    return min(int(0.03 * total_steps), 100)


def attention(config: JobConfig, gpu: bool) -> str | None:
    """Of a dataset job's model, by transformers' name; None = its default.

    flash attention's kernels are for GPUs; the result is the same without.
    """
    asked = config.attn_implementation
    return "sdpa" if asked and asked.startswith("flash") and not gpu else asked


def quantization(config: JobConfig) -> str | None:
    """nf4 | int8: of the frozen base; None = none."""
    return "nf4" if config.load_in_4bit else "int8" if config.load_in_8bit else None


def special_tokens(config: JobConfig) -> tuple[tuple[str, str], ...]:
    """The tokens that a dataset job names instead of its tokenizer's own, as ModelSpec has them."""
    return tuple(sorted((name, str(token)) for name, token in (config.special_tokens or {}).items() if token))


def template_arguments(config: JobConfig) -> dict[str, Any]:
    """Keyword arguments of apply_chat_template for an online job's prompts."""
    named = CHAT_TEMPLATES.get(config.chat_template or OWN)
    return ({"chat_template": named} if named else {}) | (config.trl.chat_template_kwargs or {})


def metrics_log(config: JobConfig, resumed_from: int, display: Display) -> MetricsLog:
    """The log of a run that goes on after step `resumed_from`; 0 is a new one."""
    output_dir = Path(config.output_dir)
    name = config.ray_run_name or output_dir.name
    run = wandb_run.WandbRun(config, name, resumed_from > 0, display) if wandb_run.wanted(config) else None
    return MetricsLog(output_dir, name, resumed_from, config.use_tensorboard, run, config.rl or "sft")


def tell_stop(display: Display, output_dir: Path, step: int) -> None:
    """What a person who stopped a job after a step needs to know."""
    saved = storage.steps_saved(output_dir)
    kept = f"the checkpoint of step {saved[0]} is whole" if saved else "there is no checkpoint yet"
    display.note(
        f"stopped after step {step}; {kept}. "
        "The same command with auto_resume_from_checkpoints=true goes on from there."
    )
