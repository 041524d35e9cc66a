"""Every key of a job file: Axolotl's names, types and defaults, and Eagleray's own section `ray:`.

A new key is a field of the section it belongs to, plus a line in `online_keys.py` and one in `dataset_keys.py` that
say what the two kinds of job do with it. Keys that Axolotl has and we have not are in `axolotl_keys.py`. Checks that
look at values live in `validate.py`. The classes are OmegaConf structured configs: plain dataclasses whose
annotations OmegaConf enforces. Where Axolotl states no default and its trainer falls back to TRL's or transformers'
one, that default stands here (TRL 1.16, transformers 5.19).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from orchestrator.source import Source

if TYPE_CHECKING:
    TextOrMapping = str | dict[str, Any] | None
else:
    TextOrMapping = Any  # OmegaConf has no union of text and mapping; validate.py checks these by hand


@dataclass
class DatasetConfig:
    """One entry of `datasets` or `test_datasets`."""

    path: str = MISSING  # a file, a folder, or a name on the hub
    type: TextOrMapping = None  # a prompt strategy, `module.fn`, or a mapping of field_* and format keys
    name: str | None = None  # configuration of a hub dataset
    split: str | None = None
    data_files: str | list[str] | None = None
    ds_type: str | None = None  # json, csv, parquet, arrow, text: what `path` is, where its name does not say
    revision: str | None = None
    trust_remote_code: bool = False
    field: str | None = None  # column of a completion dataset
    field_messages: str | None = None
    field_tools: str | None = None
    field_thinking: str | None = None
    field_system: str | None = None
    field_instruction: str | None = None
    field_input: str | None = None
    field_output: str | None = None
    field_prompt: str | None = None
    field_chosen: str | None = None
    field_rejected: str | None = None
    field_completion: str | None = None
    field_label: str | None = None
    message_property_mappings: dict[str, str] | None = None
    message_field_role: str | None = None
    message_field_content: str | None = None
    message_field_training: str | None = None
    message_field_training_detail: str | None = None
    roles: dict[str, list[str]] | None = None
    roles_to_train: list[str] | None = None
    train_on_eos: str | None = None  # all | turn | last
    train_on_eot: str | None = None  # all | turn | last
    drop_system_message: bool = False
    chat_template: str | None = None
    chat_template_jinja: str | None = None


@dataclass
class TrlConfig:
    """Section `trl:`, the online methods' knobs."""

    beta: float | None = None  # KL coefficient; wins over rl_beta. A loaded grpo job always has a number here
    use_vllm: bool = True  # Eagleray always samples with vLLM
    vllm_mode: str = (
        "server"  # server: engines have their own placement | colocate: they share the trainers' GPUs
    )
    vllm_enable_sleep_mode: bool = False
    vllm_lora_sync: bool = True  # what is trained travels to the engines, whatever this says
    vllm_sync_interval: int = 1  # optimizer steps between two policy versions on the engines
    num_generations: int = 8  # completions per prompt: the group size G
    max_completion_length: int = 256  # tokens
    reward_funcs: list[str] | None = None  # module.fn, the folder or hub name of a reward model, or judge.NAME
    reward_weights: list[float] | None = None  # one per reward function; none = all 1.0
    rollout_func: str | None = None  # module.fn that plays a completion of several turns; none = the model answers once
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all tokens
    min_p: float | None = None
    num_iterations: int = 1  # passes over each batch of rollouts
    epsilon: float = 0.2
    epsilon_high: float | None = None  # none = epsilon
    loss_type: str = "dapo"  # grpo | dr_grpo | dapo | bnpo | cispo
    scale_rewards: str = "group"  # group | batch | none; true and false are read as group and none
    multi_objective_aggregation: str = "sum_then_normalize"  # sum_then_normalize | normalize_then_sum (GDPO)
    importance_sampling_level: str = "token"  # token | sequence (GSPO)
    mask_truncated_completions: bool = False
    generation_kwargs: dict[str, Any] | None = None  # more fields of vLLM's SamplingParams
    chat_template_kwargs: dict[str, Any] | None = None
    log_completions: bool = False  # every step's completions, with their rewards, in output_dir/rollouts


@dataclass
class VllmConfig:
    """Section `vllm:`, the rollout engines."""

    tensor_parallel_size: int = 1  # GPUs per engine
    data_parallel_size: int = 1
    gpu_memory_utilization: float = 0.9  # share of a GPU's memory
    max_model_len: int | None = None  # tokens; none = sequence_len
    dtype: str = "auto"
    enable_prefix_caching: bool | None = None  # none = vLLM's own default
    enforce_eager: bool | None = None  # none = vLLM's own default


@dataclass
class SandboxConfig:
    """Section `ray.sandbox:`, limits of each program that a code reward runs."""

    time_s: float = 5.0  # seconds, of the clock and of each process
    memory_mib: int = 512  # of each process
    file_mib: int = 1  # of each file and of what it prints


@dataclass
class JudgeConfig:
    """One entry of `ray.judges`: a language model behind an OpenAI-compatible server. `judge.NAME` is its reward."""

    url: str = MISSING  # what comes before /chat/completions, e.g. http://127.0.0.1:8000/v1
    model: str = MISSING
    prompt: str = MISSING  # with {completion}, and {prompt} where the judge needs it
    api_key_env: str | None = None  # the name of an environment variable; none = no key
    max_tokens: int = 512  # of an answer; one that is cut is none
    temperature: float = 0.0
    timeout_s: float = 30.0  # seconds per answer; asked again until ray.reward_timeout_s is nearly over
    concurrency: int = 16  # questions under way at once
    scale: list[float] = field(default_factory=lambda: [0.0, 10.0])  # the last number of an answer is between these


@dataclass
class RayConfig:
    """Section `ray:`, the one that Axolotl does not have."""

    engines: int = 1  # vLLM actors
    trainer_cpus: int = 1  # CPUs per trainer rank
    engine_cpus: int = 1  # CPUs per engine
    engine_gpus: float | None = None  # GPUs per engine; none = tensor_parallel_size with GPUs, 0 without
    max_staleness: int = 0  # policy versions a rollout may lag behind; 0 = on-policy
    # of max_staleness: steps that a group which takes long may come after its own batch, others in its place; max_staleness
    # less this is how many batches are sampled ahead
    late_steps: int = 0
    # times a step that other prompts replace groups without signal; above 0 these count nowhere, at 0 in the loss's mean
    max_resamples: int = 0
    sync: str = "auto"  # auto | fused: merged into the weights | adapter: a LoRA slot of vLLM
    sync_bucket_mib: int = 1024  # MiB of a policy that are gathered and sent at once
    # seconds per call of a reward function, and between two turns of the model that trl.rollout_func asks for
    reward_timeout_s: float = 60.0
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    judges: dict[str, JudgeConfig] = field(default_factory=dict)  # by name
    rollout_timeout_s: float = 1800.0  # seconds per batch of rollouts
    importance_sampling_cap: float | None = (
        3.0  # of trainer / engine probability ratios; none = no correction
    )
    kv_cache_gib: int | None = None  # GiB of KV cache per engine; none = vLLM decides
    max_bad_rows: float = 0.01  # share of dataset rows that may be wrong, and left out, before the job stops
    placement: str = "pack"  # pack | spread


@dataclass
class JobConfig:
    """A whole job. `source` says where each key was written and is not itself a key."""

    source: Source = field(
        default_factory=Source, compare=False, repr=False, metadata={"omegaconf_ignore": True}
    )

    # Method
    rl: str | None = None  # none = SFT | dpo | ipo | simpo | kto | orpo | grpo | reward_trainer
    reward_model: bool = False  # true is the same as rl: reward_trainer

    # Model
    base_model: str = MISSING
    model_type: str | None = None
    tokenizer_type: str | None = None
    trust_remote_code: bool = False
    output_dir: str = "./model-out"
    hub_model_id: str | None = None
    special_tokens: dict[str, Any] | None = None
    tokens: list[str] | None = None
    eot_tokens: list[str] | None = None
    gptq: bool = False  # the base model is quantized with GPTQ
    unfrozen_parameters: list[str] | None = None  # patterns of parameter names; all others are frozen

    # Adapter
    adapter: str | None = None  # none = full fine-tuning | lora | qlora
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float = 0.0
    lora_target_linear: bool = False
    lora_target_modules: str | list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    lora_model_dir: str | None = None
    lora_fan_in_fan_out: bool = False
    peft_use_dora: bool = False
    peft_use_rslora: bool = False
    bnb_config_kwargs: dict[str, Any] | None = None

    # Data
    datasets: list[DatasetConfig] | None = None
    test_datasets: list[DatasetConfig] | None = None
    pretraining_dataset: Any = None
    val_set_size: float = 0.0  # a share below 1, or a number of rows
    sequence_len: int = 512  # tokens; for grpo, prompt and completion together
    sample_packing: bool = False
    eval_sample_packing: bool | None = None
    excess_length_strategy: str = "drop"  # of rows with more than sequence_len tokens | truncate | raise
    pad_to_sequence_len: bool | None = None
    dataset_prepared_path: str | None = None
    chat_template: str | None = None
    chat_template_jinja: str | None = None
    train_on_inputs: bool = False
    streaming: bool = False
    shuffle_merged_datasets: bool = True

    # Training
    micro_batch_size: int = 1  # rows (grpo: completions) per rank and forward pass
    gradient_accumulation_steps: int = 1
    eval_batch_size: int | None = None
    num_epochs: float = 1.0
    max_steps: int | None = None  # wins over num_epochs
    learning_rate: float = MISSING
    lr_groups: list[Any] | None = None
    optimizer: str = "adamw_torch_fused"
    lr_scheduler: str = "cosine"
    cosine_min_lr_ratio: float | None = None
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    bf16: bool | str = "auto"  # true | false | auto | full
    fp16: bool = False
    tf32: bool | str | None = None
    neftune_noise_alpha: float | None = None  # noise on the embeddings while they are trained (NEFTune)
    gradient_checkpointing: bool | str = False  # true | false | offload | offload_disk
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    activation_offloading: bool | str = False
    seed: int = 42
    attn_implementation: str | None = None
    flash_attention: bool = False  # true is the same as attn_implementation: flash_attention_2
    sdp_attention: bool = False  # true is the same as attn_implementation: sdpa
    torch_compile: bool | str = False
    plugins: list[str] | None = None
    liger_rope: bool = False
    liger_rms_norm: bool = False
    liger_layer_norm: bool = False
    liger_swiglu: bool = False
    liger_glu_activation: bool = False
    liger_cross_entropy: bool = False
    liger_fused_linear_cross_entropy: bool = False
    liger_use_token_scaling: bool = False
    cut_cross_entropy: bool = False

    # Run
    save_steps: int | float | None = None  # a number of steps, or a share of all steps below 1
    saves_per_epoch: int | None = None
    save_strategy: str | None = None  # steps | epoch | best | no
    save_total_limit: int | None = None
    save_only_model: bool = False
    eval_steps: int | float | None = None  # as save_steps
    evals_per_epoch: int | None = None
    logging_steps: int | None = None
    resume_from_checkpoint: str | None = None
    auto_resume_from_checkpoints: bool = False
    early_stopping_patience: int | None = None
    loss_watchdog_threshold: float | None = None
    loss_watchdog_patience: int | None = None
    use_tensorboard: bool = False
    use_wandb: bool = False
    wandb_project: str | None = None
    wandb_entity: str | None = None
    wandb_name: str | None = None
    wandb_run_id: str | None = None
    wandb_mode: str | None = None
    wandb_watch: str | None = None
    wandb_log_model: str | None = None
    strict: bool = False

    # Parallel
    deepspeed: TextOrMapping = None  # the path of a DeepSpeed JSON file, or its content
    fsdp_version: int | None = None
    fsdp_config: dict[str, Any] | None = None
    tensor_parallel_size: int = 1
    context_parallel_size: int = 1
    dp_shard_size: int | None = None
    dp_replicate_size: int | None = None
    ddp_timeout: int | None = None  # seconds
    ddp_bucket_cap_mb: int | None = None
    ddp_broadcast_buffers: bool | None = None
    ddp_find_unused_parameters: bool | None = None
    use_ray: bool = True
    ray_num_workers: int | list[int] = 1  # trainer ranks, or [min, max]
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"GPU": 1.0})
    ray_run_name: str | None = None

    # Preference and reward
    rl_beta: float | None = None
    dpo_loss_type: str | list[str] | None = None
    dpo_label_smoothing: float | None = None
    orpo_alpha: float | None = None
    kto_desirable_weight: float = 1.0
    kto_undesirable_weight: float = 1.0
    center_rewards_coefficient: float | None = None

    # Sections
    trl: TrlConfig = field(default_factory=TrlConfig)
    vllm: VllmConfig = field(default_factory=VllmConfig)
    ray: RayConfig = field(default_factory=RayConfig)
