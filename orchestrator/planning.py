"""A job on a cluster that may exist: its plan, whether it fits, and the nearest changes that would make it fit.

`read` reads what a plan needs to know; `planned` is a pure function of it, a configuration and nodes, and so a change of the
configuration is tried by planning it.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from statistics import mean
from typing import Any

from actors import device, model
from actors.chat import prompt_token_ids
from actors.errors import ConfigError
from actors.specs import ModelSpec
from orchestrator import dataset_plan, description, prepare, sharding, tensor_parallel
from orchestrator.conversations import ensure_playable
from orchestrator.data import PromptSet, load_prompts
from orchestrator.dataset_plan import DatasetPlan, make_dataset_plan
from orchestrator.fit import Fit, fit
from orchestrator.jobs import template_arguments, with_absolute_paths
from orchestrator.plan import Node, Plan, colocated, make_plan, total_gpus
from orchestrator.rewards import reward_models
from orchestrator.runnable import refusals
from orchestrator.schema import JobConfig
from orchestrator.starting_adapter import adopted
from orchestrator.validate import contradictions
from orchestrator.values import value_of

MOST_CHANGES = 3  # that a suggestion combines
MOST_SUGGESTIONS = 5
LORA = {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
QLORA = {"adapter": "qlora", "load_in_4bit": True}
SHARES = (1, 2, 4, 8, 16, 32, 64)  # GPUs that hold a model together

Changes = Mapping[str, Any]  # a dotted key's new value


@dataclass(frozen=True)
class Read:
    """What is read before a job can be planned."""

    config: JobConfig  # its paths absolute, and the shape of the adapter that it starts from in it
    rows: int  # prompts of an online job
    reward_models: tuple[str, ...]  # which of trl.reward_funcs are such
    tokens: float | None  # of a row, or an online job's prompt, on average; None = not known


@dataclass(frozen=True)
class Planned:
    """A job on nodes."""

    config: JobConfig
    plan: Plan | DatasetPlan
    fit: Fit

    @property
    def problems(self) -> list[str]:
        """A line for each bundle that has no place, and for each kind of place that is too small."""
        return [*self.plan.problems, *self.fit.problems]

    @property
    def fullest(self) -> float:
        """Share of its memory that the fullest place needs; 0 when no place's memory is known."""
        return max((place.total / place.capacity for place in self.fit.places if place.capacity), default=0.0)

    def __str__(self) -> str:
        return "\n".join([*describe(self), *(f"problem     {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Suggestion:
    """Changes with which a job fits."""

    changes: Changes
    fullest: float  # share of its memory that the fullest place then needs


def read(config: JobConfig) -> Read:
    """Raises EaglerayError for all that is wrong with a job's data and adapter, before anything is planned."""
    config = adopted(with_absolute_paths(config))
    folders = config.source.folders
    if config.rl != "grpo":
        prepare.check(config, folders)
        return Read(config, 0, (), prepare.tokens_of_a_row(config, folders))
    prompts = load_prompts(config, folders)
    ensure_playable(config, prompts.train + prompts.held_out)
    return Read(config, len(prompts.train), tuple(reward_models(config)), _tokens_of_a_prompt(config, prompts))


def _tokens_of_a_prompt(config: JobConfig, prompts: PromptSet) -> float | None:
    rows = prompts.train[: prepare.SAMPLED]
    try:
        tokenizer = model.load_tokenizer(ModelSpec(config.base_model, "float32", config.trust_remote_code))
        return mean(len(prompt_token_ids(tokenizer, row.prompt, template_arguments(config))) for row in rows)
    except Exception:  # a template is a program, and there may be no tokenizer: the plan does without, and the job says why
        return None


def planned(config: JobConfig, nodes: Sequence[Node], read: Read) -> Planned:
    """Of CPU nodes it takes this machine's processor as an example. Raises ConfigError for what no cluster can hold."""
    cpu_dtype = device.fastest_dtype(gpu=False)
    if config.rl == "grpo":
        tensor_parallel.ensure_possible(config)
        made: Plan | DatasetPlan = make_plan(config, nodes, read.rows, cpu_dtype, read.reward_models)
    else:
        made = make_dataset_plan(config, nodes, cpu_dtype)
    return Planned(config, made, fit(config, made))


def describe(job: Planned) -> list[str]:
    """The plan for a person, a line each."""
    if isinstance(job.plan, Plan):
        return description.describe(job.config, job.plan)
    return dataset_plan.describe(job.config, job.plan)


def suggestions(config: JobConfig, nodes: Sequence[Node], read: Read) -> list[Suggestion]:
    """The fewest changes with which the job fits, each planned; the ones that leave the result as it is come first."""
    kinds = list(_kinds(config, total_gpus(nodes)))
    for count in range(1, MOST_CHANGES + 1):
        found = []
        for chosen in combinations(kinds, count):
            for changes in product(*chosen):
                suggestion = _tried(config, nodes, read, {key: value for change in changes for key, value in change.items()})
                if suggestion:
                    found.append(suggestion)
                    break  # the stronger ones of the same kinds would do as well
            if len(found) == MOST_SUGGESTIONS:
                return found
        if found:
            return found
    return []


def _tried(config: JobConfig, nodes: Sequence[Node], read: Read, changes: Changes) -> Suggestion | None:
    """None where the job would not fit, or would be none."""
    changed = with_changes(config, changes)
    try:
        if any((*contradictions(changed), *refusals(changed))):
            return None
        job = planned(changed, nodes, read)
    except ConfigError:
        return None
    return None if job.problems else Suggestion(changes, job.fullest)


def with_changes(config: JobConfig, changes: Changes) -> JobConfig:
    changed = copy.deepcopy(config)
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        setattr(value_of(changed, section) if section else changed, name, value)
    return changed


def _kinds(config: JobConfig, gpus: int) -> Iterator[Sequence[Changes]]:
    """Kinds of changes that need less, or need it elsewhere; of each kind from the least to the most."""
    online = config.rl == "grpo"
    if not sharding.checkpoints_activations(config):
        yield [{"gradient_checkpointing": True}]
    if smaller := list(_smaller_batches(config)):
        yield smaller
    if gpus and (over := list(_shards(config, gpus))):
        yield over
    if config.bf16 and config.adapter is None and sharding.has_masters(config):
        yield [{"bf16": "full"}]
    if online and gpus:
        yield from _engine_kinds(config, gpus)
    if isinstance(config.ray_num_workers, int) and config.ray_num_workers > 1:
        yield [{"ray_num_workers": workers} for workers in range(config.ray_num_workers - 1, 0, -1)]
    if config.adapter is None:
        yield [LORA, {**LORA, **QLORA}]
    elif not config.load_in_4bit:
        yield [{**QLORA, "load_in_8bit": False}]


def _smaller_batches(config: JobConfig) -> Iterator[Changes]:
    """As many rows a step, fewer of them at once."""
    size, passes = config.micro_batch_size, config.gradient_accumulation_steps
    while size % 2 == 0:
        size, passes = size // 2, passes * 2
        yield {"micro_batch_size": size, "gradient_accumulation_steps": passes}


def _shards(config: JobConfig, gpus: int) -> Iterator[Changes]:
    """The model in shards over more GPUs; as many rows a step where they can be dealt."""
    now = config.ray_num_workers
    if config.deepspeed or not isinstance(now, int):
        return
    passes = config.gradient_accumulation_steps
    for workers in SHARES[1:]:
        if now < workers <= gpus or (workers == now and not sharding.kind(config)):
            yield {
                "fsdp_version": 2,
                "ray_num_workers": workers,
                "gradient_accumulation_steps": max(1, passes * now // workers),
            }


def _engine_kinds(config: JobConfig, gpus: int) -> Iterator[Sequence[Changes]]:
    size, share = config.vllm.tensor_parallel_size, config.vllm.gpu_memory_utilization
    if larger := [n for n in SHARES if size < n <= gpus]:
        yield [{"vllm.tensor_parallel_size": n} for n in larger]
    lower = [{"vllm.gpu_memory_utilization": s} for s in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3) if s < share]
    if lower:
        yield lower
    if not colocated(config):
        takes_turns: Changes = {"trl.vllm_mode": "colocate", "trl.vllm_enable_sleep_mode": True}
        yield [takes_turns, *({**takes_turns, "vllm.gpu_memory_utilization": s} for s in (0.7, 0.5) if s < share)]
        if config.ray_num_workers == 1 and size == 1:
            yield [{"resources_per_worker": {"GPU": 0.5}, "ray.engine_gpus": 0.5}]
        if config.ray.engines > 1:
            yield [{"ray.engines": engines} for engines in range(config.ray.engines - 1, 0, -1)]
    elif not config.trl.vllm_enable_sleep_mode:
        yield [{"trl.vllm_enable_sleep_mode": True}]
