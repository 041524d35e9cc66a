"""What SFT, DPO, KTO, ORPO and reward models do with every key of the schema: four literal tables.

See `runnable.py` for what the tables mean. When a feature arrives, its line moves to ACTS_ON.
"""

from collections.abc import Callable, Iterator
from typing import Any

from actors.errors import ConfigError
from actors.formats.base import FormatSpec
from actors.formats.templates import has_template
from actors.preparing import ensure_type
from orchestrator.online_keys import (
    ATTENTION,
    LIGER,
    MEMORY,
    NO_TEMPLATE,
    SPEED_PLUGINS,
    TOKENIZER_LIMIT,
    WANDB,
    WANDB_LIMITS,
    absent_or,
    is_class,
    model_notes,
)
from orchestrator.schema import DatasetConfig, JobConfig
from orchestrator.source import Problem, Translation

# fmt: off
ACTS_ON = frozenset({
    "rl", "reward_model", "base_model", "model_type", "tokenizer_type", "trust_remote_code", "output_dir",
    "eot_tokens", "adapter", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_linear", "lora_target_modules", "lora_modules_to_save", "lora_model_dir", "peft_use_dora",
    "peft_use_rslora",
    "datasets", "test_datasets", "val_set_size", "sequence_len", "excess_length_strategy", "sample_packing",
    "eval_sample_packing", "dataset_prepared_path", "chat_template", "chat_template_jinja", "train_on_inputs",
    "micro_batch_size", "gradient_accumulation_steps", "eval_batch_size", "num_epochs", "max_steps", "learning_rate",
    "optimizer", "lr_scheduler", "cosine_min_lr_ratio", "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm",
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "tf32", "gradient_checkpointing", "seed",
    "attn_implementation", "sdp_attention", "flash_attention", "torch_compile", "save_steps", "saves_per_epoch",
    "save_strategy", "save_total_limit", "eval_steps", "evals_per_epoch", "logging_steps", "resume_from_checkpoint",
    "auto_resume_from_checkpoints", "early_stopping_patience", "use_tensorboard", "loss_watchdog_threshold",
    "loss_watchdog_patience", "neftune_noise_alpha", "ddp_timeout",
    "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ray_num_workers",
    "resources_per_worker", "ray_run_name", "rl_beta", "dpo_loss_type", "dpo_label_smoothing", "orpo_alpha",
    "kto_desirable_weight", "kto_undesirable_weight", "center_rewards_coefficient", "trl.beta", "ray.max_bad_rows",
    "ray.trainer_cpus", "special_tokens", "streaming", "deepspeed", "fsdp_version", "fsdp_config", *WANDB,
})
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop", "adamw_bnb_8bit", "adamw_8bit",
    "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit",
)
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr",
)
# what speaks of an adapter
ADAPTER = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_modules_to_save",
    "peft_use_dora", "peft_use_rslora",
)
# fmt: on
SPECIAL_TOKENS = frozenset({"bos_token", "eos_token", "pad_token", "unk_token"})
_SPECIAL = ", ".join(sorted(SPECIAL_TOKENS))

# (key, is the value one that these methods do not do?, sentence)
LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "model_type",
        lambda v: not (is_class(v, "ForCausalLM") or is_class(v, "ForSequenceClassification")),
        "is no class of language or reward models; remove the key",
    ),
    TOKENIZER_LIMIT,
    ("optimizer", absent_or(*OPTIMIZERS), f"is not implemented yet; use one of {', '.join(OPTIMIZERS)}"),
    ("lr_scheduler", absent_or(*SCHEDULERS), f"is not implemented yet; use one of {', '.join(SCHEDULERS)}"),
    ("chat_template", lambda v: not has_template(v), NO_TEMPLATE),
    ("attn_implementation", absent_or(*ATTENTION), f"is not implemented yet; use one of {', '.join(ATTENTION)}"),
    ("save_strategy", absent_or("steps", "epoch", "no"), "is not implemented yet; use save_steps"),
    (
        "plugins",
        lambda v: any(name.rpartition(".")[2] not in SPEED_PLUGINS for name in v or []),
        "cannot be loaded; remove it",
    ),
    ("special_tokens", lambda v: bool(set(v or {}) - SPECIAL_TOKENS), "is not implemented yet; name only " + _SPECIAL),
    *WANDB_LIMITS,
)

_GRPO = "not used: it concerns rl: grpo"
IDLE: dict[str, str] = {
    "use_ray": "not used: every job runs on Ray",
    "strict": "not used: every file is checked strictly",
    **LIGER,
    **MEMORY,
    "pad_to_sequence_len": "not used: batches are padded to their longest row",
    **dict.fromkeys(
        (
            "vllm.tensor_parallel_size",
            "vllm.data_parallel_size",
            "vllm.gpu_memory_utilization",
            "vllm.max_model_len",
            "vllm.dtype",
            "vllm.enable_prefix_caching",
            "vllm.enforce_eager",
            "ray.engines",
            "ray.engine_cpus",
            "ray.engine_gpus",
            "ray.max_staleness",
            "ray.late_steps",
            "ray.sync",
            "ray.reward_timeout_s",
            "ray.sandbox",
            "ray.judges",
            "ray.rollout_timeout_s",
            "ray.importance_sampling_cap",
            "ray.sync_bucket_mib",
            "ray.max_resamples",
            "ray.kv_cache_gib",
            "ray.placement",
            "trl.use_vllm",
            "trl.vllm_mode",
            "trl.vllm_enable_sleep_mode",
            "trl.vllm_lora_sync",
            "trl.vllm_sync_interval",
            "trl.num_generations",
            "trl.max_completion_length",
            "trl.reward_funcs",
            "trl.reward_weights",
            "trl.rollout_func",
            "trl.temperature",
            "trl.top_p",
            "trl.top_k",
            "trl.min_p",
            "trl.num_iterations",
            "trl.epsilon",
            "trl.epsilon_high",
            "trl.loss_type",
            "trl.scale_rewards",
            "trl.multi_objective_aggregation",
            "trl.importance_sampling_level",
            "trl.mask_truncated_completions",
            "trl.generation_kwargs",
            "trl.chat_template_kwargs",
            "trl.log_completions",
        ),
        _GRPO,
    ),
}

_SPLIT = "is not implemented yet; remove it, and shard the model with fsdp_version: 2 or deepspeed"
NOT_YET: dict[str, str] = {
    "fp16": "is not implemented yet; use bf16: auto",
    "hub_model_id": "pushing to the hub is not implemented yet; upload output_dir after the job",
    "tokens": "new tokens are not implemented yet; add them to the model and give its folder as base_model",
    "gptq": "a GPTQ base model is not implemented yet; use one that is not quantized",
    "unfrozen_parameters": "is not implemented yet; choose layers with lora_target_modules",
    "lora_fan_in_fan_out": "is not implemented yet; remove it",
    "pretraining_dataset": "is not implemented yet; use datasets with type: completion, streaming: true and max_steps",
    "shuffle_merged_datasets": "rows are shuffled anew for every epoch; remove it",
    "bnb_config_kwargs": "is not implemented yet; NF4 with double quantization, or int8, is what load_in_4bit and _8bit give",
    "lr_groups": "is not implemented yet; use learning_rate",
    "liger_use_token_scaling": "changes the loss and is not implemented yet; remove it",
    "tensor_parallel_size": _SPLIT,
    "context_parallel_size": _SPLIT,
    "dp_shard_size": _SPLIT,
    "dp_replicate_size": _SPLIT,
}


def entry_problems(key: str, entry: DatasetConfig, rl: str | None) -> Iterator[Problem]:
    """A type that the method does not have, with those that it has; formats say the same of fields when rows are read."""
    try:
        ensure_type(rl or "sft", FormatSpec(type=entry.type))
    except ConfigError as error:
        text = str(error).removeprefix("datasets: ").removeprefix("type: ").removeprefix("type ")
        yield Problem(f"{key}.type", text)
    if not has_template(entry.chat_template):
        yield Problem(f"{key}.chat_template", f"{entry.chat_template} {NO_TEMPLATE}")
    if entry.trust_remote_code:
        yield Problem(f"{key}.trust_remote_code", "datasets no longer runs code of a dataset; remove it")


def notes(config: JobConfig) -> Iterator[Problem]:
    """Settings that belong to another method, or follow from the model."""
    yield from model_notes(config)
    for name, entries in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for index, entry in enumerate(entries or []):
            if entry.type == "sharegpt":
                yield Translation(f"{name}[{index}].type", "read as chat_template on `conversations` of `from` and `value`")
    if config.adapter is None:
        for key in ADAPTER:
            if getattr(config, key):
                yield Problem(key, "not used: adapter is not set, so all weights are trained")
    theirs: dict[str, tuple[str | None, ...]] = {
        "sample_packing": (None,),
        "train_on_inputs": (None,),
        "eot_tokens": (None,),
        "dpo_loss_type": ("dpo",),
        "dpo_label_smoothing": ("dpo", "ipo"),
        "rl_beta": ("dpo", "ipo", "kto", "orpo"),
        "orpo_alpha": ("orpo",),
        "kto_desirable_weight": ("kto",),
        "kto_undesirable_weight": ("kto",),
        "center_rewards_coefficient": ("reward_trainer",),
    }
    defaults = JobConfig()
    for key, methods in theirs.items():
        if config.rl not in methods and getattr(config, key) != getattr(defaults, key):
            names = " and ".join(f"rl: {method}" if method else "SFT" for method in methods)
            yield Problem(key, f"not used: it concerns {names}")
