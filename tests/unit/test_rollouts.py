"""Shares of what is sampled, by the pace of engines."""

import pytest

from orchestrator.rollouts import shares


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
