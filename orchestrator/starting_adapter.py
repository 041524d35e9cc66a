"""The adapter that a job starts from (lora_model_dir): its own configuration decides its shape, and the file may agree.

`adopted` reads the adapter's configuration, and `ensure_fits` its tensors' names and shapes, once the model is here.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from actors import adapter, model
from actors.errors import CheckpointError, ConfigError
from actors.specs import ModelSpec
from orchestrator.jobs import lora_spec
from orchestrator.runnable import default_of, not_runnable
from orchestrator.schema import JobConfig
from orchestrator.source import Problem
from orchestrator.validate import contradictions

# fields of LoraConfig that say how the adapter came about, and nothing of what it is
OF_NO_ACCOUNT = frozenset({
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "task_type", "lora_dropout",
    "target_modules", "modules_to_save", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config",
    "corda_config", "runtime_config", "megatron_config", "megatron_core",
})  # fmt: skip
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings of init_lora_weights


def adopted(config: JobConfig) -> JobConfig:
    """The job with the adapter's shape in its lora_* keys; the same job without lora_model_dir.

    Raises ConfigError for a folder without an adapter, and for all in which the adapter and the file disagree.
    """
    if config.lora_model_dir is None:
        return config
    folder = Path(config.lora_model_dir)
    try:
        theirs = adapter.read_config(folder)
        adapter.read_shapes(folder)
    except CheckpointError as error:
        config.source.raise_if_any([Problem("lora_model_dir", str(error))])
        raise
    shape = _shape(theirs)
    config.source.raise_if_any(_disagreements(config, folder, theirs, shape))
    if config.lora_target_linear or config.lora_target_modules:
        del shape["lora_target_modules"]  # what the file says; ensure_fits compares the modules themselves
    if not _written(config, "lora_dropout"):
        shape["lora_dropout"] = theirs.lora_dropout
    result = replace(config, **shape)
    mine = model.peft_config(lora_spec(result))
    config.source.raise_if_any(
        Problem("lora_model_dir", f"the adapter in {folder} has {text}")
        for text in (
            *_unknown(mine, theirs),
            *(f"{p.key}, and {p.text}" for p in (*contradictions(result), *not_runnable(result))),
        )
    )
    return result


def ensure_fits(config: JobConfig) -> None:
    """Raises ConfigError unless the adapter's tensors are those that this job would train.

    The model is on this machine; its config.json is read, and no weights.
    """
    if config.lora_model_dir is None:
        return
    folder = Path(config.lora_model_dir)
    theirs = adapter.read_shapes(folder)
    task = model.task_of(config.rl)
    spec = ModelSpec(config.base_model, "float32", config.trust_remote_code)
    mine = model.expected_shapes(spec, lora_spec(config), task)
    if adapter.read_config(folder).task_type != task:  # the head of a reward model is new
        mine = {name: shape for name, shape in mine.items() if not set(adapter.HEADS) & set(name.split("."))}
    if theirs == mine:
        return
    if theirs.keys() != mine.keys():
        key = "lora_target_linear" if config.lora_target_linear else "lora_target_modules"
        ours, others = (", ".join(_modules(names)) for names in (mine, theirs))
        text = f"means the modules {ours}, but the adapter in {folder} has {others}; remove the key"
        if ours == others:
            text = f"the adapter in {folder} has {len(theirs)} tensors, this model's would have {len(mine)}"
            key, text = "lora_model_dir", f"{text}; name the base_model that it was trained on"
        config.source.raise_if_any([Problem(key, text)])
    name = next(name for name in theirs if theirs[name] != mine[name])
    text = f"in the adapter in {folder} {name} is {list(theirs[name])}, but {config.base_model} needs {list(mine[name])}"
    config.source.raise_if_any([Problem("lora_model_dir", f"{text}; name the base_model that it was trained on")])


def digest(config: JobConfig) -> str | None:
    """What a resumed job must find again, wherever the folder lies by then."""
    if config.lora_model_dir is None:
        return None
    try:
        return adapter.digest(config.lora_model_dir)
    except OSError as error:
        raise ConfigError(f"lora_model_dir: {config.lora_model_dir} cannot be read ({error}); put it back") from error


def _shape(theirs: Any) -> dict[str, Any]:
    """The keys of the schema that the adapter's own configuration answers."""
    targets = theirs.target_modules
    saved = sorted(set(theirs.modules_to_save or ()) - set(adapter.HEADS if theirs.task_type == "SEQ_CLS" else ()))
    return {
        "lora_r": theirs.r,
        "lora_alpha": int(theirs.lora_alpha),
        "peft_use_rslora": theirs.use_rslora,
        "peft_use_dora": theirs.use_dora,
        "lora_modules_to_save": saved or None,
        "lora_target_modules": targets if isinstance(targets, str) else sorted(targets or ()),
    }


def _disagreements(config: JobConfig, folder: Path, theirs: Any, shape: dict[str, Any]) -> Iterator[Problem]:
    base = theirs.base_model_name_or_path
    if base and not _same_model(base, config.base_model):
        text = f"is {config.base_model}, but the adapter in {folder} was trained on {base}; use that"
        yield Problem("base_model", f"{text}, or if they are the same model correct its {adapter.CONFIG_FILE}")
    if theirs.task_type == "SEQ_CLS" and config.rl != "reward_trainer":
        yield Problem("lora_model_dir", f"the adapter in {folder} is a reward model's; only rl: reward_trainer goes on from it")
    for key in ("lora_r", "lora_alpha", "peft_use_rslora", "peft_use_dora", "lora_modules_to_save"):
        ours = getattr(config, key)
        if not _written(config, key) or ours is None:
            continue
        if (sorted(ours) or None if key == "lora_modules_to_save" else ours) != shape[key]:
            text = f"is {_yaml(ours)}, but the adapter in {folder} has {_yaml(shape[key])}"
            yield Problem(key, f"{text}; remove the key: the adapter's own configuration says it")


def _unknown(mine: Any, theirs: Any) -> Iterator[str]:
    """What the adapter has beyond the keys of the schema."""
    for f in fields(theirs):
        found = getattr(theirs, f.name)
        if f.name not in OF_NO_ACCOUNT and f.name in vars(mine) and found != getattr(mine, f.name):
            yield f"{f.name} {found}, which cannot be trained on here; merge it into base_model"
    if str(theirs.init_lora_weights).lower().startswith(CHANGES_THE_BASE):
        yield f"init_lora_weights {theirs.init_lora_weights}, which changes the base model; merge it into base_model"


def _same_model(one: str, other: str) -> bool:
    folders = Path(one).expanduser(), Path(other).expanduser()
    return one == other or (all(f.is_dir() for f in folders) and folders[0].resolve() == folders[1].resolve())


def _written(config: JobConfig, key: str) -> bool:
    return key in config.source.lines or key in config.source.overrides or getattr(config, key) != default_of(key)


def _modules(names: Any) -> list[str]:
    """base_model.model.model.layers.0.mlp.up_proj.lora_A.weight -> up_proj"""
    return sorted({name.split(".lora_")[0].removesuffix(".weight").rpartition(".")[2] for name in names})


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
