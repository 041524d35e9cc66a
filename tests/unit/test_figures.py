"""Figures of `eagleray eval` against cases that were worked out by hand, and against counting."""

from fractions import Fraction
from itertools import combinations

import pytest

from orchestrator.figures import Answered, figures, pass_at, table


def answered(right: list[float | None], tokens: list[int], brief: list[float | None] | None = None) -> Answered:
    count = len(right)
    other = {} if brief is None else {"m.brief": tuple(brief)}
    return Answered(("text",) * count, tuple(tokens), (False,) * count, tuple(right), {"m.right": tuple(right), **other})


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (4, 1), (5, 2), (6, 6), (6, 0)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples: int, right: int) -> None:
    outcomes = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = [any(draw) for draw in combinations(outcomes, k)]
        assert pass_at(k, samples, right) == pytest.approx(float(Fraction(sum(draws), len(draws))))


def test_greedy_answers() -> None:
    answers = [answered([1.0], [3]), answered([0.5], [5]), answered([None], [4])]
    assert figures(answers, "m.right") == {"accuracy": 0.5, "reward": 0.75, "tokens": 4.0, "truncated": 0.0}
    assert figures(answers, None) == {"reward": 0.75, "tokens": 4.0, "truncated": 0.0}, "nobody knows right and wrong"


def test_sampled_answers() -> None:
    """Two of four right, and none: pass@1 is (1/2 + 0) / 2, pass@4 is (1 + 0) / 2."""
    answers = [answered([1.0, 0.0, 0.0, 1.0], [1] * 4, [1.0] * 4), answered([0.0] * 4, [3] * 4, [0.0] * 4)]
    found = figures(answers, "m.right")
    assert (found["pass@1"], found["pass@4"], found["reward"], found["tokens"]) == (0.25, 0.5, 0.25, 2.0)
    assert (found["reward/m.right"], found["reward/m.brief"]) == (0.25, 0.5)
    assert "accuracy" not in found


def test_a_prompt_without_enough_judged_samples_has_no_pass_at_k() -> None:
    answers = [answered([1.0, None], [1, 1]), answered([0.0, 0.0], [1, 1])]
    found = figures(answers, "m.right")
    assert (found["pass@1"], found["pass@2"]) == (0.5, 0.0)
    failed = Answered(("text",) * 2, (1, 1), (True, False), (None, None), {"m.right": ()})
    assert figures([failed], "m.right") == {"tokens": 1.0, "truncated": 0.5}


def test_the_table_has_what_both_sides_have() -> None:
    lines = table({"accuracy": 0.5, "reward": 0.25, "tokens": 9.0}, {"accuracy": 0.75, "tokens": 4.5})
    assert [line.split() for line in lines] == [
        ["before", "after", "change"],
        ["accuracy", "50.0", "%", "75.0", "%", "+25.0", "%"],
        ["tokens", "9.0", "4.5", "-4.5"],
    ]
    assert len({len(line) for line in lines}) == 1
