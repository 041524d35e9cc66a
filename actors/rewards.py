"""The actor that scores: one reward function, one process, so that what it does to itself it does not do to the job.

A function has TRL's signature, `fn(completions, **columns) -> list[float | None]`, sync or async. It gets `prompts`,
`completions`, `completion_ids`, the dataset's columns and what `trl.rollout_func` returned, each a list over the completions
of one prompt, as far as it names them or takes `**kwargs`; one that names `sandbox_limits` also gets the limits of
`ray.sandbox`. Its calls run one after another: the driver ends the process of one that does not return.
"""

import asyncio
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from actors import sandbox
from actors.functions import load_function, named_by
from actors.specs import RewardSpec
from actors.types import RolloutGroup, Scores


class RewardWorker:
    """One reward function in a process of its own."""

    def __init__(self, spec: RewardSpec) -> None:
        self.spec = spec
        self.function = load_function("trl.reward_funcs", spec.path, spec.search_paths)
        self.takes_limits = "sandbox_limits" in inspect.signature(self.function).parameters

    def __repr__(self) -> str:  # what the dashboard and Ray's logs call it
        return f"reward {self.spec.path}"

    def ready(self) -> str | None:
        """Returns once the function is imported: calls are timed from then on. What a person must know of it, or None."""
        if self.takes_limits and not sandbox.has_namespaces():
            return sandbox.WITHOUT_NAMESPACES
        return None

    def score(self, prompt: Any, columns: Mapping[str, Any], group: RolloutGroup) -> Scores:
        """Rewards of one group. A function that fails is a failure in the result, never a zero."""
        count = len(group.texts)
        arguments: dict[str, Any] = {
            **{name: [value] * count for name, value in columns.items()},  # first: a column replaces none of the following
            **group.columns,
            "prompts": [prompt] * count,
            "completions": group.completions(conversational=not isinstance(prompt, str)),
            "completion_ids": [ids.tolist() for ids in group.completion_ids],
        }
        arguments = named_by(self.function, arguments)
        if self.takes_limits:
            arguments["sandbox_limits"] = self.spec.sandbox
        try:
            result = self.function(**arguments)
            if inspect.isawaitable(result):
                result = asyncio.run(_settled(result))
            rewards = checked(result, count)
        except (Exception, SystemExit) as error:  # the fault boundary: a person's code may raise anything
            return Scores(self.spec.path, (), f"{type(error).__name__}: {error}")
        return Scores(self.spec.path, rewards, None)


async def _settled(result: Any) -> Any:
    return await result


def checked(result: Sequence[Any], count: int) -> tuple[float | None, ...]:
    """The function's answer as floats. Raises ValueError unless it is one finite number or None a completion."""
    if isinstance(result, str) or not hasattr(result, "__len__") or not hasattr(result, "__iter__"):
        raise ValueError(f"returned a {type(result).__name__}, not a list of {count} numbers")
    if len(result) != count:
        raise ValueError(f"returned {len(result)} rewards for {count} completions")
    rewards = tuple(None if reward is None else float(reward) for reward in result)
    for i, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(f"returned {reward} for completion {i}; use None where there is no reward")
    return rewards
