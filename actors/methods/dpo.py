"""Direct preference optimization (arXiv:2305.18290), and IPO (arXiv:2310.12036) as one of its losses."""

from typing import Any

from actors.head import FusedHead
from actors.methods.base import ExactSums, Inputs, PreparedRows, SafeCheckpoints


def build(inputs: Inputs) -> Any:
    """Rows: prompt_ids, chosen_ids, rejected_ids. The reference is the policy at the start of training."""
    from trl import DPOConfig, DPOTrainer

    class Trainer(PreparedRows, FusedHead, ExactSums, SafeCheckpoints, DPOTrainer):  # type: ignore[misc]
        pass

    return Trainer(
        model=inputs.model,
        args=DPOConfig(max_length=None, model_init_kwargs=inputs.model_init, **inputs.arguments),
        **inputs.for_trainer(),
    )
