"""Kahneman-Tversky optimization (arXiv:2402.01306): answers that were liked or not, without pairs."""

from typing import Any

from actors.head import FusedHead
from actors.methods.base import ExactSums, Inputs, PreparedRows, SafeCheckpoints


def build(inputs: Inputs) -> Any:
    """Rows: prompt_ids, completion_ids, label. The reference is the policy at the start of training."""
    from trl import KTOConfig, KTOTrainer
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    class Trainer(PreparedRows, FusedHead, ExactSums, SafeCheckpoints, KTOTrainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            # KTO's own order is that of the rows, because its mismatched pairs are made before training; here they are
            # made of each batch, so the rows may be shuffled.
            return super(KTOTrainer, self)._get_train_sampler(train_dataset)

    class Mismatched(DataCollatorForUnpairedPreference):  # type: ignore[misc]
        """Gives each prompt the answer of the row before it, to estimate the KL term (section 4.1 of the paper)."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            answers = [example["completion_ids"] for example in examples]
            others = [answers[-1], *answers[:-1]]
            return super().torch_call(  # type: ignore[no-any-return]
                [{**example, "KL_completion_ids": other} for example, other in zip(examples, others, strict=True)]
            )

    return Trainer(
        model=inputs.model,
        args=KTOConfig(max_length=None, model_init_kwargs=inputs.model_init, **inputs.arguments),
        data_collator=Mismatched(pad_token_id=inputs.tokenizer.pad_token_id),
        **inputs.for_trainer(),
    )
