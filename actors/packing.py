"""Rollout groups to packed rows: a prompt stands once for all completions of its group, and nothing is padding.

A row is one sequence for the model: prompt, completion, completion, …, prompt, completion, … . A mask lets a completion
see its own prompt and itself, and positions restart after the prompt, so each completion's log-probabilities are those
it would have alone. The prompt's forward and backward pass is paid once a group instead of once a completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.types import RolloutGroup


@dataclass(frozen=True)
class Sample:
    """One completion in the loss: where it lies and what it is worth."""

    group: int
    index: int  # within the group
    advantage: float


@dataclass(frozen=True)
class PackedRow:
    """One forward pass: L positions, B completions of at most T tokens, K positions that need logits."""

    input_ids: Tensor  # [1, L] int64
    position_ids: Tensor  # [1, L] int64
    segments: Tensor  # [L, 2] int64: group in the row, and completion in the group counted from 1 (0 = prompt)
    keep: Tensor  # [K] int64: positions whose logits predict a completion token
    predicts_BT: Tensor  # [B, T] int64: index into keep of the position that predicts the token; 0 at padding
    completion_ids_BT: Tensor  # [B, T] int64; 0 at padding
    mask_BT: Tensor  # [B, T] bool
    rollout_logprobs_BT: Tensor  # [B, T] fp32, the engine's; 0 at padding
    advantages_B: Tensor  # [B] fp32

    def to(self, device: torch.device) -> "PackedRow":
        return PackedRow(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask [1, 1, L, L]: 0 where a position may look, the dtype's minimum elsewhere."""
        group_L, completion_L = self.segments.unbind(-1)
        length = len(group_L)
        earlier = torch.ones(length, length, dtype=torch.bool, device=group_L.device).tril()
        same_group = group_L[:, None] == group_L[None, :]
        own_or_prompt = (completion_L[None, :] == 0) | (completion_L[:, None] == completion_L[None, :])
        seen = earlier & same_group & own_or_prompt
        mask = torch.zeros(length, length, dtype=dtype, device=group_L.device)
        return mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def plan_rows(groups: Sequence[RolloutGroup], samples: Sequence[Sample], per_row: int) -> list[list[Sample]]:
    """Deals samples to rows of at most `per_row` completions, those of one group side by side.

    Groups come longest first, so that rows are of like length and the largest one shows at once whether it fits.
    """
    by_group: dict[int, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(sample)

    def tokens(group: int) -> int:
        return len(groups[group].prompt_ids) + sum(len(groups[group].completion_ids[s.index]) for s in by_group[group])

    rows: list[list[Sample]] = [[]]
    for group in sorted(by_group, key=tokens, reverse=True):
        members = by_group[group]
        if len(rows[-1]) + min(len(members), per_row) > per_row:
            rows.append([])  # rather a short row than a prompt computed twice
        for sample in members:
            if len(rows[-1]) == per_row:
                rows.append([])
            rows[-1].append(sample)
    return [row for row in rows if row]


def pack_row(groups: Sequence[RolloutGroup], samples: Sequence[Sample]) -> PackedRow:
    """Lays out samples as one row; those of one group must be adjacent."""
    tokens: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    segments: list[tuple[int, int, int]] = []  # group, completion, length
    keep: list[int] = []
    predicts: list[list[int]] = []
    row_groups: list[int] = []
    length = 0

    def append(ids: NDArray[np.int32], first_position: int, completion: int) -> None:
        nonlocal length
        tokens.append(ids)
        positions.append(np.arange(first_position, first_position + len(ids)))
        segments.append((len(row_groups), completion, len(ids)))
        length += len(ids)

    prompt_end = 0
    for sample in samples:
        group = groups[sample.group]
        if not row_groups or row_groups[-1] != sample.group:
            row_groups.append(sample.group)
            append(group.prompt_ids, 0, 0)
            prompt_end = len(keep)  # the prompt's last position predicts the first token of every completion
            keep.append(length - 1)
            completion_number = 0
        completion_number += 1
        ids = group.completion_ids[sample.index]
        predicts.append([prompt_end, *range(len(keep), len(keep) + len(ids) - 1)])
        keep.extend(range(length, length + len(ids) - 1))
        append(ids, len(group.prompt_ids), completion_number)

    width = max(len(p) for p in predicts)
    completions = [groups[s.group].completion_ids[s.index] for s in samples]
    logprobs = [groups[s.group].logprobs[s.index] for s in samples]
    lengths = torch.tensor([len(ids) for ids in completions])
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        segments=torch.tensor([s[:2] for s in segments]).repeat_interleave(torch.tensor([s[2] for s in segments]), 0),
        keep=torch.tensor(keep),
        predicts_BT=_padded([np.array(p) for p in predicts], width).long(),
        completion_ids_BT=_padded(completions, width).long(),
        mask_BT=torch.arange(width)[None] < lengths[:, None],
        rollout_logprobs_BT=_padded(logprobs, width).float(),
        advantages_B=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
    )


def idle_row() -> PackedRow:
    """A row that trains nothing: for a rank that has no row left while others have, where forward passes are collectives."""
    token = np.zeros(1, dtype=np.int32)
    logprob = np.zeros(1, dtype=np.float32)
    group = RolloutGroup(0, token, (token,), (logprob,), (False,), ("",))
    row = pack_row([group], [Sample(0, 0, 0.0)])
    return replace(row, mask_BT=torch.zeros_like(row.mask_BT))


def _padded(rows: Sequence[NDArray[np.generic]], width: int) -> Tensor:
    out = np.zeros((len(rows), width), dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
