"""An adapter and its base model as one model, which loads with transformers alone."""

from pathlib import Path
from typing import Any

import torch

from actors import adapter, hub, model
from actors.errors import CheckpointError
from actors.specs import ModelSpec


def merge(base: ModelSpec, folder: Path, target: Path) -> str:
    """Writes the merged model and its tokenizer into `target`; returns the name of transformers' class that loads it.

    base: as it was trained, except that it is never quantized here. folder: the adapter, and the tokenizer if it was saved.
    Raises CheckpointError when the adapter is damaged or does not belong to this base model.
    """
    config = adapter.read_config(folder)
    task = "SEQ_CLS" if config.task_type == "SEQ_CLS" else "CAUSAL_LM"
    tokenizer = tokenizer_of(base, folder)
    plain = _loaded(base, task)
    tied = _tied(plain)
    merged = _merged(_with_adapter(plain, config, folder), getattr(torch, base.dtype))
    if tied and not _tied(merged):  # the adapter changed one of the two
        merged.config.tie_word_embeddings = False
    if task == "SEQ_CLS":
        merged.config.pad_token_id = tokenizer.pad_token_id  # the reward is read off the last token that is none
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(model.auto_class(task).__name__)


def tokenizer_of(base: ModelSpec, folder: Path) -> Any:
    """The tokenizer that was saved with a result, or its base model's. Raises CheckpointError for one that is damaged."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return model.load_tokenizer(base)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=base.trust_remote_code)
    except Exception as error:  # tokenizers raises bare ones
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({error}); use another copy of it") from error


def _loaded(base: ModelSpec, task: str) -> Any:
    """The base model on the CPU, each weight read once: transformers fills a model without memory of its own."""
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    return model.auto_class(task).from_pretrained(
        hub.resolve(base.name), dtype=getattr(torch, base.dtype), trust_remote_code=base.trust_remote_code, **labels
    )


def _with_adapter(plain: Any, config: Any, folder: Path) -> Any:
    """A PeftModel with the adapter's weights, which must be those that the base model has a place for."""
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        policy = get_peft_model(plain, config)
    except ValueError as error:  # none of its modules are in the model
        raise CheckpointError(f"{folder}: the adapter does not belong to this base_model: {error}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.lora_tensors(policy).items()}
    tensors = adapter.load(folder, expected)
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    if _tied(plain) and any(isinstance(layer, BaseTunerLayer) for layer in (head, embeddings)):
        layer = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    set_peft_model_state_dict(policy, tensors)
    return policy


def _merged(policy: Any, dtype: torch.dtype) -> Any:
    """The base model with the adapter in its weights: W + B A is summed in fp32, a layer at a time, and rounded once."""
    from peft.tuners.lora import LoraLayer

    with torch.no_grad():
        for layer in policy.modules():
            if isinstance(layer, LoraLayer):
                weights = layer.get_base_layer()
                weights.float()
                layer.merge()
                weights.to(dtype)
    return policy.merge_and_unload()


def _tied(plain: Any) -> bool:
    head, embeddings = plain.get_output_embeddings(), plain.get_input_embeddings()
    return head is not None and head.weight.data_ptr() == embeddings.weight.data_ptr()
