"""Odds ratio preference optimization (arXiv:2403.07691): fine-tuning and preference in one stage, without a reference."""

from typing import Any

from actors.methods.base import Inputs, SafeCheckpoints

IGNORED = -100


def build(inputs: Inputs) -> Any:
    """Rows: prompt_ids, chosen_ids, rejected_ids."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Trainer(SafeCheckpoints, ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return columns(feature)

    return Trainer(
        model=load_policy(inputs),
        args=ORPOConfig(**inputs.arguments),
        train_dataset=inputs.train,
        eval_dataset=inputs.held_out,
        processing_class=inputs.tokenizer,
        peft_config=inputs.peft_config,
        callbacks=inputs.callbacks,
    )


def load_policy(inputs: Inputs) -> Any:
    """The model, loaded here, because ORPOTrainer would spread it over devices by itself."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(inputs.model, **inputs.model_init)


def columns(row: dict[str, Any]) -> dict[str, list[int]]:
    """A prepared pair as ORPOTrainer's collator wants it: whole sequences, with labels on the answers alone."""
    prompt = list(row["prompt_ids"])
    out = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = list(row[f"{side}_ids"])
        out[f"{side}_input_ids"] = prompt + answer
        out[f"{side}_attention_mask"] = [1] * (len(prompt) + len(answer))
        out[f"{side}_labels"] = [IGNORED] * len(prompt) + answer
    return out
