"""Shares of what is sampled, by the pace of engines, and how much of it an engine has at once."""

from typing import Any

import pytest

from actors.specs import SamplingSpec
from orchestrator.data import Row
from orchestrator.rollouts import Group, Rollouts, shares


@pytest.mark.parametrize(
    ("count", "paces", "expected"),
    [
        (8, [None], [8]),
        (8, [None, None], [4, 4]),
        (9, [None, None], [5, 5]),  # who comes first gets the odd one
        (8, [0.1, 0.3], [6, 2]),
        (8, [0.1, None, 0.1], [3, 3, 3]),
        (1, [0.5, 0.5, 5.0], [1, 1, 1]),
        (0, [0.5, None], [0, 0]),
    ],
)
def test_shares_by_hand(count: int, paces: list[float | None], expected: list[int]) -> None:
    assert shares(count, paces) == expected


@pytest.mark.parametrize(("generations", "groups"), [(1, 8), (4, 2), (3, 3), (16, 1)])
def test_an_engine_has_so_many_completions_at_once(
    monkeypatch: pytest.MonkeyPatch, generations: int, groups: int
) -> None:
    """Of held-out prompts, which have one each, as of those that are trained on."""
    nothing: Any = None
    rollouts = Rollouts([nothing], nothing, nothing, most=8, timeout_s=1.0)
    (engine,) = rollouts.engines
    engine.version = 3
    monkeypatch.setattr(rollouts, "_install", lambda version: None)
    monkeypatch.setattr(rollouts, "_give", lambda index, group: engine.out.update({group.place: group}))
    sampling = SamplingSpec(generations, 16)
    rollouts.queue.extend(Group(Row("question", {}, ""), 0, place, 3, sampling, place) for place in range(20))
    rollouts._deal()
    assert list(engine.out) == list(range(groups)) and len(rollouts.queue) == 20 - groups
