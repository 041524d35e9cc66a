"""What the actors of an online job are built from: configuration and plan to specs."""

from actors.specs import EngineSpec, LossSpec, ModelSpec, OptimizerSpec, TrainerSpec
from orchestrator import sharding
from orchestrator.conversations import rollout_function_spec
from orchestrator.jobs import quantization, template_arguments, trained_lora
from orchestrator.plan import Plan
from orchestrator.schema import JobConfig


def model_spec(config: JobConfig, plan: Plan) -> ModelSpec:
    return ModelSpec(
        config.base_model,
        plan.dtype,
        config.trust_remote_code,
        quantization=quantization(config),
        sharded=sharding.kind(config) == "fsdp",
        chat_template=template_arguments(config).get("chat_template"),
    )


def trainer_spec(config: JobConfig, plan: Plan) -> TrainerSpec:
    trl = config.trl
    return TrainerSpec(
        model=model_spec(config, plan),
        lora=trained_lora(config),
        optimizer=OptimizerSpec(
            learning_rate=config.learning_rate,
            scheduler=config.lr_scheduler,
            warmup_steps=plan.warmup_steps * trl.num_iterations,
            total_steps=plan.total_steps * trl.num_iterations,
            weight_decay=config.weight_decay,
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            epsilon=config.adam_epsilon,
            max_grad_norm=config.max_grad_norm,
            fused=config.optimizer == "adamw_torch_fused",
        ),
        loss=LossSpec(
            loss_type=trl.loss_type,
            epsilon_low=trl.epsilon,
            epsilon_high=trl.epsilon if trl.epsilon_high is None else trl.epsilon_high,
            beta=trl.beta or 0.0,
            importance_sampling_level=trl.importance_sampling_level,
            importance_sampling_cap=config.ray.importance_sampling_cap,
            max_completion_length=trl.max_completion_length,
        ),
        micro_batch_size=config.micro_batch_size,
        temperature=trl.temperature,
        num_iterations=trl.num_iterations,
        mask_truncated_completions=trl.mask_truncated_completions,
        gradient_checkpointing=sharding.checkpoints_activations(config),
        shares_gpu=plan.colocate,
        sharding=sharding.sharding_arguments(config, plan.gpu),
        bucket_bytes=config.ray.sync_bucket_mib * 2**20,
        seed=config.seed,
        threads=plan.trainer_threads,
    )


def engine_spec(config: JobConfig, plan: Plan) -> EngineSpec:
    vllm = config.vllm
    return EngineSpec(
        model=model_spec(config, plan),
        lora=trained_lora(config),
        sync=plan.sync,
        tensor_parallel=plan.tensor_parallel,
        sleeps=plan.sleeps,
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        gpu_memory_utilization=plan.gpu_memory_utilization,
        enforce_eager=bool(vllm.enforce_eager),
        enable_prefix_caching=vllm.enable_prefix_caching is not False,
        chat_template_kwargs=template_arguments(config),
        rollout_function=rollout_function_spec(config),
        seed=config.seed,
    )
