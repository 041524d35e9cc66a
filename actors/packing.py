"""Rollout groups to packed rows: a prompt stands once for all completions of its group, and nothing is padding.

A row is one sequence for the model: prompt, completion, completion, …, prompt, completion, … . Attention lets a completion
see its own prompt and itself, and positions restart where the prompt ends, so each completion's log-probabilities are those
it would have alone. The prompt's forward and backward pass is paid once a group instead of once a completion.

The last token of a prompt stands before each of its completions instead, and no completion's own last token is in the row. So a
position predicts one token at most, and a group in a row has one token less than it is made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.attention import ALIGNMENT, Block, PackedAttention
from actors.formats.base import IGNORED
from actors.types import RolloutGroup


@dataclass(frozen=True)
class Sample:
    """One completion in the loss: where it lies and what it is worth."""

    group: int
    index: int  # within the group
    advantage: float


@dataclass(frozen=True)
class PackedRow:
    """One forward pass: L positions, B completions of at most T tokens."""

    input_ids: Tensor  # [1, L] int64
    position_ids: Tensor  # [1, L] int64
    labels: Tensor  # [1, L] int64: the token that a position predicts; IGNORED where the model wrote none after it
    prompts_GP: Tensor  # [G, P] int64: positions of each prompt but its last token; 0 at padding
    queries_BT: Tensor  # [B, T] int64: the position that predicts each token of a completion; 0 at padding
    keys_BS: Tensor  # [B, S] int64: what each completion may see: its prompt's positions, padded with 0, then queries_BT
    prompt_lengths_B: Tensor  # [B] int64
    places_L: Tensor  # [L] int64: of each position, in all prompts and then all completions, padding included
    mask_BT: Tensor  # [B, T] bool: tokens that the model wrote; false at padding and where it was answered
    rollout_logprobs_BT: Tensor  # [B, T] fp32, the engine's; 0 at padding
    advantages_B: Tensor  # [B] fp32

    def to(self, device: torch.device) -> "PackedRow":
        return PackedRow(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def attention(self, dtype: torch.dtype) -> PackedAttention:
        """What the model's attention needs of the row; dtype: the model's."""
        width = self.queries_BT.shape[1]
        key = torch.arange(self.keys_BS.shape[1], device=self.keys_BS.device)
        query = torch.arange(width, device=key.device)
        own = key - (len(key) - width)  # the completion's own place; below 0 in the prompt
        earlier_TS = (own >= 0) & (own <= query[:, None])
        prompt_BS = key < self.prompt_lengths_B[:, None]
        seen_BTS = earlier_TS | prompt_BS[:, None]
        mask = torch.zeros(seen_BTS.shape, dtype=dtype, device=key.device).masked_fill(~seen_BTS, torch.finfo(dtype).min)
        prompts = Block(queries_BT=self.prompts_GP, keys_BS=self.prompts_GP, mask_B1TS=None)
        completions = Block(queries_BT=self.queries_BT, keys_BS=self.keys_BS, mask_B1TS=mask[:, None])
        return PackedAttention(blocks=[prompts, completions], places_L=self.places_L)


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
    prompts: list[NDArray[np.int64]] = []  # where each lies
    own: list[NDArray[np.int64]] = []  # where what predicts each completion lies
    written: list[NDArray[np.bool_]] = []  # which of its tokens are the model's
    labels: list[NDArray[np.int64]] = []
    prompt_of: list[int] = []  # of each completion, its prompt's place in `prompts`
    row_groups: list[int] = []
    length = 0

    def append(ids: NDArray[np.int32], first_position: int, predicted: NDArray[np.int64]) -> NDArray[np.int64]:
        nonlocal length
        tokens.append(ids)
        positions.append(np.arange(first_position, first_position + len(ids)))
        labels.append(predicted)
        length += len(ids)
        return np.arange(length - len(ids), length)

    for sample in samples:
        group = groups[sample.group]
        before = len(group.prompt_ids) - 1
        if not row_groups or row_groups[-1] != sample.group:
            row_groups.append(sample.group)
            prompts.append(append(group.prompt_ids[:-1], 0, np.full(before, IGNORED)))
        ids = group.completion_ids[sample.index]
        mine = group.written_by_model(sample.index)
        written.append(mine)
        own.append(append(np.append(group.prompt_ids[-1], ids[:-1]), before, np.where(mine, ids, IGNORED)))
        prompt_of.append(len(prompts) - 1)

    width = max(map(len, own))
    logprobs = [groups[s.group].logprobs[s.index] for s in samples]
    longest = max(1, *map(len, prompts))  # prompts of one token are before their completions only
    longest += -(longest + width) % ALIGNMENT
    prompts_GP = _padded(prompts, longest)
    queries_BT = _padded(own, width)
    places_L = torch.empty(length, dtype=torch.int64)
    for number, where in enumerate(prompts):
        places_L[where] = torch.arange(len(where)) + number * longest
    for number, where in enumerate(own):
        places_L[where] = torch.arange(len(where)) + len(prompts) * longest + number * width
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64))[None],
        prompts_GP=prompts_GP,
        queries_BT=queries_BT,
        keys_BS=torch.cat([prompts_GP[prompt_of], queries_BT], 1),
        prompt_lengths_B=torch.tensor([len(prompts[number]) for number in prompt_of]),
        places_L=places_L,
        mask_BT=_padded(written, width),
        rollout_logprobs_BT=_padded(logprobs, width).float(),
        advantages_B=torch.tensor([s.advantage for s in samples], dtype=torch.float32),
    )


def idle_row() -> PackedRow:
    """A row that trains nothing: for a rank that has no row left while others have, where forward passes are collectives."""
    token = np.zeros(1, dtype=np.int32)
    logprob = np.zeros(1, dtype=np.float32)
    group = RolloutGroup(0, token, (token,), (logprob,), (False,), ("",), written=(np.zeros(1, dtype=np.bool_),))
    return pack_row([group], [Sample(0, 0, 0.0)])


def _padded(rows: Sequence[NDArray[np.generic]], width: int) -> Tensor:
    out = np.zeros((len(rows), width), dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
