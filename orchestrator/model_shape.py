"""What a model's config.json alone tells of its size: how many weights lie where, and what of them is trained or quantized.

The model is built on the meta device, by the code that a job builds it with: no weight is read, and 70B take a second.
"""

import functools
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch

from actors import hub, model
from actors.attention import first_layers
from actors.errors import ConfigError
from actors.specs import LoraSpec


@dataclass(frozen=True)
class ModelSource:
    """Where a model's config.json is, and what is made of it."""

    name: str  # a folder, or a name on the hub
    trust_remote_code: bool = False
    task: str = "CAUSAL_LM"  # PEFT's name: CAUSAL_LM or SEQ_CLS


@dataclass(frozen=True)
class ModelShape:
    """Numbers of weights, not bytes; of the base model, but for `trained`."""

    layers: int
    hidden: int
    vocabulary: int
    intermediate: int
    heads: int  # of attention
    kv_heads: int
    head_dim: int
    weights: int  # all; tied ones once
    in_layers: int  # of all decoder layers
    embedding: int
    head: int  # of the language model's own head; 0 = it is the embedding, or there is none
    quantizable: int  # what bitsandbytes quantizes
    quantizable_rows: int  # output features of these
    largest: int  # the largest one of these
    trained: int  # by the job: the adapter's, or all

    @property
    def kv_per_token(self) -> int:
        """Numbers that a token leaves in the KV cache: a key and a value of each KV head of each layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@functools.lru_cache(maxsize=32)
def read_config(source: ModelSource) -> Any:
    """transformers' configuration of a model; not to be changed. Raises ConfigError when it cannot be had or understood."""
    from transformers import AutoConfig

    folder = hub.resolve(source.name, weights=False)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"base_model: {folder}/config.json cannot be read: {str(error).splitlines()[0]}") from error


@functools.lru_cache(maxsize=32)
def read_shape(source: ModelSource, lora: LoraSpec | None) -> ModelShape:
    """The shape of a model and of what is trained of it; lora: None = all weights. Raises ConfigError."""
    from transformers.quantizers.base import get_keys_to_not_convert

    text = read_config(source).get_text_config()
    base = build(source, "bfloat16")
    weights = sum(p.numel() for p in base.parameters())
    layers = max((m for m in base.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings()
    left = set(get_keys_to_not_convert(base))
    linear = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name not in left]
    heads = int(text.num_attention_heads)
    shape = {
        "layers": int(text.num_hidden_layers),
        "hidden": int(text.hidden_size),
        "vocabulary": int(text.vocab_size),
        "intermediate": int(getattr(text, "intermediate_size", None) or 4 * text.hidden_size),
        "heads": heads,
        "kv_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        "weights": weights,
        "in_layers": sum(p.numel() for p in layers.parameters()),
        "embedding": embedding.numel(),
        "head": 0 if head is None or head.weight is embedding else head.weight.numel(),
        "quantizable": sum(m.weight.numel() for m in linear),
        "quantizable_rows": sum(m.out_features for m in linear),
        "largest": max((m.weight.numel() for m in linear), default=0),
    }
    if lora is None:
        return ModelShape(**shape, trained=weights)
    adapted = with_adapter(base, lora, source.task)
    return ModelShape(**shape, trained=sum(p.numel() for p in adapted.parameters() if p.requires_grad))


def build(source: ModelSource, dtype: str, attention: str | None = None, layers: int | None = None) -> Any:
    """The model without weights. attention: by transformers' name. layers: the first so many of it; None = all."""
    whole = read_config(source)
    config = deepcopy(whole) if layers is None else first_layers(whole, layers)
    if source.task == "SEQ_CLS":
        config.num_labels = 1
    with torch.device("meta"):
        return model.auto_class(source.task).from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=source.trust_remote_code,
        )


def with_adapter(base: Any, lora: LoraSpec, task: str) -> Any:
    """A new adapter on a model without weights. Raises ConfigError when its targets are not in the model."""
    from peft import get_peft_model

    try:
        with torch.device("meta"):
            return get_peft_model(base, model.peft_config(lora, task))
    except ValueError as error:
        raise ConfigError(f"lora_target_modules: {error}") from error
