"""From a checked configuration to the arguments of TRL's trainers: one pure function, so that it can be read and tested.

What a method's trainer needs beside these, it sets itself (actors/methods). A key that starts to act gets a line here.
"""

from typing import Any

from orchestrator.jobs import warmup_steps
from orchestrator.schema import JobConfig
from orchestrator.sharding import checkpoints_activations, mixes, sharding_arguments

# Axolotl's and older names of transformers' optimizers
OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit"}


def training_arguments(config: JobConfig, *, gpu: bool, dtype: str, steps_per_epoch: float, total_steps: int) -> dict[str, Any]:
    """Keyword arguments of the method's TRL configuration.

    dtype: of the computation. steps_per_epoch and total_steps: optimizer steps, known once the data is prepared.
    """
    save = _interval(config.save_steps, config.saves_per_epoch, steps_per_epoch)
    evaluation = _interval(config.eval_steps, config.evals_per_epoch, steps_per_epoch)
    held_out = bool(config.test_datasets or config.val_set_size)
    if held_out and evaluation is None:
        evaluation = total_steps  # at the end
    if config.save_strategy is None or config.save_strategy == "steps":
        save_strategy, save_steps = "steps", save or max(1, round(steps_per_epoch))
    else:
        save_strategy, save_steps = config.save_strategy, 1
    stops_early = config.early_stopping_patience is not None
    if stops_early and evaluation is not None:
        save_strategy, save_steps = "steps", evaluation  # the best one must have been saved
    return {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler if config.cosine_min_lr_ratio is None else "cosine_with_min_lr",
        "lr_scheduler_kwargs": {} if config.cosine_min_lr_ratio is None else {"min_lr_rate": config.cosine_min_lr_ratio},
        "restore_callback_states_from_checkpoint": stops_early,  # how long nothing has got better
        "warmup_steps": warmup_steps(config, total_steps),
        "optim": OPTIMIZERS.get(config.optimizer, config.optimizer),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "neftune_noise_alpha": config.neftune_noise_alpha,
        "bf16": dtype == "bfloat16" and mixes(config),
        "tf32": config.tf32 if gpu and isinstance(config.tf32, bool) else None,
        "use_cpu": not gpu,
        "gradient_checkpointing": checkpoints_activations(config),
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "torch_compile": config.torch_compile is True,
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_steps": config.logging_steps or 1,
        "logging_nan_inf_filter": False,  # a loss that is not finite is shown as what it is
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": evaluation,
        "save_strategy": save_strategy,
        "save_steps": save_steps,
        "metric_for_best_model": "eval_loss" if stops_early else None,
        "greater_is_better": False,
        "report_to": "none",  # the driver keeps the records
        "disable_tqdm": True,
        "ddp_bucket_cap_mb": config.ddp_bucket_cap_mb,
        "ddp_broadcast_buffers": config.ddp_broadcast_buffers,
        "ddp_find_unused_parameters": config.ddp_find_unused_parameters or False,
        **sharding_arguments(config, gpu),
        **_of_method(config),
    }


def _of_method(config: JobConfig) -> dict[str, Any]:
    beta = config.trl.beta  # rl_beta has been copied there
    if config.rl in ("dpo", "ipo"):
        losses = config.dpo_loss_type or "sigmoid"
        return {
            "beta": 0.1 if beta is None else beta,
            "loss_type": "ipo" if config.rl == "ipo" else losses,
            "label_smoothing": config.dpo_label_smoothing or 0.0,
        }
    if config.rl == "kto":
        return {
            "beta": 0.1 if beta is None else beta,
            "desirable_weight": config.kto_desirable_weight,
            "undesirable_weight": config.kto_undesirable_weight,
        }
    if config.rl == "orpo":
        weight = beta if beta is not None else config.orpo_alpha  # Axolotl's order
        return {"beta": 0.1 if weight is None else weight, "max_length": config.sequence_len}
    if config.rl == "reward_trainer":
        return {"center_rewards_coefficient": config.center_rewards_coefficient}
    return {}


def _interval(steps: float | None, per_epoch: int | None, steps_per_epoch: float) -> float | None:
    """transformers takes a number of steps, or a share of all steps below 1."""
    if steps is not None:
        return steps if steps < 1 else int(steps)
    return max(1, round(steps_per_epoch / per_epoch)) if per_epoch else None
