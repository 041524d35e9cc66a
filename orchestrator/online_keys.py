"""What `rl: grpo` does with every key of the schema: four literal tables and the rules for dataset entries.

See `runnable.py` for what the tables mean. When a feature arrives, its line moves to ACTS_ON.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from actors.formats.templates import CHAT_TEMPLATES, FAMILIES, OWN
from orchestrator.schema import DatasetConfig, JobConfig
from orchestrator.source import Problem, Translation
from orchestrator.values import value_of

# fmt: off
WANDB = (
    "use_wandb", "wandb_project", "wandb_entity", "wandb_name", "wandb_run_id", "wandb_mode", "wandb_watch",
    "wandb_log_model",
)
ACTS_ON = frozenset({
    "rl", "base_model", "model_type", "tokenizer_type", "trust_remote_code", "output_dir", "adapter",
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "lora_model_dir",
    "peft_use_rslora",
    "datasets", "test_datasets", "val_set_size", "sequence_len", "excess_length_strategy", "chat_template", "micro_batch_size",
    "gradient_accumulation_steps", "num_epochs", "max_steps", "learning_rate", "optimizer", "lr_scheduler",
    "warmup_steps", "warmup_ratio", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2",
    "adam_epsilon", "bf16", "gradient_checkpointing", "seed", "attn_implementation",
    "save_steps", "save_strategy", "save_total_limit", "eval_steps", "saves_per_epoch", "evals_per_epoch",
    "resume_from_checkpoint", "auto_resume_from_checkpoints", "use_tensorboard", *WANDB,
    "deepspeed", "fsdp_version", "fsdp_config", "ray_num_workers", "resources_per_worker",
    "ray_run_name", "rl_beta", "trl.beta", "trl.use_vllm",
    "load_in_4bit", "load_in_8bit", "trl.vllm_mode", "trl.vllm_enable_sleep_mode", "trl.vllm_sync_interval",
    "trl.num_generations", "trl.max_completion_length",
    "trl.reward_funcs", "trl.reward_weights", "trl.rollout_func", "trl.temperature", "trl.top_p", "trl.top_k", "trl.min_p",
    "trl.num_iterations", "trl.epsilon", "trl.epsilon_high", "trl.loss_type", "trl.scale_rewards",
    "trl.multi_objective_aggregation",
    "trl.importance_sampling_level", "trl.mask_truncated_completions", "trl.generation_kwargs",
    "trl.chat_template_kwargs", "trl.log_completions", "vllm.tensor_parallel_size", "vllm.data_parallel_size",
    "vllm.gpu_memory_utilization", "vllm.max_model_len", "vllm.dtype", "vllm.enable_prefix_caching",
    "vllm.enforce_eager", "ray.engines", "ray.trainer_cpus", "ray.engine_cpus", "ray.engine_gpus",
    "ray.max_staleness", "ray.late_steps", "ray.sync", "ray.reward_timeout_s", "ray.sandbox", "ray.judges",
    "ray.rollout_timeout_s", "ray.importance_sampling_cap", "ray.sync_bucket_mib", "ray.max_resamples", "ray.kv_cache_gib",
    "ray.max_bad_rows", "ray.placement",
})
DATASET_ACTS_ON = frozenset({
    "path", "type", "name", "split", "data_files", "ds_type", "revision",
})
# fmt: on

OPTIMIZERS = ("adamw_torch_fused", "adamw_torch")
PAGED_ADAMW = "paged_adamw_32bit"  # the same formula, with states that may move to the CPU
# fmt: off
# the ones that transformers builds from warmup and total steps alone
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt",
)
# fmt: on
ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# fields of vLLM's SamplingParams that leave what the driver decides (number, length, temperature, logprobs) alone
GENERATION_KWARGS = (
    "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens", "bad_words",
    "allowed_token_ids", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
NO_TEMPLATE = f"is no template that Eagleray has; use {OWN}, which is the model's own, or one of {', '.join(CHAT_TEMPLATES)}"
SPEED_PLUGINS = ("LigerPlugin", "CutCrossEntropyPlugin")


def absent_or(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is written and none of these."""
    return lambda value: value is not None and value not in values


def is_class(name: str | None, ending: str) -> bool:
    """Whether a class of transformers by that ending is named, or none."""
    return name is None or name.endswith(ending)


TOKENIZER_LIMIT = (
    "tokenizer_type",
    lambda v: not (is_class(v, "Tokenizer") or is_class(v, "TokenizerFast")),
    "is no class of tokenizers; remove the key",
)
WANDB_LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("wandb_watch", absent_or("", "false", "none"), "gradients are not watched; remove it"),
    ("wandb_log_model", absent_or("", "false", "end"), "is not implemented yet; end uploads the result"),
)

# (key, is the value one that rl: grpo does not do?, sentence)
LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model_type", lambda v: not is_class(v, "ForCausalLM"), "is no class of language models; remove the key"),
    TOKENIZER_LIMIT,
    ("optimizer", absent_or(*OPTIMIZERS, PAGED_ADAMW), f"is not implemented yet; use {' or '.join(OPTIMIZERS)}"),
    ("lr_scheduler", absent_or(*SCHEDULERS), f"is not implemented yet; use one of {', '.join(SCHEDULERS)}"),
    ("attn_implementation", absent_or(*ATTENTION), f"is not implemented yet; use one of {', '.join(ATTENTION)}"),
    ("chat_template", absent_or(OWN, *FAMILIES, *CHAT_TEMPLATES), NO_TEMPLATE),
    ("save_strategy", absent_or("steps", "epoch", "no"), "is not implemented yet; use save_steps"),
    ("ray_num_workers", lambda v: isinstance(v, list), "a trainer's ranks cannot change while it runs; give one number"),
    (
        "plugins",
        lambda v: any(name.rpartition(".")[2] not in SPEED_PLUGINS for name in v or []),
        "cannot be loaded; remove it",
    ),
    ("special_tokens", lambda v: bool(set(v or {}) - {"pad_token"}), "is not implemented yet; keep pad_token only"),
    (
        "trl.generation_kwargs",
        lambda v: bool(set(v or {}) - set(GENERATION_KWARGS)),
        f"takes {', '.join(GENERATION_KWARGS)}; use the keys of trl: for the rest",
    ),
    (
        "lora_target_modules",
        lambda v: bool({"embed_tokens", "lm_head"} & set([v] if isinstance(v, str) else v or [])),
        "embeddings cannot be synchronized to the engines; name linear layers",
    ),
    ("excess_length_strategy", lambda v: v == "truncate", "prompts are not cut; use drop or raise"),
    ("vllm.data_parallel_size", lambda v: v != 1, "use ray.engines for more engines"),
    ("vllm.dtype", lambda v: v in ("half", "float16"), "is not implemented yet; use bfloat16 or float32"),
    *WANDB_LIMITS,
)

_SFT = "not used: it concerns SFT"
LIGER = dict.fromkeys(
    (
        "plugins",
        "liger_rope",
        "liger_rms_norm",
        "liger_layer_norm",
        "liger_swiglu",
        "liger_glu_activation",
        "liger_cross_entropy",
        "liger_fused_linear_cross_entropy",
        "cut_cross_entropy",
    ),
    "not used: a faster kernel, same result",
)
MEMORY = {
    "gradient_checkpointing_kwargs": "not used: they change memory and speed, no result",
    "activation_offloading": "not used: it changes memory and speed, no result",
    "save_only_model": "not used: checkpoints always hold what a resume needs",
}
_ATTENTION = "not used: attention knows which completions share a prompt, which no kernel by name does; same result"
_DDP = "not used: ranks add up their gradients once a step"
IDLE: dict[str, str] = {
    "use_ray": "not used: every job runs on Ray",
    "logging_steps": "not used: every step is recorded",
    "flash_attention": _ATTENTION,
    "sdp_attention": _ATTENTION,
    "strict": "not used: every file is checked strictly",
    "reward_model": "not used: it concerns rl: reward_trainer",
    "special_tokens": "not used: padding is masked, so its token changes nothing",
    **LIGER,
    "tf32": "not used: PyTorch's own setting stays",
    **MEMORY,
    "torch_compile": "not used: it changes speed, no result",
    "eot_tokens": _SFT,
    "train_on_inputs": _SFT,
    "sample_packing": "not needed: completions are trained without padding to sequence_len",
    "eval_sample_packing": "not needed: completions are trained without padding to sequence_len",
    "pad_to_sequence_len": "not used: batches are padded to their longest row",
    "dataset_prepared_path": "not used: prompts are prepared in memory",
    "eval_batch_size": "not used: the engines batch evaluation prompts by themselves",
    "ddp_timeout": _DDP,
    "ddp_bucket_cap_mb": _DDP,
    "ddp_broadcast_buffers": _DDP,
    "ddp_find_unused_parameters": _DDP,
    "dpo_loss_type": "not used: it concerns rl: dpo",
    "dpo_label_smoothing": "not used: it concerns rl: dpo",
    "orpo_alpha": "not used: it concerns rl: orpo",
    "kto_desirable_weight": "not used: it concerns rl: kto",
    "kto_undesirable_weight": "not used: it concerns rl: kto",
    "center_rewards_coefficient": "not used: it concerns rl: reward_trainer",
    "trl.vllm_lora_sync": "not used: what is trained travels to the engines, LoRA weights or all",
}

_SPLIT = "is not implemented yet; remove it, and shard the model with fsdp_version: 2 or deepspeed"
_ADDED_TOKENS = "new tokens are not implemented yet; add them to the model and give its folder as base_model"
NOT_YET: dict[str, str] = {
    "fp16": "is not implemented yet; use bf16: auto",
    "hub_model_id": "pushing to the hub is not implemented yet; upload output_dir after the job",
    "tokens": _ADDED_TOKENS,
    "gptq": "a GPTQ base model is not implemented yet; use one that is not quantized",
    "unfrozen_parameters": "is not implemented yet; choose layers with lora_target_modules",
    "bnb_config_kwargs": "is not implemented yet; NF4 with double quantization, or int8, is what load_in_4bit and _8bit give",
    "lora_modules_to_save": "only LoRA weights are synchronized to the engines; remove it",
    "lora_fan_in_fan_out": "is not implemented yet; remove it",
    "peft_use_dora": "vLLM cannot sample from a DoRA adapter; remove it",
    "pretraining_dataset": "rl: grpo reads datasets; use that",
    "chat_template_jinja": "is not implemented yet; use chat_template with a name, or none for the model's own",
    "streaming": "is not implemented yet; remove it",
    "shuffle_merged_datasets": "prompts are always shuffled; remove it",
    "lr_groups": "is not implemented yet; use learning_rate",
    "cosine_min_lr_ratio": "rl: grpo has no schedule with a floor yet; remove it, and use lr_scheduler: cosine",
    "liger_use_token_scaling": "changes the loss and is not implemented yet; remove it",
    "early_stopping_patience": "is not implemented yet; use max_steps",
    "neftune_noise_alpha": "rl: grpo adds no noise to the embeddings; remove it",
    "loss_watchdog_threshold": "is not implemented yet; remove it",
    "loss_watchdog_patience": "is not implemented yet; remove it",
    "tensor_parallel_size": _SPLIT,
    "context_parallel_size": _SPLIT,
    "dp_shard_size": _SPLIT,
    "dp_replicate_size": _SPLIT,
}

_DATASET_NOT_YET = "rl: grpo does not read it; shape the rows with type: module.fn, a function that returns a transform"


def entry_problems(key: str, entry: DatasetConfig, rl: str | None) -> Iterator[Problem]:
    """What a dataset entry asks for that prompts do not have."""
    if entry.type is not None and not (isinstance(entry.type, str) and FUNCTION.fullmatch(entry.type)):
        yield Problem(f"{key}.type", f"{entry.type}: {_DATASET_NOT_YET}")
    for f in dataclasses.fields(DatasetConfig):
        if f.name not in DATASET_ACTS_ON and getattr(entry, f.name) != f.default:
            yield Problem(f"{key}.{f.name}", _DATASET_NOT_YET)


def model_notes(config: JobConfig) -> Iterator[Problem]:
    """What is named and follows from the model."""
    if config.chat_template in FAMILIES:
        mark = FAMILIES[config.chat_template]
        yield Translation("chat_template", f"read as {OWN}, the model's own, which must have {mark} in it")
    for key, auto in (("model_type", "AutoModelForCausalLM"), ("tokenizer_type", "AutoTokenizer")):
        if value_of(config, key) not in (None, auto):
            yield Problem(key, "not used: the class follows from the model's own files and from the method")


def notes(config: JobConfig) -> Iterator[Problem]:
    """Settings that are taken in another way than they are written."""
    yield from model_notes(config)
    if config.optimizer == PAGED_ADAMW:
        yield Translation("optimizer", "read as adamw_torch: the same formula, and nothing moves to the CPU")
    if not config.trl.use_vllm:
        yield Translation("trl.use_vllm", "read as true: Eagleray always samples with vLLM, from the policy of that step")
    if config.trl.vllm_enable_sleep_mode and config.trl.vllm_mode == "server":
        text = "not used: with vllm_mode: server engines have a placement of their own, so they need not sleep"
        yield Problem("trl.vllm_enable_sleep_mode", text)
    if config.attn_implementation and not (config.flash_attention or config.sdp_attention):
        yield Problem("attn_implementation", _ATTENTION)
    if config.trl.multi_objective_aggregation == "normalize_then_sum" and config.trl.scale_rewards != "group":
        text = "not used: with multi_objective_aggregation: normalize_then_sum each function is scaled by its group"
        yield Problem("trl.scale_rewards", text)
