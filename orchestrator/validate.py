"""What a configuration may not say: relations between keys that contradict each other.

One generator per theme, each a list of rules that yield a Problem. Independent of the cluster and of what
this version can run (that is `runnable.py`); what one key alone may be stands in `values.py`.
"""

import math
from collections.abc import Iterator

from orchestrator import conversations, judges
from orchestrator.schema import DatasetConfig, JobConfig
from orchestrator.source import Problem
from orchestrator.values import out_of_range, value_of

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the slots that vLLM 0.32 can make
CODE = "actors.verifiers.passes_tests"
BEYOND_ALL_LINEAR = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")  # what PEFT's all-linear leaves out
EOS_CHOICES = ("all", "turn", "last")


def contradictions(config: JobConfig) -> Iterator[Problem]:
    """Everything in `config` that cannot mean a job, one problem per finding."""
    single = list(out_of_range(config))
    yield from single
    yield from _model(config)
    yield from _data(config)
    yield from _schedule(config)
    yield from _workers(config)
    if config.rl == "kto":
        for key in ("micro_batch_size", "eval_batch_size"):
            if value_of(config, key) == 1:
                text = "is 1; kto compares each answer with those of the other rows of its batch, so use 2 or more"
                yield Problem(key, text)
    if config.rl == "grpo" and not single:  # the relations below do arithmetic on the values
        yield from _grpo(config)


def _model(config: JobConfig) -> Iterator[Problem]:
    if config.reward_model and config.rl not in (None, "reward_trainer"):
        yield Problem(
            "reward_model", f"true means rl: reward_trainer, but rl is {config.rl}; remove one of the two"
        )
    if config.load_in_4bit and config.load_in_8bit:
        yield Problem("load_in_8bit", "load_in_4bit and load_in_8bit are both true; keep one")
    if config.adapter == "qlora" and not config.load_in_4bit:
        yield Problem("adapter", "qlora needs load_in_4bit: true; add it, or use adapter: lora")
    if config.adapter == "qlora" and config.load_in_8bit:
        yield Problem("load_in_8bit", "qlora is a 4-bit adapter; remove load_in_8bit, or use adapter: lora")
    if config.adapter is None and (config.load_in_4bit or config.load_in_8bit):
        key = "load_in_4bit" if config.load_in_4bit else "load_in_8bit"
        yield Problem(
            key, "a quantized model cannot be trained in full; add adapter: qlora or lora, or remove it"
        )
    if config.adapter is None and config.lora_model_dir is not None:
        yield Problem("lora_model_dir", "names an adapter to start from, but adapter is not set; add adapter: lora")
    if config.adapter is not None and config.lora_model_dir is None:  # else that adapter says what it is
        if config.lora_r is None:
            yield Problem("lora_r", f"adapter: {config.adapter} needs a rank; add for example lora_r: 16")
        if config.lora_alpha is None:
            yield Problem(
                "lora_alpha", f"adapter: {config.adapter} needs a scale; add for example lora_alpha: 32"
            )
        if not (config.lora_target_linear or config.lora_target_modules):
            yield Problem(
                "lora_target_modules",
                f"adapter: {config.adapter} needs layers; add lora_target_linear: true",
            )
    named = config.lora_target_modules if isinstance(config.lora_target_modules, list) else []
    if config.lora_target_linear and (outside := [name for name in named if name in BEYOND_ALL_LINEAR]):
        text = f"{', '.join(outside)} is not among the layers that lora_target_linear: true means; name all that you want"
        yield Problem("lora_target_modules", f"{text}, without it, or train {outside[0]} whole with lora_modules_to_save")
    if config.fp16 and config.bf16 in (True, "full"):
        yield Problem("fp16", "fp16 and bf16 are both on; keep one")
    if config.flash_attention and config.sdp_attention:
        yield Problem("flash_attention", "flash_attention and sdp_attention are both true; keep one")
    for flag, name in (("flash_attention", "flash_attention_2"), ("sdp_attention", "sdpa")):
        if value_of(config, flag) and config.attn_implementation not in (None, name):
            text = (
                f"means attn_implementation: {name}, but that is {config.attn_implementation}; remove {flag}"
            )
            yield Problem(flag, text)


def _data(config: JobConfig) -> Iterator[Problem]:
    if not config.datasets and config.pretraining_dataset is None:
        yield Problem("datasets", "names no data; add a list with at least `- path: ...`")
    for name, entries in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for index, entry in enumerate(entries or []):
            yield from _dataset(f"{name}[{index}]", entry)
    if config.test_datasets and config.val_set_size:
        yield Problem("val_set_size", "and test_datasets both name the evaluation rows; keep one")
    for key in ("eval_steps", "early_stopping_patience"):
        if value_of(config, key) is not None and not (config.test_datasets or config.val_set_size):
            yield Problem(
                key, "there are no rows to evaluate on; add test_datasets or val_set_size, or remove it"
            )
    if config.excess_length_strategy == "truncate" and config.rl not in (None, "grpo"):
        yield Problem("excess_length_strategy", f"rows of rl: {config.rl} are not cut; use drop or raise")
    if config.chat_template == "jinja" and not config.chat_template_jinja:
        yield Problem("chat_template", "jinja needs the template; add chat_template_jinja")
    for key in ("streaming", "pretraining_dataset"):
        if value_of(config, key) and config.max_steps is None:
            yield Problem(key, "streamed rows have no end; add max_steps")
    if config.streaming:
        if config.val_set_size:
            yield Problem("val_set_size", "rows cannot be drawn from a stream; name held-out rows in test_datasets")
        for key in ("saves_per_epoch", "evals_per_epoch"):
            if value_of(config, key) is not None:
                yield Problem(key, f"a stream has no epochs; use {key.partition('s_')[0]}_steps")
        if config.save_strategy == "epoch":
            yield Problem("save_strategy", "a stream has no epochs; use save_steps")


def _dataset(key: str, entry: DatasetConfig) -> Iterator[Problem]:
    if not entry.path:
        yield Problem(f"{key}.path", "is empty; give a file, a folder or a name on the hub")
    if not isinstance(entry.type, str | dict | None):
        yield Problem(f"{key}.type", f"takes text or a mapping, not {entry.type!r}; correct the value")
    for name in ("train_on_eos", "train_on_eot"):
        value = getattr(entry, name)
        if value not in (None, *EOS_CHOICES):
            yield Problem(
                f"{key}.{name}", f"'{value}' is not one of {', '.join(EOS_CHOICES)}; choose one of them"
            )


def _schedule(config: JobConfig) -> Iterator[Problem]:
    for one, other in (
        ("warmup_steps", "warmup_ratio"),
        ("save_steps", "saves_per_epoch"),
        ("eval_steps", "evals_per_epoch"),
    ):
        if value_of(config, one) is not None and value_of(config, other) is not None:
            yield Problem(other, f"{one} and {other} are both set; keep one")
    if config.cosine_min_lr_ratio is not None and config.lr_scheduler not in ("cosine", "cosine_with_min_lr"):
        yield Problem("cosine_min_lr_ratio", f"lr_scheduler: {config.lr_scheduler} has no such floor; remove one of the two")
    if config.rl != "grpo" and config.lr_scheduler == "cosine_with_min_lr" and config.cosine_min_lr_ratio is None:
        yield Problem("lr_scheduler", "cosine_with_min_lr needs its floor; add for example cosine_min_lr_ratio: 0.1")
    if config.early_stopping_patience is not None and config.save_strategy == "no":
        yield Problem("save_strategy", "early_stopping_patience goes back to the best checkpoint, so there must be some")
    if config.saves_per_epoch is not None and config.save_strategy not in (None, "steps"):
        yield Problem(
            "save_strategy", f"{config.save_strategy} contradicts saves_per_epoch; remove one of the two"
        )
    if config.save_steps is not None and config.save_strategy not in (None, "steps"):
        yield Problem(
            "save_strategy", f"{config.save_strategy} contradicts save_steps; remove one of the two"
        )


def _workers(config: JobConfig) -> Iterator[Problem]:
    if not isinstance(config.deepspeed, str | dict | None):
        yield Problem("deepspeed", f"takes a path or a mapping, not {config.deepspeed!r}; correct the value")
    if config.deepspeed and (config.fsdp_config or config.fsdp_version):
        yield Problem("deepspeed", "deepspeed and fsdp are both set; keep one")
    workers = config.ray_num_workers
    if isinstance(workers, list) and not (len(workers) == 2 and 1 <= workers[0] <= workers[1]):
        yield Problem("ray_num_workers", f"is {workers}; a range is [min, max] with 1 <= min <= max")
    if isinstance(workers, int) and workers < 1:
        yield Problem("ray_num_workers", f"is {workers}; it must be 1 or more")
    elif isinstance(workers, list) and config.rl != "grpo":
        step = config.gradient_accumulation_steps * workers[1]
        if uneven := [count for count in range(workers[0], workers[1] + 1) if step % count]:
            text = f"{uneven[0]} workers cannot share the {step} micro batches of a step ({workers[1]} workers x "
            text += f"gradient_accumulation_steps {config.gradient_accumulation_steps}) evenly"
            all_counts = math.lcm(*range(workers[0], workers[1] + 1))
            multiple = all_counts // math.gcd(workers[1], all_counts)
            yield Problem("ray_num_workers", f"{text}; use a gradient_accumulation_steps that {multiple} divides")
        if config.streaming:
            yield Problem("ray_num_workers", "a stream cannot be dealt anew while it runs; give one number")
        if config.deepspeed or config.fsdp_version or config.fsdp_config:
            yield Problem("ray_num_workers", "a model in shards belongs to one number of workers; give that")
    for name, amount in config.resources_per_worker.items():
        if amount < 0:
            yield Problem(f"resources_per_worker.{name}", f"is {amount:g}; it must be 0 or more")


def _grpo(config: JobConfig) -> Iterator[Problem]:
    trl = config.trl
    if not trl.reward_funcs:
        yield Problem(
            "trl.reward_funcs", "rl: grpo needs rewards; name functions as module.fn, e.g. [rewards.exact], or reward models"
        )
    elif trl.reward_weights is not None and len(trl.reward_weights) != len(trl.reward_funcs):
        counts = f"{len(trl.reward_weights)} weights for {len(trl.reward_funcs)} reward_funcs"
        yield Problem("trl.reward_weights", f"{counts}; give one weight per function, in the same order")
    if config.adapter is None:
        yield from _all_weights(config)
    yield from judges.problems(config)
    yield from conversations.problems(config)
    if CODE in (trl.reward_funcs or []) and config.ray.sandbox.time_s >= config.ray.reward_timeout_s:
        text = f"is {config.ray.sandbox.time_s:g}, no less than ray.reward_timeout_s, in which a group's programs all run"
        yield Problem("ray.sandbox.time_s", f"{text}; lower it, or raise ray.reward_timeout_s")
    if trl.max_completion_length >= config.sequence_len:
        text = (
            f"{trl.max_completion_length} leaves no room for the prompt in sequence_len {config.sequence_len}"
        )
        yield Problem("trl.max_completion_length", f"{text}; lower it, or raise sequence_len")
    if config.vllm.max_model_len is not None and config.vllm.max_model_len < config.sequence_len:
        text = (
            f"{config.vllm.max_model_len} is below sequence_len: {config.sequence_len}, prompt and completion"
        )
        yield Problem("vllm.max_model_len", f"{text} together; raise it, or remove it")
    if config.vllm.dtype != "auto" and config.bf16 != "auto" and (config.vllm.dtype == "bfloat16") != bool(config.bf16):
        text = f"{config.vllm.dtype} contradicts bf16: {str(config.bf16).lower()}; trainer and engine share a dtype"
        yield Problem("vllm.dtype", f"{text}, so remove one of the two")
    if trl.loss_type == "cispo" and trl.epsilon_high is None:
        text = f"cispo caps ratios at epsilon_high itself, which epsilon would set to {trl.epsilon:g}"
        yield Problem("trl.epsilon_high", f"{text}; add for example trl.epsilon_high: 5.0")
    if config.ray.sync == "adapter" and config.lora_r is not None and config.lora_r not in LORA_RANKS:
        ranks = ", ".join(map(str, LORA_RANKS))
        yield Problem(
            "lora_r", f"ray.sync: adapter needs a rank that vLLM has ({ranks}); use one, or ray.sync: fused"
        )
    if config.peft_use_dora:
        yield Problem(
            "peft_use_dora", "vLLM cannot sample from a DoRA adapter; remove it, or use peft_use_rslora"
        )
    if config.ray.sync == "adapter" and (config.load_in_4bit or config.load_in_8bit):
        text = "a slot adds to the engines' own base, which must be rounded as the trainer's quantized one; use fused"
        yield Problem("ray.sync", text)
    yield from _engines(config)
    yield from _late(config)
    yield from _whole_groups(config)


def _all_weights(config: JobConfig) -> Iterator[Problem]:
    """What speaks of an adapter where there is none: a forgotten `adapter: lora` would train all weights."""
    for key in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_linear", "lora_target_modules", "peft_use_rslora"):
        if value_of(config, key):
            yield Problem(key, "is set, but adapter is not, so all weights would be trained; add adapter: lora, or remove it")
    if config.ray.sync != "auto":
        text = f"is {config.ray.sync}, a way for adapters, but all weights are trained; remove it, or add adapter: lora"
        yield Problem("ray.sync", text)


def _engines(config: JobConfig) -> Iterator[Problem]:
    """Where they compute, and with whom they share it."""
    parallel, share = config.vllm.tensor_parallel_size, config.ray.engine_gpus
    if share is not None and parallel > 1 and share != parallel:
        yield Problem("ray.engine_gpus", f"is {share:g}, but vllm.tensor_parallel_size is {parallel}; remove it")
    if config.trl.vllm_mode != "colocate":
        return
    if parallel > 1:
        text = "an engine on the GPU of one trainer rank has that GPU alone; use vllm_mode: server"
        yield Problem("vllm.tensor_parallel_size", text)
    if share is not None:
        yield Problem("ray.engine_gpus", "with vllm_mode: colocate an engine shares the GPU of a trainer rank; remove it")
    if config.ray.engines not in (1, config.ray_num_workers):
        text = f"is {config.ray.engines}; with vllm_mode: colocate each of {config.ray_num_workers} ranks has one; remove it"
        yield Problem("ray.engines", text)
    if config.trl.vllm_enable_sleep_mode and config.ray.max_staleness > 0:
        text = "engines that sleep while the trainer computes cannot sample ahead; use 0, or remove vllm_enable_sleep_mode"
        yield Problem("ray.max_staleness", text)


def _late(config: JobConfig) -> Iterator[Problem]:
    """Groups can come late where others are there in their place."""
    late, staleness = config.ray.late_steps, config.ray.max_staleness
    if late and late >= staleness:
        text = f"is {late}, but ray.max_staleness is {staleness}: no batch is sampled ahead then; use at most {staleness - 1}"
        yield Problem("ray.late_steps", text if staleness > 1 else f"needs ray.max_staleness {late + 1} or more")
    engines = config.ray_num_workers if config.trl.vllm_mode == "colocate" else config.ray.engines
    if late and engines == 1:
        text = "needs two engines or more: one that still samples takes no new policy, so its next batch waits; see ray.engines"
        yield Problem("ray.late_steps", text)


def _whole_groups(config: JobConfig) -> Iterator[Problem]:
    """Each step holds whole groups, where a step is micro batch x accumulation x ranks completions."""
    workers, group = config.ray_num_workers, config.trl.num_generations
    for ranks in range(workers[0], workers[-1] + 1) if isinstance(workers, list) and workers else [workers]:
        assert isinstance(ranks, int)
        per_accumulation = config.micro_batch_size * ranks
        total = per_accumulation * config.gradient_accumulation_steps
        if total % group == 0:
            continue
        step = group // math.gcd(group, per_accumulation)
        below = config.gradient_accumulation_steps // step * step
        accumulations = [str(n) for n in (below, below + step) if n > 0]
        divisors = [n for n in range(2, total + 1) if total % n == 0]
        groups = [
            str(n) for n in (max((d for d in divisors if d < group), default=0), _above(divisors, group)) if n
        ]
        remedy = f"use gradient_accumulation_steps {' or '.join(accumulations)}"
        if groups:
            remedy += f", or num_generations {' or '.join(groups)}"
        sizes = f"micro_batch_size {config.micro_batch_size} x gradient_accumulation_steps "
        sizes += (
            f"{config.gradient_accumulation_steps} x ray_num_workers {ranks} = {total} completions per step"
        )
        yield Problem(
            "trl.num_generations", f"{sizes}, which is not a multiple of num_generations {group}; {remedy}"
        )
        return


def _above(divisors: list[int], group: int) -> int:
    return min((d for d in divisors if d > group), default=0)
