"""What an actor is built from: frozen, picklable, with no reference to the configuration they came from.

A new actor gets a spec here. Paths are absolute: workers start in other folders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.errors import ConfigError

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
WITH_REFERENCE = ("dpo", "ipo", "kto")  # methods whose losses compare with the policy at the start of training
OWN = "own"  # the name of the policy on an engine that is one job's


@dataclass(frozen=True)
class ModelSpec:
    """The base model, as every actor loads it."""

    name: str  # a hub name or a folder
    dtype: str  # bfloat16 | float32
    trust_remote_code: bool = False
    attn_implementation: str | None = None  # of dataset jobs, by transformers' name; None = its default
    quantization: str | None = None  # nf4 | int8: bitsandbytes, of the frozen base; None = none
    sharded: bool = False  # by FSDP2
    special_tokens: tuple[tuple[str, str], ...] = ()  # eos_token and the like, where they are not the tokenizer's own
    chat_template: str | None = None  # None = the tokenizer's own


@dataclass(frozen=True)
class LoraSpec:
    """The adapter, in PEFT's terms."""

    r: int
    alpha: int
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    start: str | None = None  # the folder of the adapter that training starts from; None = a new one


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW and its schedule, in optimizer steps."""

    learning_rate: float
    scheduler: str  # a name of transformers.get_scheduler
    warmup_steps: int
    total_steps: int
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0 = no clipping
    fused: bool = True


@dataclass(frozen=True)
class LossSpec:
    """What to minimize; the names are those of the `trl:` section where it has them.

    Raises ConfigError for an unknown loss type or level, and for a cap that would silence every token.
    """

    loss_type: str = "dapo"  # one of LOSS_TYPES
    epsilon_low: float = 0.2  # ratios are clipped at 1 - epsilon_low; unused by cispo
    epsilon_high: float = 0.2  # ratios are clipped at 1 + epsilon_high; for cispo, at epsilon_high itself
    beta: float = 0.0  # weight of the KL to the reference policy; 0 = no reference needed
    importance_sampling_level: str = "token"  # token, or sequence (GSPO)
    importance_sampling_cap: float | None = 3.0  # bound of the weight pi_old / pi_engine; None = no weight
    max_completion_length: int = 256  # tokens; the constant that dr_grpo divides by

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ConfigError(f"unknown loss_type {self.loss_type!r}; use one of {', '.join(LOSS_TYPES)}")
        if self.importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
            raise ConfigError(
                f"unknown importance_sampling_level {self.importance_sampling_level!r}; "
                f"use one of {', '.join(IMPORTANCE_SAMPLING_LEVELS)}"
            )
        if self.importance_sampling_cap is not None and self.importance_sampling_cap <= 0:
            raise ConfigError(
                f"importance_sampling_cap is {self.importance_sampling_cap}; use a number above 0, or null for no correction"
            )


@dataclass(frozen=True)
class TrainerSpec:
    """The trainer of an online job."""

    model: ModelSpec
    lora: LoraSpec | None  # None = all weights are trained
    optimizer: OptimizerSpec
    loss: LossSpec
    micro_batch_size: int  # completions per forward pass
    temperature: float  # of sampling: log-probabilities are taken at it
    num_iterations: int = 1  # optimizer steps on one batch
    mask_truncated_completions: bool = False
    gradient_checkpointing: bool = False
    shares_gpu: bool = False  # whether an engine computes on the same GPU in turn
    sharding: Mapping[str, Any] = field(default_factory=dict)  # of transformers' TrainingArguments; {} = no shards
    bucket_bytes: int = 2**30  # of a snapshot: what is gathered and copied at once
    seed: int = 42
    threads: int | None = None  # CPU threads; None = torch's default


@dataclass(frozen=True)
class RankSpec:
    """One rank of a trainer's group."""

    rank: int = 0
    world: int = 1  # ranks
    address: str = ""  # host:port at rank 0, where ranks meet; unused by a rank alone that shards nothing


@dataclass(frozen=True)
class SamplingSpec:
    """How completions are drawn."""

    num_generations: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    extra: Mapping[str, object] = field(default_factory=dict)  # generation_kwargs, names of vLLM's SamplingParams


@dataclass(frozen=True)
class RolloutFunctionSpec:
    """What plays a completion of several turns."""

    path: str  # module.function
    search_paths: tuple[str, ...]  # folders put first on the import path
    timeout_s: float  # that it may take between two of the model's turns


@dataclass(frozen=True)
class EngineSpec:
    """One vLLM engine."""

    model: ModelSpec
    lora: LoraSpec | None  # None = a policy is all weights
    sync: str  # fused | adapter; weights without LoRA
    max_model_len: int  # tokens of prompt and completion; -1 = as many as the model and the memory allow
    max_num_seqs: int  # completions decoded side by side
    tokenizer: str | None = None  # its folder; None = the model's own
    tensor_parallel: int = 1  # GPUs that hold the model together
    sleeps: bool = False  # whether the engine leaves its GPU to a trainer in turn
    policies: int = 1  # jobs that it serves at once; above 1 only where sync is adapter
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    rollout_function: RolloutFunctionSpec | None = None  # None = a completion is what the model answers once
    seed: int = 42


@dataclass(frozen=True)
class ServedEngineSpec:
    """An engine of `eagleray serve`: what it loads on the node where it is."""

    model: ModelSpec
    adapter: str | None = None  # the folder of the one that is merged into its weights; None = none is
    scaling: float = 0.0  # of its B A


@dataclass(frozen=True)
class ServedModelSpec:
    """A model of `eagleray serve`, and how its requests are written."""

    name: str  # in requests
    engine: str  # the name of the engine that has it
    chat_template: str | None = None  # None = the base model's
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    stop_token_ids: tuple[int, ...] = ()  # tokens that end an answer, besides the tokenizer's own


@dataclass(frozen=True)
class SandboxSpec:
    """Limits of a program that a code reward runs."""

    time_s: float = 5.0  # wall clock, and CPU time of each process
    memory_mib: int = 512  # of each process
    file_mib: int = 1  # each file, and what it prints; where there are namespaces, all files together


@dataclass(frozen=True)
class RewardSpec:
    """One reward function."""

    path: str  # module.function
    search_paths: tuple[str, ...]  # folders put first on the import path
    sandbox: SandboxSpec = SandboxSpec()  # for a function that takes `sandbox_limits`


@dataclass(frozen=True)
class RewardModelSpec:
    """One reward model."""

    path: str  # as the configuration names it
    model: ModelSpec
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)
    threads: int | None = None  # CPU threads; None = torch's default


@dataclass(frozen=True)
class JudgeSpec:
    """One judge. Its key is not here: it travels by itself."""

    path: str  # judge.NAME
    name: str
    url: str
    model: str
    prompt: str  # with {completion} and {prompt}
    api_key_env: str | None  # the name of the variable, for messages
    max_tokens: int  # of an answer
    temperature: float
    timeout_s: float  # for one answer
    limit_s: float  # for all tries of one question
    concurrency: int  # questions under way at once
    scale: tuple[float, float]  # numbers that are rewards 0 and 1


@dataclass(frozen=True)
class DatasetTrainSpec:
    """The workers of a dataset job."""

    method: str  # a name of actors.methods.METHODS
    model: ModelSpec
    lora: LoraSpec | None  # None = full fine-tuning
    train_files: tuple[str, ...]  # Arrow files of prepared rows, in order
    held_out_files: tuple[str, ...]
    packed: bool  # rows hold several documents each
    output_dir: str
    rows_per_step: int  # of all workers, however many there are
    job: Mapping[str, object]  # what a resumed job must have as it was; part of each checkpoint
    arguments: Mapping[str, Any]  # of the method's TRL configuration, beside what the method itself sets
    early_stopping_patience: int | None = None  # evaluations without a better held-out loss
    loss_watchdog: tuple[float, int] | None = None  # the loss that is too high, and at how many records in a row
    save_total_limit: int | None = None  # checkpoints that are kept
    resume_from: str | None = None  # a checkpoint
    threads: int | None = None  # CPU threads of a worker
    streamed: bool = False  # rows to train on come from Ray Train's dataset, and not from files
