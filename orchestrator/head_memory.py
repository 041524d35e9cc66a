"""Bytes of what comes after a model's layers in training: logits, and what becomes of them. A formula a method, in `HEADS`.

Each counts what the code that it names allocates. N positions predict, of V words, from H hidden numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass

from actors import head
from orchestrator.activations import PackedRows, PaddedRows
from orchestrator.model_shape import ModelShape

FP32 = 4
TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's head on a GPU


@dataclass(frozen=True)
class Head:
    """Bytes."""

    kept: int = 0  # until the backward pass
    forward: int = 0  # beside these, the most in the forward pass
    backward: int = 0  # ... and in the backward pass
    gradient: int = 0  # of its weights


@dataclass(frozen=True)
class Task:
    """What the head has to do."""

    rows: PaddedRows | PackedRows
    shape: ModelShape
    size: int  # bytes of a logit, and of a weight where it computes
    stored: int  # bytes of a weight where it is kept
    trains: bool  # whether the head's own weights are trained
    gpu: bool

    @property
    def gradient(self) -> int:
        """Of the weights of the head, which may be the embedding's."""
        return (self.shape.head or self.shape.embedding) * self.size if self.trains else 0


def fused(task: Task) -> Head:
    """Of all language models but ORPO's: logits of some positions at a time."""
    positions = task.rows.predicting
    return tiled(task, positions) if task.gpu else cached(task, positions)


def tiled(task: Task, positions: int) -> Head:
    """TRL 1.16's (kernels/chunked_logprob.py): each tile is made twice, and worked on in place."""
    shape, size = task.shape, task.size
    tile = min(positions, TILE_TOKENS) * TILE_WORDS * size
    hidden = positions * shape.hidden
    weights = shape.head or shape.embedding if task.trains else 0
    return Head(
        kept=hidden * size,
        forward=tile,
        backward=(hidden + weights) * FP32 + tile + (hidden + weights) * size,
        gradient=task.gradient,
    )


def cached(task: Task, positions: int) -> Head:
    """Ours (actors/head.py): a frozen head keeps something of the hidden states' size, one that is trained those themselves."""
    shape, size = task.shape, task.size
    at_once, in_cache = (min(positions, max(1, n // shape.vocabulary)) for n in (head.LOGITS_AT_ONCE, head.FP32_LOGITS_AT_ONCE))
    tile = at_once * shape.vocabulary * size
    scratch = in_cache * shape.vocabulary * FP32
    hidden = positions * shape.hidden
    weights = shape.head or shape.embedding
    recast = weights * size if task.stored != size else 0
    backward = 2 * hidden * FP32
    if task.trains:
        words = min(head.WORDS_AT_ONCE, shape.vocabulary)
        product = words * shape.hidden * size
        if size != FP32:  # torch copies the product to fp32, and the slopes that it multiplies
            product += words * (shape.hidden * FP32 + at_once * size)
        rounded = weights * task.stored if task.stored != FP32 else 0
        backward = recast + hidden * size + weights * FP32 + max(tile + 2 * scratch + product, rounded)
    return Head(
        kept=hidden * size,
        forward=recast + hidden * size + tile + 3 * scratch,
        backward=backward,
        gradient=task.gradient,
    )


def whole_logits(task: Task) -> Head:
    """TRL 1.16's ORPO (experimental/orpo): all logits in fp32, once more those of the chosen half, and their gradients."""
    assert isinstance(task.rows, PaddedRows)
    logits = task.rows.tokens * task.shape.vocabulary * FP32
    return Head(kept=3 * logits // 2, forward=logits // 2, backward=2 * logits, gradient=task.gradient)


def one_number(task: Task) -> Head:
    """A reward model's: a number a position."""
    return Head()


HEADS: dict[str | None, Callable[[Task], Head]] = {
    None: fused,
    "dpo": fused,
    "ipo": fused,
    "kto": fused,
    "orpo": whole_logits,
    "reward_trainer": one_number,
    "grpo": fused,
}
