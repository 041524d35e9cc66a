"""How workers share a model cut into shards: deepspeed, fsdp_version and fsdp_config, as transformers takes them.

None of them changes what is learned. An option of FSDP that starts to act gets a line in FSDP_OPTIONS.
"""

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from actors.errors import ConfigError
from actors.specs import WITH_REFERENCE
from orchestrator.schema import JobConfig
from orchestrator.source import Problem, Translation

# Option of fsdp_config, without the prefix fsdp_ that it may carry: its name in transformers.
FSDP_OPTIONS = {
    "auto_wrap_policy": "auto_wrap_policy",
    "transformer_layer_cls_to_wrap": "transformer_layer_cls_to_wrap",
    "min_num_params": "min_num_params",
    "reshard_after_forward": "reshard_after_forward",
    "cpu_ram_efficient_loading": "cpu_ram_efficient_loading",
    "offload_params": "cpu_offload",
    "cpu_offload": "cpu_offload",
}
# Options of FSDP1, and of how checkpoints are cut: FSDP2 needs none of them. And one of how fast weights are moved.
FSDP_IDLE = {
    **dict.fromkeys(
        (
            "version",
            "state_dict_type",
            "final_state_dict_type",
            "sync_module_states",
            "use_orig_params",
            "limit_all_gathers",
            "forward_prefetch",
            "backward_prefetch",
            "backward_prefetch_policy",
            "sharding_strategy",
        ),
        "not used: FSDP2 has no such option, and results are always saved whole",
    ),
    "cpu_offload_pin_memory": "not used: it changes memory and speed, no result",
}
RANK_0_LOADS = "cpu_ram_efficient_loading"
CHECKPOINTING = "activation_checkpointing"  # the same as gradient_checkpointing
DESCRIBED = {
    None: "none: every worker holds the model",
    "fsdp": "FSDP2: weights, gradients and optimizer",
    "zero0": "none: every worker holds the model, in DeepSpeed",
    "zero1": "DeepSpeed ZeRO-1: optimizer",
    "zero2": "DeepSpeed ZeRO-2: gradients and optimizer",
    "zero3": "DeepSpeed ZeRO-3: weights, gradients and optimizer",
}
# Files that Axolotl ships, which its users name without having them, by what they say of the stage and of offloading. Those
# that also compile the model do nothing else with it.
_CPU = {"device": "cpu", "pin_memory": True}
_PARAMS, _ALL = {"offload_param": _CPU}, {"offload_param": _CPU, "offload_optimizer": _CPU}
_TORCH_OPTIMIZER = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
AXOLOTL_FILES: dict[str, dict[str, Any]] = {
    "deepspeed_configs/zero1.json": {"zero_optimization": {"stage": 1}},
    "deepspeed_configs/zero1_torch_compile.json": {"zero_optimization": {"stage": 1}},
    "deepspeed_configs/zero2.json": {"zero_optimization": {"stage": 2}},
    "deepspeed_configs/zero2_torch_compile.json": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        **_TORCH_OPTIMIZER,
    },
    "deepspeed_configs/zero3.json": {"zero_optimization": {"stage": 3}},
    "deepspeed_configs/zero3_bf16.json": {"zero_optimization": {"stage": 3}},
    "deepspeed_configs/zero3_bf16_cpuoffload_params.json": {"zero_optimization": {"stage": 3, **_PARAMS}},
    "deepspeed_configs/zero3_bf16_cpuoffload_all.json": {
        "zero_optimization": {"stage": 3, **_ALL},
        **_TORCH_OPTIMIZER,
    },
}
SHARDED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def kind(config: JobConfig) -> str | None:
    """fsdp | zero1 | zero2 | zero3 (zero0 shards nothing); None: every worker holds the whole model.

    Raises ConfigError for a file that cannot be read, and for what contradicts other keys.
    """
    if config.deepspeed:
        return f"zero{_deepspeed(config)['zero_optimization']['stage']}"
    return "fsdp" if config.fsdp_version or config.fsdp_config else None


def mixes(config: JobConfig) -> bool:
    """Whether a dataset job that computes in bfloat16 does so in mixed precision. Axolotl's `bf16: full` asks for none, where
    FSDP2 cuts what is trained, and that is all weights.
    """
    return not (config.bf16 == "full" and config.adapter is None and kind(config) == "fsdp")


def has_masters(config: JobConfig) -> bool:
    """Whether fp32 copies of what FSDP2 cuts are trained, as accelerate has it in the mixed precision of dataset jobs."""
    return kind(config) == "fsdp" and config.rl != "grpo" and mixes(config)


def keeps_small_updates(config: JobConfig, dtype: str) -> bool:
    """Whether what is trained has, somewhere, as many bits as a small update needs: adapters are fp32, and so are the weights
    that DeepSpeed steps on. dtype: of the computation.
    """
    return config.adapter is not None or dtype == "float32" or bool(config.deepspeed) or has_masters(config)


def described(config: JobConfig) -> str:
    """What is cut, for a person. Raises ConfigError as `kind` does."""
    return DESCRIBED[kind(config)]


def sharding_arguments(config: JobConfig, gpu: bool) -> dict[str, Any]:
    """Of transformers' TrainingArguments; none when nothing is sharded. Raises ConfigError as `kind` does."""
    if config.deepspeed:
        return {"deepspeed": _deepspeed(config)}
    if kind(config) is None:
        return {}
    options = {FSDP_OPTIONS[name]: value for name, value in _fsdp_options(config).items() if name in FSDP_OPTIONS}
    if not gpu:
        options.pop("cpu_offload", None)  # it is there already
    if _has_whole_reference(config):
        options.pop(RANK_0_LOADS, None)
    return {"fsdp": True, "fsdp_config": {"version": 2, **options}}


def checkpoints_activations(config: JobConfig) -> bool:
    """fsdp_config may ask for it too; transformers does the same for both."""
    return bool(config.gradient_checkpointing) or bool(_fsdp_options(config).get(CHECKPOINTING))


def problems(config: JobConfig) -> Iterator[Problem]:
    """What cannot be sharded, or is not an option."""
    if config.deepspeed:
        _, wrong = _read_deepspeed(config)
        yield from wrong
        if wrong:
            return
    sharding = kind(config)
    for name in config.fsdp_config or {}:
        if name.removeprefix("fsdp_") not in (*FSDP_OPTIONS, *FSDP_IDLE, CHECKPOINTING):
            known = ", ".join(sorted([*FSDP_OPTIONS, CHECKPOINTING]))
            yield Problem(f"fsdp_config.{name}", f"is not an option that Eagleray knows; use one of {known}")
    if sharding == "fsdp" and config.optimizer not in SHARDED_OPTIMIZERS:
        text = f"{config.optimizer} cannot work on shards; use one of {', '.join(SHARDED_OPTIMIZERS)}"
        yield Problem("optimizer", text)
    if sharding == "fsdp" and config.load_in_8bit:
        yield Problem("load_in_8bit", "FSDP cannot shard int8 weights; use load_in_4bit with adapter: qlora")
    if config.rl == "grpo":
        yield from _online_problems(config)
    if sharding == "zero3" and (config.load_in_4bit or config.load_in_8bit):
        key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        yield Problem(key, "ZeRO-3 does not shard a quantized model here; use zero_optimization stage 2, or fsdp_version: 2")


def _online_problems(config: JobConfig) -> Iterator[Problem]:
    """Where switching to the reference, or publishing, would not see the shards."""
    if kind(config) and config.trl.beta and (config.lora_model_dir or config.adapter is None):
        second, key = ("second adapter", "lora_model_dir") if config.adapter else ("second model", "trl.beta")
        text = f"the KL term's {second} cannot be in shards yet; use trl.beta: 0, or neither deepspeed nor fsdp"
        yield Problem(key, text)
    options = _fsdp_options(config)
    if options.get("reshard_after_forward") is False:
        yield Problem("fsdp_config.reshard_after_forward", "false is not possible with rl: grpo yet; remove it")
    if options.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP") != "TRANSFORMER_BASED_WRAP":
        yield Problem("fsdp_config.auto_wrap_policy", "rl: grpo takes TRANSFORMER_BASED_WRAP alone so far; use that")
    for name in ("offload_params", "cpu_offload"):
        if options.get(name):
            yield Problem(f"fsdp_config.{name}", "is not possible with rl: grpo yet; remove it, or use deepspeed's offload")


def notes(config: JobConfig) -> Iterator[Problem]:
    """Settings that are taken in another way than they are written."""
    if isinstance(config.gradient_checkpointing, str):
        text = "read as true: activations are computed anew, and none are moved to the CPU or the disk"
        yield Translation("gradient_checkpointing", text)
    if (config.fsdp_config and config.fsdp_version is None) or config.fsdp_version == 1:
        yield Translation("fsdp_version", "FSDP2 shards the model, whatever version is written; the result is the same")
    if isinstance(config.deepspeed, str) and _file(config, config.deepspeed) is None and _shipped(config.deepspeed):
        text = f"there is no such file here, so it is read as the one that Axolotl ships: {described(config)}"
        yield Translation("deepspeed", text)
    for name, value in (config.fsdp_config or {}).items():
        option = name.removeprefix("fsdp_")
        if option in FSDP_IDLE:
            yield Problem(f"fsdp_config.{name}", FSDP_IDLE[option])
        if option == RANK_0_LOADS and value and _has_whole_reference(config):
            yield Problem(f"fsdp_config.{name}", f"not used: it would leave rl: {config.rl} a reference of zeros on most ranks")


def _has_whole_reference(config: JobConfig) -> bool:
    """Whether TRL shards a second model by itself: in one piece, and as each rank has loaded it."""
    return kind(config) == "fsdp" and config.adapter is None and config.rl in WITH_REFERENCE


def _fsdp_options(config: JobConfig) -> dict[str, Any]:
    return {name.removeprefix("fsdp_"): value for name, value in (config.fsdp_config or {}).items()}


def _deepspeed(config: JobConfig) -> dict[str, Any]:
    """DeepSpeed's configuration, with what follows from the job's own keys left to transformers ("auto")."""
    found, wrong = _read_deepspeed(config)
    config.source.raise_if_any(wrong)
    found.setdefault("bf16", {"enabled": "auto"})
    if found["zero_optimization"]["stage"] == 3:
        found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True  # or there would be no result
    return found


def _read_deepspeed(config: JobConfig) -> tuple[dict[str, Any], list[Problem]]:
    """What the key holds or the file that it names, and what is wrong with it."""
    if isinstance(config.deepspeed, str):
        try:
            found = _from_file(config, config.deepspeed)
        except ConfigError as error:
            return {}, [Problem("deepspeed", str(error))]
    else:
        found = deepcopy(config.deepspeed or {})
    stage = found.setdefault("zero_optimization", {}).setdefault("stage", 0)
    wrong = []
    if stage not in (0, 1, 2, 3):
        wrong.append(f"zero_optimization.stage is {stage!r}; use 1, 2 or 3")
    if (found.get("fp16") or {}).get("enabled") is True:
        wrong.append("fp16 is on; Eagleray trains in bfloat16 or float32, so set it to false or auto")
    step = config.micro_batch_size * config.gradient_accumulation_steps
    workers = config.ray_num_workers
    follows = {
        "train_micro_batch_size_per_gpu": ("micro_batch_size", config.micro_batch_size),
        "gradient_accumulation_steps": ("gradient_accumulation_steps", config.gradient_accumulation_steps),
        "gradient_clipping": ("max_grad_norm", config.max_grad_norm),
        "train_batch_size": ("the rows of a step", step * workers if isinstance(workers, int) else "auto"),
    }
    for name, (key, value) in follows.items():
        if found.setdefault(name, "auto") not in ("auto", value):
            wrong.append(f"{name} is {found[name]}, but {key} is {value:g}; write auto")
    return found, [Problem("deepspeed", text) for text in wrong]


def _from_file(config: JobConfig, name: str) -> dict[str, Any]:
    """Its content, or where there is no such file that of Axolotl's."""
    path = _file(config, name)
    if path is None:
        if (shipped := _shipped(name)) is None:
            raise ConfigError(f"there is no file {name}; give its path, or write its content in place of the name")
        return deepcopy(shipped)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ConfigError(f"{name} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping; write DeepSpeed's configuration into it")
    return content


def _file(config: JobConfig, name: str) -> Path | None:
    candidates = (Path(folder, name).expanduser() for folder in config.source.folders)
    return next((path for path in candidates if path.is_file()), None)


def _shipped(name: str) -> dict[str, Any] | None:
    """What Axolotl ships under that name, in whatever folder its users have Axolotl."""
    return AXOLOTL_FILES.get("/".join(Path(name).parts[-2:]))
