"""What travels between actors, all frozen. Tokens and tensors stay in the object store; the driver sees headers.

Letters in names: G completions of one prompt, T tokens of a completion, P tokens of a prompt.
A new message gets a class here, a line a field, with its shape and unit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Completion = str | Sequence[Mapping[str, Any]]  # for a reward function: text, or where the prompt is a chat, its messages


@dataclass(frozen=True)
class RolloutGroup:
    """The completions that one policy version sampled for one prompt: what an engine puts into the object store."""

    policy_version: int
    prompt_ids: NDArray[np.int32]  # [P]
    completion_ids: tuple[NDArray[np.int32], ...]  # G arrays of [T]; the end token is in, where there is one
    logprobs: tuple[NDArray[np.float32], ...]  # G arrays of [T]: the engine's, at the sampling temperature
    truncated: tuple[bool, ...]  # [G]: cut at the length limit
    texts: tuple[str, ...]  # [G]: decoded without special tokens
    # Of completions that trl.rollout_func played:
    written: tuple[NDArray[np.bool_], ...] | None = None  # G arrays of [T]: whether the model wrote the token; None = all
    messages: tuple[Sequence[Mapping[str, Any]], ...] | None = None  # [G]: all that came after the prompt
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # by name, [G]: what the function returned

    def written_by_model(self, index: int) -> NDArray[np.bool_]:
        """[T]: which tokens of a completion are the model's own; the others are what it was answered, and nothing to learn."""
        return np.ones(len(self.completion_ids[index]), dtype=np.bool_) if self.written is None else self.written[index]

    def completions(self, *, conversational: bool) -> list[Completion]:
        """[G]: as people's functions get them. conversational: whether the prompt is messages."""
        if self.messages is not None:
            return list(self.messages)
        return [[{"role": "assistant", "content": text}] if conversational else text for text in self.texts]


@dataclass(frozen=True)
class RolloutHeader:
    """What the driver sees of a group."""

    policy_version: int
    prompt_tokens: int
    completion_tokens: tuple[int, ...]  # [G]: tokens of each completion
    written_tokens: tuple[int, ...]  # [G]: those of them that the model wrote
    truncated: tuple[bool, ...]  # [G]
    seconds: float  # inside the engine
    failure: str | None = None  # why trl.rollout_func did not play the group to its end, for a person


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a snapshot's buckets."""

    name: str  # as in a file of PEFT, base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, or of transformers
    dtype: str  # torch's name without the prefix, such as float32
    shape: tuple[int, ...]
    offset: int  # bytes, in its bucket
    nbytes: int
    bucket: int = 0


@dataclass(frozen=True)
class SnapshotHeader:
    """A published policy without its bytes: version, manifest, digest, and what the trainer says of the probe."""

    version: int
    base_model: str  # as in the configuration
    rank: int  # of LoRA; 0 = the policy is all of the model's weights
    scaling: float  # of B A: alpha / r, or alpha / sqrt(r); 0 without LoRA
    entries: tuple[TensorEntry, ...]
    nbytes: int  # of all buckets
    digest: str  # snapshot.joined of all buckets
    probe_logprobs: tuple[float, ...]  # [probe tokens - 1]: log p(token | tokens before it) under this policy


@dataclass(frozen=True)
class InstallReceipt:
    """An engine's word that it serves a version, with the evidence."""

    version: int
    digest: str  # of the bytes that arrived
    probe_logprobs: tuple[float, ...]  # [probe tokens - 1], computed by the engine after the install
    seconds: float


@dataclass(frozen=True)
class TrainStats:
    """One batch of the trainer. Means are over the completion tokens that took part in the loss; NaN if there were none."""

    version: int  # of the policy after the step
    loss: float
    grad_norm: float  # before clipping; 0 when nothing was trained
    learning_rate: float
    kl: float  # NaN when beta is 0: it is not computed then
    entropy: float  # nats
    clip_fraction: float
    importance_ratio: float  # mean truncated ratio of trainer to engine probability
    engine_gap: float  # mean absolute difference of trainer's and engine's log-probability
    trained_completions: int
    trained_tokens: int  # completion tokens in the loss
    computed_tokens: int  # positions that went through the model
    left_out: int  # optimizer steps left out because loss or gradient was not finite


@dataclass(frozen=True)
class Scores:
    """What one reward function says of one group."""

    function: str
    rewards: tuple[float | None, ...]  # [G]; None = the function does not apply to that completion
    failure: str | None  # why there are none, for a person; rewards is then empty
