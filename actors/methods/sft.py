"""Supervised fine-tuning: cross entropy on the tokens that the rows' labels name."""

from typing import Any

from actors.methods.base import Inputs, PreparedRows, SafeCheckpoints


def build(inputs: Inputs) -> Any:
    """Rows: input_ids, labels; packed ones also seq_lengths, the length of each document."""
    from trl import SFTConfig, SFTTrainer

    class Trainer(PreparedRows, SafeCheckpoints, SFTTrainer):  # type: ignore[misc]
        pass

    arguments = {
        "max_length": None,
        # Packed or not, the rows are as long as they may be; padding_free only says that documents are told apart by
        # their positions instead of an attention mask.
        "padding_free": inputs.packed,
        "model_init_kwargs": inputs.model_init,
        **inputs.arguments,
    }
    return Trainer(
        model=inputs.model,
        args=SFTConfig(**arguments),
        **inputs.for_trainer(),
    )
