"""Packed rows: their layout against one written out by hand, and what every plan must keep."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from actors import attention
from actors.packing import PackedRow, Sample, pack_row, plan_rows
from actors.types import RolloutGroup
from tests.tiny import random_group


def group(prompt: list[int], *completions: list[int]) -> RolloutGroup:
    return RolloutGroup(
        policy_version=0,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=tuple(np.array(c, dtype=np.int32) for c in completions),
        logprobs=tuple(np.array([-t / 10 for t in c], dtype=np.float32) for c in completions),
        truncated=(False,) * len(completions),
        texts=("",) * len(completions),
    )


def example_row() -> PackedRow:
    """Two completions of one prompt and one of another, the middle completion of the first group left out."""
    groups = [group([1, 2], [11, 12, 13], [21], [31, 32]), group([3, 4, 5], [41])]
    return pack_row(groups, [Sample(0, 0, 0.5), Sample(0, 2, -1.0), Sample(1, 0, 2.0)])


def test_a_row_is_laid_out_as_by_hand() -> None:
    """The last token of a prompt stands before each of its completions, whose own last token predicts nothing."""
    row = example_row()
    assert row.input_ids.tolist() == [[1, 2, 11, 12, 2, 31, 3, 4, 5]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 1, 2, 0, 1, 2]]
    assert row.labels.tolist() == [[-100, 11, 12, 13, 31, 32, -100, -100, 41]]
    assert row.mask_BT.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert row.advantages_B.tolist() == [0.5, -1.0, 2.0]
    torch.testing.assert_close(row.rollout_logprobs_BT, torch.tensor([[-1.1, -1.2, -1.3], [-3.1, -3.2, 0.0], [-4.1, 0.0, 0.0]]))


def test_each_token_is_predicted_by_the_position_of_the_one_before_it() -> None:
    row = example_row()
    assert row.queries_BT.tolist() == [[1, 2, 3], [4, 5, 0], [8, 0, 0]]
    labels_BT = row.labels[0, row.queries_BT]
    assert labels_BT[row.mask_BT].tolist() == [11, 12, 13, 31, 32, 41]


def test_what_the_model_did_not_write_is_context_and_nothing_else() -> None:
    """Two completions: one that was answered in its middle and at its end, and one that others began."""
    first, second = [11, 12, 13, 14, 15, 16], [21, 22, 23]
    mine = (np.array([1, 1, 0, 0, 1, 0], dtype=np.bool_), np.array([0, 1, 1], dtype=np.bool_))
    groups = [replace(group([1, 2], first, second), written=mine), group([3], [41, 42])]
    row = pack_row(groups, [Sample(0, 0, 0.5), Sample(0, 1, -1.0), Sample(1, 0, 1.0)])
    assert row.input_ids.tolist() == [[1, 2, *first[:-1], 2, *second[:-1], 3, 41]]
    assert row.labels.tolist() == [[-100, 11, 12, -100, -100, 15, -100, -100, 22, 23, 41, 42]]
    assert row.mask_BT.tolist() == [[b == "1" for b in line] for line in ("110010", "011000", "110000")]
    assert row.labels[0, row.queries_BT[row.mask_BT]].tolist() == [11, 12, 15, 22, 23, 41, 42]


def test_a_completion_sees_its_prompt_and_itself() -> None:
    #        1  2  11 12 2  31 3  4  5
    seen = [
        "1........",
        "11.......",
        "111......",
        "1111.....",
        "1...1....",
        "1...11...",
        "......1..",
        "......11.",
        "......111",
    ]
    length = len(seen)
    # Equal scores, so that a position's output is the mean of what it sees, and values tell positions apart.
    equal, values = torch.zeros(1, 1, length, length), torch.eye(length)[None, None]
    packed = example_row().attention(torch.float32)
    out, _ = attention.attend(torch.nn.Module(), equal, equal, values, None, packed=packed)
    expected = torch.tensor([[float(c == "1") for c in line] for line in seen])
    torch.testing.assert_close(out[0, :, 0], expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("per_row", [1, 3, 8, 100])
def test_a_plan_holds_each_sample_once_in_rows_that_are_not_too_long(seed: int, per_row: int) -> None:
    rng = np.random.default_rng(seed)
    groups = [
        random_group(int(rng.integers(1, 9)), rng.integers(1, 9, rng.integers(1, 7)).tolist(), seed=i)
        for i in range(int(rng.integers(1, 8)))
    ]
    samples = [Sample(g, i, 1.0) for g, gr in enumerate(groups) for i in range(len(gr.texts)) if rng.random() < 0.8]
    rows = plan_rows(groups, samples, per_row)
    key = lambda s: (s.group, s.index)  # noqa: E731
    assert sorted((s for row in rows for s in row), key=key) == sorted(samples, key=key)
    for row in rows:
        assert 0 < len(row) <= per_row
        order = [s.group for s in row]
        runs = sum(1 for i, g in enumerate(order) if i == 0 or order[i - 1] != g)
        assert runs == len(set(order)), "the completions of a group are not side by side"


def test_prompts_are_computed_once_and_nothing_is_padding() -> None:
    groups = [random_group(p, c, seed=p) for p, c in ((5, [4, 1, 7]), (9, [2, 2]), (3, [6, 5, 1, 1]))]
    samples = [Sample(g, i, 1.0) for g, gr in enumerate(groups) for i in range(len(gr.texts))]
    rows = [pack_row(groups, row) for row in plan_rows(groups, samples, 4)]
    # Prompts 5 + 9 + 3, completions 12 + 4 + 13; what ends a group predicts nothing.
    assert sum(row.input_ids.numel() for row in rows) == 17 + 29 - 3
    assert sum(int(row.mask_BT.sum()) for row in rows) == 29


def test_a_group_that_fits_is_not_split() -> None:
    groups = [random_group(4, [3, 3, 3], seed=i) for i in range(4)]
    samples = [Sample(g, i, 1.0) for g in range(4) for i in range(3)]
    rows = plan_rows(groups, samples, 4)  # 4 would hold one group and a third of another
    assert [len(row) for row in rows] == [3, 3, 3, 3]


def test_the_longest_group_comes_first() -> None:
    groups = [random_group(2, [3], seed=0), random_group(2, [9], seed=1), random_group(7, [3], seed=2)]
    rows = plan_rows(groups, [Sample(g, 0, 1.0) for g in range(3)], 1)
    assert [row[0].group for row in rows] == [1, 2, 0]
    assert plan_rows(groups, [], 1) == []
