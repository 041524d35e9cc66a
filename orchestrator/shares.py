"""A batch cut into the shares of the trainer's ranks: each gets about as many tokens as the others. A pure function."""

from collections.abc import Sequence
from dataclasses import dataclass

Advantages = Sequence[Sequence[float | None]]  # [groups][G]; None = dropped


@dataclass(frozen=True)
class Share:
    """What one rank trains on."""

    groups: tuple[int, ...]  # places in the batch
    advantages: tuple[tuple[float | None, ...], ...]  # [groups][G]; None = dropped, or another rank's


def shares(
    advantages: Advantages,
    prompt_tokens: Sequence[int],
    completion_tokens: Sequence[Sequence[int]],
    ranks: int,
    *,
    every_sample: bool,
) -> list[Share]:
    """One share a rank; each completion is in exactly one.

    advantages: as the trainer takes them. prompt_tokens: [groups]. completion_tokens: [groups][G]. every_sample:
    whether completions of advantage 0 are computed too, as a KL term asks.

    All completions lie on a line, group after group, each as long as what it costs, and the line is cut into equal
    pieces. So each rank is within one completion of the mean, and at most `ranks` - 1 groups are cut, whose prompts are then
    computed once a piece.
    """
    costs = [
        [
            length + prompt / len(row) if a is not None and (every_sample or a != 0.0) else 0.0
            for a, length in zip(row, lengths, strict=True)
        ]
        for row, prompt, lengths in zip(advantages, prompt_tokens, completion_tokens, strict=True)
    ]
    whole = sum(map(sum, costs)) or 1.0
    owners: list[list[int]] = []
    passed = 0.0
    for row_costs in costs:
        owners.append([])
        for cost in row_costs:
            owners[-1].append(min(int((passed + cost / 2) / whole * ranks), ranks - 1))
            passed += cost
    return [_share(rank, advantages, owners) for rank in range(ranks)]


def _share(rank: int, advantages: Advantages, owners: Sequence[Sequence[int]]) -> Share:
    mine = [g for g, row in enumerate(owners) if rank in row]
    rows = (tuple(a if owner == rank else None for a, owner in zip(advantages[g], owners[g], strict=True)) for g in mine)
    return Share(tuple(mine), tuple(rows))
