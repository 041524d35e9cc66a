"""The actor that writes down what was sampled, for people: a line of JSON a completion.

A completion is text, or, where `trl.rollout_func` played it, the messages of its turns.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.types import RolloutGroup, Scores


class SampleWriter:
    """A process of its own, so that neither the driver sees the texts nor training waits for the disk."""

    def write(
        self,
        path: str,
        prompts: Sequence[Any],
        scores: Sequence[Sequence[Scores]],
        rewards: Sequence[Sequence[float | None]],
        advantages: Sequence[Sequence[float | None]],
        *groups: RolloutGroup,
    ) -> None:
        """prompts: [groups]. scores: [groups][functions]. rewards, weighted, and advantages: [groups][G]."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{target.name}.tmp")
        with beside.open("w", encoding="utf-8") as file:
            for prompt, by_function, rewards_G, advantages_G, group in zip(
                prompts, scores, rewards, advantages, groups, strict=True
            ):
                for i, completion in enumerate(group.messages or group.texts):
                    given = {s.function: None if s.failure else s.rewards[i] for s in by_function}
                    line = {
                        "prompt": prompt,
                        "completion": completion,
                        "reward": rewards_G[i],
                        "rewards": given,
                        "advantage": advantages_G[i],
                        "tokens": len(group.completion_ids[i]),
                        "truncated": group.truncated[i],
                        "policy_version": group.policy_version,
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(beside, target)
