"""The policy: base model with LoRA, and the log-probabilities of packed rows.

The base is frozen, in the job's dtype; LoRA parameters are fp32. The reference policy is the same model with the
adapter switched off.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from actors import device, hub
from actors.errors import ConfigError
from actors.packing import PackedRow
from actors.specs import LoraSpec, ModelSpec


def load_tokenizer(model: ModelSpec) -> Any:
    """The model's tokenizer, from the same folder as its weights."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hub.resolve(model.name), trust_remote_code=model.trust_remote_code)


def peft_config(lora: LoraSpec) -> Any:
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )


def scaling(lora: LoraSpec) -> float:
    """Factor of B A: alpha / r (arXiv:2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    return float(lora.alpha / lora.r**0.5 if lora.use_rslora else lora.alpha / lora.r)


def load_policy(model: ModelSpec, lora: LoraSpec, *, gradient_checkpointing: bool) -> Any:
    """A PeftModel on this process's device. Raises ConfigError when the adapter's targets are not in the model."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    kwargs = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    base = AutoModelForCausalLM.from_pretrained(
        hub.resolve(model.name),
        dtype=getattr(torch, model.dtype),
        trust_remote_code=model.trust_remote_code,
        **kwargs,
    ).to(device.device())
    base.config.use_cache = False
    if gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    try:
        policy = get_peft_model(base, peft_config(lora))
    except ValueError as error:
        raise ConfigError(f"lora_target_modules: {error}") from error
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return policy


def lora_tensors(policy: Any) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT writes to a file, on their device, not copied."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(policy))


def expected_lora_shapes(model: ModelSpec, lora: LoraSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of each LoRA tensor, from the model's config.json alone: no weights are read."""
    from peft import get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(hub.resolve(model.name), trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        policy = get_peft_model(base, peft_config(lora))
    return {name: tuple(tensor.shape) for name, tensor in lora_tensors(policy).items()}


def row_logits(policy: Any, row: PackedRow) -> Tensor:
    """Logits [K, V] fp32 at the row's kept positions only: the prompt's are never computed."""
    dtype = next(policy.parameters()).dtype
    out = policy(
        input_ids=row.input_ids,
        position_ids=row.position_ids,
        attention_mask=row.attention_mask(dtype),
        logits_to_keep=row.keep,
        use_cache=False,
    )
    logits: Tensor = out.logits[0].float()
    return logits


def completion_logprobs(logits_KV: Tensor, row: PackedRow, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] of the row's completion tokens at `temperature`, and entropies [B, T] in nats.

    The entropies take no gradient. Values at padding mean nothing.
    """
    logits_KV = logits_KV / temperature
    log_norm_K = torch.logsumexp(logits_KV, -1)
    logprobs_BT = logits_KV[row.predicts_BT, row.completion_ids_BT] - log_norm_K[row.predicts_BT]
    with torch.no_grad():
        # H = log Z - E[logit]
        entropy_K = log_norm_K - (torch.exp(logits_KV - log_norm_K[:, None]) * logits_KV).sum(-1)
    return logprobs_BT, entropy_K[row.predicts_BT]


@torch.no_grad()
def sequence_logprobs(policy: Any, token_ids: Sequence[int]) -> list[float]:
    """log p(token | tokens before it) at temperature 1 for all but the first token of one sequence."""
    ids = torch.tensor([list(token_ids)], device=next(policy.parameters()).device)
    logits = policy(input_ids=ids, use_cache=False).logits[0, :-1].float()
    chosen = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
    return [float(x) for x in chosen]
