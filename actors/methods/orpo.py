"""Odds ratio preference optimization (arXiv:2403.07691): fine-tuning and preference in one stage, without a reference."""

from dataclasses import replace
from typing import Any

from actors.formats.base import IGNORED
from actors.methods.base import ExactSums, Inputs, SafeCheckpoints


def build(inputs: Inputs) -> Any:
    """Rows: prompt_ids, chosen_ids, rejected_ids."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding

    class Trainer(ExactSums, SafeCheckpoints, ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    class Sequences(DPODataCollatorWithPadding):  # type: ignore[misc]
        def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
            return super().__call__([columns(feature) for feature in features])  # type: ignore[no-any-return]

    # ORPOTrainer copies its rows to disk three times, in one process, before it trains. It gets one row to do that to.
    trainer = Trainer(
        model=load_policy(inputs),
        args=ORPOConfig(remove_unused_columns=False, **inputs.arguments),
        data_collator=Sequences(pad_token_id=inputs.tokenizer.pad_token_id),
        **replace(inputs, train=first(inputs.train), held_out=inputs.held_out and first(inputs.held_out)).for_trainer(),
    )
    trainer.use_dpo_data_collator = True  # it stands for the columns, which are those of TRL's own collator
    trainer.train_dataset, trainer.eval_dataset = inputs.train, inputs.held_out
    return trainer


def first(rows: Any) -> Any:
    return rows.select(range(1))


def load_policy(inputs: Inputs) -> Any:
    """The model, loaded here, because ORPOTrainer would spread it over devices by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(inputs.model, **inputs.model_init)


def columns(row: dict[str, Any]) -> dict[str, list[int]]:
    """A prepared pair as TRL's collator wants it: whole sequences, with labels on the answers alone."""
    prompt = list(row["prompt_ids"])
    out = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = list(row[f"{side}_ids"])
        out[f"{side}_input_ids"] = prompt + answer
        out[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
        out[f"{side}_labels"] = [IGNORED] * len(prompt) + answer
    return out
