"""What `trl.rollout_func` says: what it cannot go with, and the function as the engines take it."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from actors.conversation import RolloutFunction
from actors.specs import RolloutFunctionSpec
from orchestrator.online_keys import FUNCTION
from orchestrator.schema import JobConfig
from orchestrator.source import Problem

if TYPE_CHECKING:
    from orchestrator.data import Row

KEY = "trl.rollout_func"


def problems(config: JobConfig) -> Iterator[Problem]:
    """What contradicts conversations of several turns."""
    trl = config.trl
    if trl.rollout_func is None:
        return
    if not FUNCTION.fullmatch(trl.rollout_func):
        yield Problem(KEY, f"{trl.rollout_func} is no function's name; write module.fn, as for a reward function")
    if (trl.generation_kwargs or {}).get("ignore_eos"):
        text = f"ignore_eos lets no turn end before the length limit, so {KEY} would get one turn; remove one of the two"
        yield Problem("trl.generation_kwargs", text)
    if first := [name for name in trl.reward_funcs or [] if name.startswith("trl.rewards.")]:
        text = f"{first[0]} looks at the first message of a completion, and {KEY} makes several; name a function of yours"
        yield Problem("trl.reward_funcs", text)


def rollout_function_spec(config: JobConfig) -> RolloutFunctionSpec | None:
    """What the engines load; None where a completion is what the model answers once."""
    if config.trl.rollout_func is None:
        return None
    return RolloutFunctionSpec(config.trl.rollout_func, tuple(config.source.folders), config.ray.reward_timeout_s)


def ensure_playable(config: JobConfig, rows: "Sequence[Row]") -> None:
    """Raises ConfigError for a function that is not there or is none for this, and for prompts that are plain text."""
    spec = rollout_function_spec(config)
    if spec is None:
        return
    RolloutFunction(spec)
    if plain := [row.place for row in rows if isinstance(row.prompt, str)]:
        text = f"plays conversations, but the prompt of {plain[0]} is plain text; give messages with role and content"
        config.source.raise_if_any([Problem(KEY, text)])
