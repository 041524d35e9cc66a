"""The plan of an online job for a person, a line each; dataset_plan.py has the same for dataset jobs."""

from orchestrator import judges, sharding
from orchestrator.plan import Plan, amount, engines, ranks
from orchestrator.schema import JobConfig


def describe(config: JobConfig, plan: Plan) -> list[str]:
    """The plan for a person, a line each."""
    trl = config.trl
    held = [
        f"{bundle}: {amount(bundle.resources)} on {plan.nodes[node].name if node is not None else 'no node'}"
        for bundle, node in zip(plan.bundles, plan.placement, strict=True)
    ]
    rewards = [_described_reward(config, plan, name) for name in trl.reward_funcs or []]
    unused = plan.gpu and config.ray.kv_cache_gib is not None
    return [
        f"model       {config.base_model}, {plan.dtype}",
        *adapter_lines(config, plan.dtype),
        f"cluster     {len(plan.nodes)} node(s): " + "; ".join(f"{n.name} {amount(n.resources)}" for n in plan.nodes),
        f"placement   one placement group, {plan.strategy}",
        *(f"            {line}" for line in [*held, *rewards]),
        f"batch       {config.micro_batch_size} micro_batch_size x {config.gradient_accumulation_steps} "
        f"gradient_accumulation_steps x {ranks(config)} ray_num_workers = {plan.completions_per_step} completions a step",
        f"            = {plan.prompts_per_step} prompts x {trl.num_generations} num_generations, dealt by load to "
        f"{engines(config)} {'shared ' if plan.shared else ''}engine(s), {plan.prompts_per_engine} each if they are equal",
        *([f"rollouts    {trl.rollout_func} plays them, in the engines' processes"] if trl.rollout_func else []),
        f"tokens      sequence_len {config.sequence_len}, completions up to {trl.max_completion_length}, "
        f"at most {plan.completions_per_step * trl.max_completion_length} completion tokens a step",
        f"steps       {plan.total_steps} ({plan.rows} prompts, {plan.steps_per_epoch:.1f} steps an epoch), "
        f"checkpoint every {plan.save_steps}",
        f"sharding    {sharding.described(config)}",
        *([f"colocate    {_colocation(plan)}"] if plan.colocate else []),
        f"sync        {plan.sync}, max_staleness {config.ray.max_staleness}"
        + (f", of which a group may be late by {config.ray.late_steps}" if config.ray.late_steps else ""),
        *(["kv cache    vllm.gpu_memory_utilization decides; ray.kv_cache_gib is for engines on CPUs"] if unused else []),
        f"loss        {trl.loss_type}, beta {trl.beta}, importance sampling cap {config.ray.importance_sampling_cap}",
    ]


def _colocation(plan: Plan) -> str:
    if not plan.gpu:
        return "trainer and engine share their CPUs"
    turns = "engines sleep while the trainer computes" if plan.sleeps else "engines keep their memory while it computes"
    return f"trainer and engine share a GPU; {turns}"


def _described_reward(config: JobConfig, plan: Plan, name: str) -> str:
    if judge := judges.judge_of(config, name):
        return f"reward {name}: asks {judge.model} at {judge.url} from its own process, no reserved CPU"
    if name not in plan.reward_models:
        return f"reward {name}: its own process, no reserved CPU"
    if plan.reward_bundle(name) is not None:
        return f"reward model {name}: in reward {plan.reward_models.index(name)}"
    threads = f"up to {plan.reward_threads} thread(s), " if plan.reward_threads else ""
    return f"reward model {name}: its own process, {threads}no reserved CPU"


def adapter_lines(config: JobConfig, dtype: str) -> list[str]:
    """Of a plan: what is trained, and what is lost of it. dtype: of the weights."""
    line = f"adapter     {described_adapter(config, dtype)}"
    if sharding.keeps_small_updates(config, dtype):
        return [line]
    others = "does deepspeed" if config.rl == "grpo" else "do deepspeed and fsdp_version: 2"
    return [line, f"            small updates vanish in bfloat16; bf16: false keeps them, and so {others}"]


def described_adapter(config: JobConfig, dtype: str) -> str:
    """The adapter's kind and size for a person, what it stands on, and where it starts. dtype: of the weights."""
    if config.adapter is None:
        return f"none: full fine-tuning of {dtype} weights"
    kind = "QLoRA" if config.adapter == "qlora" else "LoRA"
    base = ", on a base in NF4" if config.load_in_4bit else ", on a base in int8" if config.load_in_8bit else ""
    start = f", from {config.lora_model_dir}" if config.lora_model_dir else ""
    return f"{kind} r={config.lora_r} alpha={config.lora_alpha}{base}{start}"
