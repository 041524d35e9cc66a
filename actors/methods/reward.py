"""A reward model: one number a conversation, higher for the better one of a pair (Bradley-Terry)."""

from typing import Any

from actors.methods.base import ExactSums, Inputs, PreparedRows, SafeCheckpoints


def build(inputs: Inputs) -> Any:
    """Rows: prompt_ids, chosen_ids, rejected_ids. The head that gives the number is trained with the adapter."""
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    class Trainer(PreparedRows, ExactSums, SafeCheckpoints, RewardTrainer):  # type: ignore[misc]
        pass

    class Whole(DataCollatorForPreference):  # type: ignore[misc]
        """The reward is of the whole conversation, so the prompt goes in front of each answer."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            sides = ("chosen_ids", "rejected_ids")
            return super().torch_call(  # type: ignore[no-any-return]
                [{side: list(row["prompt_ids"]) + list(row[side]) for side in sides} for row in examples]
            )

    return Trainer(
        model=inputs.model,
        args=RewardConfig(
            max_length=None, remove_unused_columns=False, model_init_kwargs=inputs.model_init, **inputs.arguments
        ),
        data_collator=Whole(pad_token_id=inputs.tokenizer.pad_token_id),
        **inputs.for_trainer(),
    )
