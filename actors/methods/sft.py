"""Supervised fine-tuning: cross entropy on the tokens that the rows' labels name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors import attention
from actors.head import FusedHead
from actors.methods.base import ExactSums, Inputs, PreparedRows, SafeCheckpoints


def build(inputs: Inputs) -> Any:
    """Rows: input_ids, labels; packed ones also seq_lengths, the length of each document."""
    from trl import SFTConfig, SFTTrainer

    class Trainer(PreparedRows, FusedHead, ExactSums, SafeCheckpoints, SFTTrainer):  # type: ignore[misc]
        pass

    arguments = {
        "max_length": None,
        # Packed or not, the rows are as long as they may be; padding_free only says that the packs of a pass become one row,
        # whose documents are told apart by their positions, or by `packed` below, instead of an attention mask.
        "padding_free": inputs.packed,
        "model_init_kwargs": inputs.model_init,
        **inputs.arguments,
    }
    trainer = Trainer(
        model=inputs.model,
        args=SFTConfig(**arguments),
        **inputs.for_trainer(),
    )
    if inputs.model_init.get("attn_implementation") == attention.NAME:
        trainer.data_collator = _with_documents(trainer.data_collator)
    return trainer


def _with_documents(collate: Callable[..., dict[str, Any]]) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """TRL's collator, whose packs lie one after the other in one row; and for attention, where their documents lie.

    Held-out rows may be a document each.
    """

    def collated(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lengths = [length for row in rows for length in row.get("seq_lengths") or [len(row["input_ids"])]]
        return {**collate(rows), "packed": attention.documents(lengths)}

    return collated
