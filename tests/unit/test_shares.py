"""A batch cut into shares: nothing lost, nothing twice, and each rank within one completion of the mean."""

import random

import pytest

from orchestrator.shares import shares

PROMPTS = [10, 40, 6]
LENGTHS = [[5, 7, 5], [30, 2, 9], [1, 1, 1]]
ADVANTAGES = [[1.0, -1.0, None], [0.0, 0.5, -0.5], [0.0, 0.0, 0.0]]


def test_one_rank_has_all() -> None:
    (share,) = shares(ADVANTAGES, PROMPTS, LENGTHS, 1, every_sample=False)
    assert share.groups == (0, 1, 2)
    assert share.advantages == tuple(map(tuple, ADVANTAGES))


def test_by_hand() -> None:
    # Costs: 5 + 10/3 and 7 + 10/3; 2 + 40/3 and 9 + 40/3. Of 56.33 in all, the first rank takes up to 28.17, and the
    # middle of the third completion lies at 26.33.
    first, second = shares(ADVANTAGES, PROMPTS, LENGTHS, 2, every_sample=False)
    assert first.groups == (0, 1)
    assert first.advantages == ((1.0, -1.0, None), (0.0, 0.5, None))
    assert second.groups == (1, 2)
    assert second.advantages == ((None, None, -0.5), (0.0, 0.0, 0.0))


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("every_sample", [False, True])
def test_every_completion_has_one_rank_and_ranks_are_balanced(ranks: int, every_sample: bool) -> None:
    draw = random.Random(ranks)
    prompts = [draw.randint(1, 60) for _ in range(24)]
    lengths = [[draw.randint(1, 90) for _ in range(6)] for _ in prompts]
    advantages = [[draw.choice([None, 0.0, draw.uniform(-1, 1)]) for _ in row] for row in lengths]
    made = shares(advantages, prompts, lengths, ranks, every_sample=every_sample)
    found: list[list[float | None]] = [[None] * 6 for _ in prompts]
    loads = []
    for share in made:
        loads.append(0.0)
        for group, row in zip(share.groups, share.advantages, strict=True):
            for index, advantage in enumerate(row):
                if advantage is not None:
                    assert found[group][index] is None, "two ranks have it"
                    found[group][index] = advantage
                    if every_sample or advantage:
                        loads[-1] += lengths[group][index] + prompts[group] / 6
    assert found == advantages
    assert max(abs(load - sum(loads) / ranks) for load in loads) <= 90 + 10
    assert sum(len(share.groups) for share in made) <= len(prompts) + ranks - 1


def test_a_batch_without_signal_goes_to_somebody() -> None:
    made = shares([[None, 0.0]], [3], [[2, 2]], 2, every_sample=False)
    assert [share.advantages for share in made if share.groups] == [((None, 0.0),)]
