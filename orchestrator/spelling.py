"""What can be written in several ways, brought to the one that the schema has: before it is matched, and after.

A key with another name is a line in `axolotl_keys.RENAMED`; another spelling of a value is a rule in `_values`, and two keys
of the schema that say the same thing are one in `settle`.
"""

from collections.abc import Iterator
from typing import Any

from orchestrator.axolotl_keys import ONLY_WITH, RENAMED, as_here
from orchestrator.schema import JobConfig
from orchestrator.source import Problem, Source, Translation

# Axolotl's flags for what attn_implementation names; the schema has the two that most files use. xformers' kernel computes
# what PyTorch's does.
ATTENTION_FLAGS = {"eager_attention": "eager", "flex_attention": "flex_attention", "xformers_attention": "sdpa"}
# Values by which Axolotl's users say that a key is not set.
UNSET: dict[str, Any] = {
    "evals_per_epoch": 0,
    "saves_per_epoch": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "max_steps": -1,
    "wandb_mode": "",
}
# FSDP1's list of strategies: what FSDP2 does by itself, and what it does when it is asked in fsdp_config.
FSDP_STRATEGIES: dict[str, dict[str, Any]] = {
    "full_shard": {},
    "auto_wrap": {},
    "offload": {"offload_params": True},
    "shard_grad_op": {"reshard_after_forward": False},
}
PROMPT_ROOM = 512  # tokens, where a file does not say how many there may be


def respell(data: dict[str, Any], source: Source) -> list[Problem]:
    """Gives keys and values of a file the one spelling of the schema, in place; returns what to tell."""
    return [*_renamed(data, source), *_without_effect(data), *_values(data)]


def settle(config: JobConfig) -> list[Problem]:
    """Copies each fact that has two keys to the one that the rest of Eagleray reads; returns what to tell."""
    told: list[Problem] = []
    if config.reward_model and config.rl is None:
        told.append(Translation("reward_model", "read as rl: reward_trainer"))
        config.rl = "reward_trainer"
    config.reward_model = config.rl == "reward_trainer"
    for flag, name in (("flash_attention", "flash_attention_2"), ("sdp_attention", "sdpa")):
        if getattr(config, flag):
            config.attn_implementation = name
            told.append(Translation(flag, f"read as attn_implementation: {name}"))
    if config.fp16 and config.bf16 == "auto":
        config.bf16 = False
    if config.evals_per_epoch is not None and not (config.test_datasets or config.val_set_size):
        config.evals_per_epoch = None
        told.append(Problem("evals_per_epoch", "not used: there are no rows to evaluate on (test_datasets, val_set_size)"))
    if config.trl.beta is None:
        config.trl.beta = config.rl_beta
    elif config.rl_beta is not None and config.rl_beta != config.trl.beta:
        told.append(Problem("rl_beta", f"not used: trl.beta ({config.trl.beta:g}) wins over it"))
    if config.trl.beta is None and config.rl == "grpo":
        config.trl.beta = 0.0  # TRL's default for GRPO: no KL term
    return told


def _renamed(data: dict[str, Any], source: Source) -> Iterator[Translation]:
    for old, new in RENAMED.items():
        holder, name = _place(data, old)
        if holder is None or holder.get(name) is None:
            continue
        target, last = _place(data, new, make=True)
        if target is not None and target.get(last) is None:
            target[last] = holder.pop(name)
            for where in (source.lines, source.overrides):
                if old in where:
                    where[new] = where[old]  # type: ignore[assignment]  # each is a mapping of its own type
            yield Translation(old, f"read as {new}")


def _place(data: dict[str, Any], key: str, make: bool = False) -> tuple[dict[str, Any] | None, str]:
    """The mapping that holds a dotted key, and its last name; make: sections on the way that are not there."""
    *sections, name = key.split(".")
    place: Any = data
    for section in sections:
        if make and isinstance(place, dict) and place.get(section) is None:
            place[section] = {}
        place = place.get(section) if isinstance(place, dict) else None
    return (place, name) if isinstance(place, dict) else (None, name)


def _without_effect(data: dict[str, Any]) -> Iterator[Problem]:
    """Takes out what asks for nothing as it stands."""
    for key, off in UNSET.items():
        if key in data and data[key] == off:
            del data[key]
            yield Translation(key, "read as not set, as Axolotl does")
    for key, other in ONLY_WITH.items():
        holder, name = _place(data, key)
        if holder is None or holder.get(name) is None:
            continue
        deciding, its_name = _place(data, other)
        value = deciding.get(its_name) if deciding is not None else None
        if not value or as_here(other, value):
            del holder[name]
            yield Problem(key, f"dropped: it does nothing without {other}")
    for key in ("base_model_config", "tokenizer_config"):
        if data.get(key) is not None and data[key] == data.get("base_model"):
            del data[key]
            yield Translation(key, "the same as base_model")


def _values(data: dict[str, Any]) -> Iterator[Problem]:
    trl = data.get("trl")
    if isinstance(trl, dict) and isinstance(trl.get("scale_rewards"), bool):
        trl["scale_rewards"] = "group" if trl["scale_rewards"] else "none"  # TRL's own reading of the old boolean
        yield Translation("trl.scale_rewards", f"read as {trl['scale_rewards']}, as TRL does")
    if data.get("rl") == "gdpo" and isinstance(trl, dict | None):
        data["rl"] = "grpo"
        data["trl"] = {**(trl or {}), "multi_objective_aggregation": "normalize_then_sum"}
        yield Translation("rl", "read as grpo with trl.multi_objective_aggregation: normalize_then_sum")
    if data.get("save_strategy") is False:
        data["save_strategy"] = "no"  # YAML reads a bare `no` as false
        yield Translation("save_strategy", "read as the word no, which YAML takes for false")
    yield from _precision(data)
    if "bf16" in data and data["bf16"] is None:
        data["bf16"] = False  # as Axolotl: written and empty is off, absent is auto
        yield Translation("bf16", "empty: read as false, as Axolotl does; without the key it is auto")
    for flag, name in ATTENTION_FLAGS.items():
        if data.get(flag) is True and data.get("attn_implementation") in (None, name):
            del data[flag]
            data["attn_implementation"] = name
            yield Translation(flag, f"read as attn_implementation: {name}")
    yield from _floor(data)
    yield from _eval_strategy(data)
    yield from _fsdp_strategies(data)
    yield from _sequence_len(data)


def _precision(data: dict[str, Any]) -> Iterator[Translation]:
    """Axolotl's flags for training without mixed precision, where bf16 does not say otherwise."""
    if data.get("bfloat16") is True and data.get("bf16") is not False:
        del data["bfloat16"]
        if data.get("bf16") in (None, "auto"):
            data["bf16"] = True
        yield Translation("bfloat16", f"read as bf16: {str(data['bf16']).lower()}")
    if data.get("float32") is True and data.get("bf16") is False:
        del data["float32"]
        yield Translation("float32", "follows from bf16: false")


def _floor(data: dict[str, Any]) -> Iterator[Translation]:
    """transformers' spelling of cosine_min_lr_ratio, which rl: grpo does not have."""
    if data.get("lr_scheduler") != "cosine_with_min_lr" or data.get("rl") == "grpo":
        return
    written = data.get("lr_scheduler_kwargs")
    if isinstance(written, dict) and [*written] == ["min_lr_rate"] and data.get("cosine_min_lr_ratio") is None:
        del data["lr_scheduler_kwargs"]
        data["cosine_min_lr_ratio"] = written["min_lr_rate"]
        yield Translation("lr_scheduler_kwargs", "read as cosine_min_lr_ratio")


def _eval_strategy(data: dict[str, Any]) -> Iterator[Translation]:
    """transformers' key, where it says no more than Axolotl's eval_steps and evals_per_epoch do."""
    every = [key for key in ("eval_steps", "evals_per_epoch") if data.get(key) is not None]
    for key in ("eval_strategy", "evaluation_strategy"):
        if data.get(key) is False:
            data[key] = "no"  # YAML reads a bare `no` as false
        if data.get(key) == "epoch" and not every:
            del data[key]
            data["evals_per_epoch"] = 1
            yield Translation(key, "read as evals_per_epoch: 1")
        elif data.get(key) == "steps" and every:
            del data[key]
            yield Translation(key, f"follows from {every[0]}")
        elif data.get(key) == "no" and not every:
            del data[key]
            yield Translation(key, "read as neither eval_steps nor evals_per_epoch")


def _sequence_len(data: dict[str, Any]) -> Iterator[Problem]:
    """Axolotl's default is no limit of a GRPO job, whose engines need one."""
    if data.get("rl") != "grpo" or data.get("sequence_len") is not None:
        return
    sections = [section if isinstance(section, dict) else {} for section in (data.get("vllm"), data.get("trl"))]
    limit, longest = sections[0].get("max_model_len"), sections[1].get("max_completion_length")
    if isinstance(limit, int):
        data["sequence_len"] = limit
        yield Problem("sequence_len", f"is not written, so it is {limit}, as vllm.max_model_len")
    elif isinstance(longest, int) and longest > PROMPT_ROOM // 2:
        data["sequence_len"] = longest + PROMPT_ROOM
        text = f"is not written, so it is {longest + PROMPT_ROOM}: trl.max_completion_length, and {PROMPT_ROOM} for the prompt"
        yield Problem("sequence_len", text)


def _fsdp_strategies(data: dict[str, Any]) -> Iterator[Translation]:
    written, options = data.get("fsdp"), data.get("fsdp_config") or {}
    strategies = written.split() if isinstance(written, str) else written
    if not strategies or not isinstance(strategies, list) or not isinstance(options, dict):
        return
    if not all(strategy in FSDP_STRATEGIES for strategy in strategies):
        return  # it is refused with the others that Eagleray does not have
    del data["fsdp"]
    asked = {name: value for strategy in strategies for name, value in FSDP_STRATEGIES[strategy].items()}
    data["fsdp_config"] = {**asked, **options}
    data.setdefault("fsdp_version", 2)
    named = "".join(f", with fsdp_config.{name}: {str(value).lower()}" for name, value in asked.items())
    yield Translation("fsdp", f"read as fsdp_version: {data['fsdp_version']}{named}")
