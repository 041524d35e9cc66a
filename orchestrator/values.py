"""Which value a single key may have: a name from a list (CHOICES), a number in a range (RANGES).

A new rule for one key is a line in one of the two tables; a relation between keys belongs in `validate.py`.
"""

import difflib
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from actors.specs import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES
from orchestrator.credit import AGGREGATIONS, SCALES
from orchestrator.schema import JobConfig
from orchestrator.source import Problem

# fmt: off
# transformers 5.19 (OptimizerNames, SchedulerType) and the ones that Axolotl adds
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit",
    "adamw_torch_8bit", "adafactor", "adamw_anyprecision", "ademamix", "ademamix_8bit", "sgd", "adagrad",
    "adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit",
    "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise", "lomo", "adalomo", "grokadamw", "schedule_free_radam",
    "schedule_free_adamw", "schedule_free_sgd", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    "optimi_adamw", "ao_adamw_4bit", "ao_adamw_8bit", "ao_adamw_fp8", "adopt_adamw", "came_pytorch", "muon",
    "dion", "flash_adamw", "flash_adam", "flash_sgd", "flash_sgdw", "flash_lion",
)
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
    "inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
    "warmup_stable_decay", "greedy", "one_cycle", "rex",
)
# TRL 1.16's DPOConfig
DPO_LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)
# fmt: on

CHOICES: dict[str, tuple[Any, ...]] = {
    "rl": ("dpo", "ipo", "simpo", "kto", "orpo", "grpo", "reward_trainer"),
    "adapter": ("lora", "qlora"),
    "optimizer": OPTIMIZERS,
    "lr_scheduler": SCHEDULERS,
    "bf16": (True, False, "auto", "full"),
    "tf32": (True, False, "auto"),
    "gradient_checkpointing": (True, False, "offload", "offload_disk", "unsloth"),
    "activation_offloading": (True, False, "legacy", "disk"),
    "torch_compile": (True, False, "auto"),
    "excess_length_strategy": ("drop", "truncate", "raise"),
    "save_strategy": ("steps", "epoch", "best", "no"),
    "fsdp_version": (1, 2),
    "trl.vllm_mode": ("server", "colocate"),
    "trl.loss_type": LOSS_TYPES,
    "trl.scale_rewards": SCALES,
    "trl.multi_objective_aggregation": AGGREGATIONS,
    "trl.importance_sampling_level": IMPORTANCE_SAMPLING_LEVELS,
    "dpo_loss_type": DPO_LOSSES,
    "wandb_mode": ("online", "offline", "disabled"),
    "vllm.dtype": ("auto", "bfloat16", "float16", "half", "float32", "float"),
    "ray.sync": ("auto", "fused", "adapter"),
    "ray.placement": ("pack", "spread"),
}

Rule = tuple[Callable[[float], bool], str]
POSITIVE: Rule = (lambda x: x > 0, "greater than 0")
NOT_NEGATIVE: Rule = (lambda x: x >= 0, "0 or more")
AT_LEAST_1: Rule = (lambda x: x >= 1, "1 or more")
AT_LEAST_2: Rule = (lambda x: x >= 2, "2 or more")
SHARE: Rule = (lambda x: 0 <= x <= 1, "between 0 and 1")
SHARE_BELOW_1: Rule = (lambda x: 0 <= x < 1, "at least 0 and below 1")
POSITIVE_SHARE: Rule = (lambda x: 0 < x <= 1, "above 0 and at most 1")

RANGES: dict[str, Rule] = {
    **dict.fromkeys(
        [
            "micro_batch_size",
            "gradient_accumulation_steps",
            "eval_batch_size",
            "max_steps",
            "saves_per_epoch",
        ],
        AT_LEAST_1,
    ),
    **dict.fromkeys(
        ["evals_per_epoch", "save_total_limit", "logging_steps", "early_stopping_patience"], AT_LEAST_1
    ),
    **dict.fromkeys(["loss_watchdog_patience", "lora_r", "lora_alpha", "tensor_parallel_size"], AT_LEAST_1),
    **dict.fromkeys(
        ["context_parallel_size", "dp_shard_size", "dp_replicate_size", "ddp_timeout"], AT_LEAST_1
    ),
    **dict.fromkeys(["num_epochs", "learning_rate", "adam_epsilon", "save_steps", "eval_steps"], POSITIVE),
    "neftune_noise_alpha": POSITIVE,
    **dict.fromkeys(
        ["weight_decay", "max_grad_norm", "warmup_steps", "val_set_size", "seed", "rl_beta"], NOT_NEGATIVE
    ),
    **dict.fromkeys(["orpo_alpha", "kto_desirable_weight", "kto_undesirable_weight"], NOT_NEGATIVE),
    **dict.fromkeys(["lora_dropout", "adam_beta1", "adam_beta2"], SHARE_BELOW_1),
    **dict.fromkeys(["warmup_ratio", "cosine_min_lr_ratio", "dpo_label_smoothing"], SHARE),
    "sequence_len": AT_LEAST_2,
    "trl.num_generations": (
        lambda x: x >= 2,
        "2 or more: an advantage compares the completions of one prompt",
    ),
    "trl.temperature": (lambda x: x > 0, "greater than 0: GRPO learns from completions that differ"),
    "trl.epsilon": (lambda x: 0 < x < 1, "above 0 and below 1: ratios are clipped at 1 - epsilon"),
    "trl.epsilon_high": (lambda x: x > 0, "greater than 0: ratios are clipped at 1 + epsilon_high"),
    "trl.top_k": (lambda x: x >= -1, "0 (all tokens) or more"),
    "trl.beta": NOT_NEGATIVE,
    "trl.max_completion_length": AT_LEAST_1,
    "trl.top_p": POSITIVE_SHARE,
    "trl.min_p": SHARE,
    "trl.num_iterations": AT_LEAST_1,
    "trl.vllm_sync_interval": AT_LEAST_1,
    "vllm.tensor_parallel_size": AT_LEAST_1,
    "vllm.data_parallel_size": AT_LEAST_1,
    "vllm.gpu_memory_utilization": POSITIVE_SHARE,
    "ray.engines": AT_LEAST_1,
    "ray.trainer_cpus": AT_LEAST_1,
    "ray.engine_cpus": AT_LEAST_1,
    "ray.engine_gpus": NOT_NEGATIVE,
    "ray.max_staleness": NOT_NEGATIVE,
    "ray.late_steps": NOT_NEGATIVE,
    "ray.reward_timeout_s": POSITIVE,
    "ray.rollout_timeout_s": POSITIVE,
    "ray.sync_bucket_mib": AT_LEAST_1,
    "ray.max_resamples": NOT_NEGATIVE,
    "ray.sandbox.time_s": POSITIVE,
    "ray.sandbox.memory_mib": AT_LEAST_1,
    "ray.sandbox.file_mib": AT_LEAST_1,
    "ray.importance_sampling_cap": POSITIVE,
    "ray.kv_cache_gib": AT_LEAST_1,
    "ray.max_bad_rows": SHARE,
}


def out_of_range(config: JobConfig) -> Iterator[Problem]:
    """The keys whose value is outside CHOICES or RANGES."""
    yield from _choices(config)
    yield from _ranges(config)


def value_of(config: JobConfig, key: str) -> Any:
    """The value of a dotted key without list indices, e.g. trl.beta."""
    return reduce(getattr, key.split("."), config)


def _choices(config: JobConfig) -> Iterator[Problem]:
    for key, names in CHOICES.items():
        value = value_of(config, key)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one not in names:
                words = [str(name).lower() if isinstance(name, bool) else str(name) for name in names]
                close = difflib.get_close_matches(str(one), words, n=1, cutoff=0.7)
                meant = f"did you mean {close[0]}?" if close else "choose one of them"
                yield Problem(key, f"'{one}' is not one of {', '.join(words)}; {meant}")


def _ranges(config: JobConfig) -> Iterator[Problem]:
    for key, (allowed, words) in RANGES.items():
        value = value_of(config, key)
        if value is not None and not allowed(value):
            yield Problem(key, f"is {value:g}; it must be {words}")
