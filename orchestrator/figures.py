"""Before against after, in numbers: what a set of answers came to, and two of them side by side as a table.

Plain floats. A new figure is an entry of `figures`; where its name is no metric's, `_written` says how it is written.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb, isfinite
from statistics import fmean
from typing import Any

from actors.types import Completion
from orchestrator.display import HELD_OUT, Record, percent, written

Figures = dict[str, float]  # by name; only those that can be known


@dataclass(frozen=True)
class Answered:
    """One prompt's completions, with what was said of them."""

    completions: tuple[Completion, ...]  # [G]: text, or the messages that trl.rollout_func made
    tokens: tuple[int, ...]  # [G]: that the model wrote
    truncated: tuple[bool, ...]  # [G]
    rewards: tuple[float | None, ...]  # [G]: weighted
    by_function: Mapping[str, tuple[float | None, ...]]  # [G] each; empty for a function that failed

    def as_json(self) -> list[dict[str, Any]]:
        """An entry a completion."""
        return [
            {
                "completion": completion,
                "reward": self.rewards[i],
                "rewards": {name: rewards[i] if rewards else None for name, rewards in self.by_function.items()},
                "tokens": self.tokens[i],
                "truncated": self.truncated[i],
            }
            for i, completion in enumerate(self.completions)
        ]


def figures(answers: Sequence[Answered], judge: str | None) -> Figures:
    """Means over all completions. judge: the function whose 1 is right; None = nobody knows right and wrong.

    With several completions a prompt pass@1 and pass@G, else the accuracy.
    """
    found: Figures = {}
    if judge is not None:
        judged = [[reward >= 1.0 for reward in a.by_function[judge] if reward is not None] for a in answers]
        most = max(len(a.completions) for a in answers)
        for k in sorted({1, most}):
            solved = [pass_at(k, len(right), sum(right)) for right in judged if len(right) >= k]
            if solved:
                found["accuracy" if most == 1 else f"pass@{k}"] = fmean(solved)
    functions = {name for a in answers for name in a.by_function}
    kept = {"reward": [a.rewards for a in answers]}
    if len(functions) > 1:
        kept |= {f"reward/{name}": [a.by_function[name] for a in answers] for name in sorted(functions)}
    for name, rewards in kept.items():
        if known := [reward for group in rewards for reward in group if reward is not None]:
            found[name] = fmean(known)
    found["tokens"] = fmean(tokens for a in answers for tokens in a.tokens)
    found["truncated"] = fmean(cut for a in answers for cut in a.truncated)
    return found


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k samples is right, estimated without bias from more of them: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, arXiv:2107.03374, equation 1.
    """
    return 1.0 - comb(samples - right, k) / comb(samples, k)


def recorded(record: Record) -> Figures:
    """What a dataset job found on its held-out rows, under the names that it was shown by."""
    return {words: record[name] for words, name in HELD_OUT.items() if isfinite(record.get(name, float("nan")))}


def table(before: Figures, after: Figures) -> list[str]:
    """A line a figure that both have: before, after, and the difference."""
    names = [name for name in before if name in after]
    wide = max(map(len, names), default=0)
    lines = [f"{'':<{wide}}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for name in names:
        b, a = before[name], after[name]
        change = _written(name, a - b)
        signed = change if change.startswith("-") else f"+{change}"
        lines.append(f"{name:<{wide}}  {_written(name, b):>8}  {_written(name, a):>8}  {signed:>8}")
    return lines


def _written(name: str, value: float) -> str:
    metrics = {**HELD_OUT, "tokens": "completion_length"}
    return percent(value) if name.startswith("pass@") else written(metrics.get(name, name), value)
