"""The policy: base model with LoRA, or all of its weights; and the log-probabilities of packed rows.

With LoRA the base is frozen, in the job's dtype, and LoRA's parameters are fp32; the reference policy is the same model with
the adapter switched off, or with the adapter that training started from. Without, the weights are trained in the job's dtype.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors import adapter, attention, device, head, hub
from actors.errors import ConfigError
from actors.packing import PackedRow
from actors.specs import LoraSpec, ModelSpec


def import_libraries() -> None:
    """Of what `load_policy` imports, which takes seconds, all that does not look at GPUs, as bitsandbytes does for PEFT."""
    import_module("transformers.models.auto.modeling_auto")


def load_tokenizer(model: ModelSpec) -> Any:
    """The model's tokenizer, with the special tokens and the template of the job. Raises ConfigError when there is none."""
    from transformers import AutoTokenizer

    folder, special_tokens = hub.resolve(model.name, weights=False), dict(model.special_tokens)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code, **special_tokens)
    except (OSError, ValueError) as error:
        text = f"base_model: {folder} holds no tokenizer that transformers can load ({str(error).splitlines()[0]})"
        raise ConfigError(f"{text}; put the files of its tokenizer there") from error
    if model.chat_template is not None:
        tokenizer.chat_template = model.chat_template  # so that whoever uses the result writes as it was trained
    return tokenizer


def attention_window(model: ModelSpec) -> int | None:
    """Tokens that the layers with the shortest view look back; None = all of them. Of the model's config.json.

    Raises ConfigError for a model that packed rows are not for, as far as that file tells.
    """
    config = _config(model).get_text_config()
    attention.ensure_can_pack(config, model.name)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)  # a model of one kind may have none
    return int(window) if window and (kinds is None or "sliding_attention" in kinds) else None


def takes_documents(model: ModelSpec) -> bool:
    """Whether packed documents go through attention.attend."""
    return attention.takes_documents(_config(model))


def _config(model: ModelSpec) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(hub.resolve(model.name), trust_remote_code=model.trust_remote_code)


def task_of(method: str | None) -> str:
    """PEFT's name of what a method trains: a reward model is a sequence classifier."""
    return "SEQ_CLS" if method == "reward_trainer" else "CAUSAL_LM"


def auto_class(task: str) -> Any:
    """transformers' class that loads a base model for one of PEFT's tasks."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM


def peft_config(lora: LoraSpec, task: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration of the adapter. task: PEFT's name of it, CAUSAL_LM or SEQ_CLS."""
    from peft import LoraConfig

    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type=task,
    )


def quantization(model: ModelSpec) -> Any:
    """bitsandbytes' configuration: NF4 with double quantization (QLoRA, arXiv:2305.14314), or LLM.int8()."""
    from transformers import BitsAndBytesConfig

    if model.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, model.dtype),
        # FSDP2 shards what looks like floating-point numbers only.
        bnb_4bit_quant_storage=getattr(torch, model.dtype) if model.sharded else None,
    )


def keep_gradients(base: Any) -> None:
    """Keeps gradients flowing through 4-bit layers on CPUs, also after a forward pass without any.

    On a processor with AVX512-BF16 bitsandbytes 0.50 packs the weights anew at the first pass in evaluation mode, for a
    kernel that has no backward pass, and never unpacks them: what is trained then is silently cut off from the loss.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantized_weights(model: ModelSpec) -> frozenset[str]:
    """Names of the weights that bitsandbytes quantizes, from the model's config.json alone; none without `quantization`."""
    from transformers import AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    if model.quantization is None:
        return frozenset()
    config = _config(model)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    left = set(get_keys_to_not_convert(base))
    linear = (name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear))
    return frozenset(f"{name}.weight" for name in linear if name not in left)


def rank_and_scaling(lora: LoraSpec | None) -> tuple[int, float]:
    """As a snapshot's header has them: zeros where there is no LoRA."""
    return (lora.r, scaling(lora)) if lora else (0, 0.0)


def scaling(lora: LoraSpec) -> float:
    """Factor of B A: alpha / r (arXiv:2106.09685), or alpha / sqrt(r) (rsLoRA, arXiv:2312.03732)."""
    return float(lora.alpha / lora.r**0.5 if lora.use_rslora else lora.alpha / lora.r)


def load_policy(
    model: ModelSpec,
    lora: LoraSpec | None,
    *,
    gradient_checkpointing: bool,
    reference: bool = False,
    temperature: float = 1.0,
) -> Any:
    """A PeftModel on this process's device, or the model itself without `lora`.

    temperature: of `completion_logprobs`. reference: whether adapter.as_reference will be asked for. Raises ConfigError when
    the adapter's targets are not in the model, or are its head.
    """
    base = load_base(model, temperature)
    if gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    return base if lora is None else with_lora(base, lora, reference=reference)


def load_base(model: ModelSpec, temperature: float = 1.0) -> Any:
    """The model as it is published, on this process's device.

    With what `completion_logprobs` needs: attention that knows packed rows, and TRL's fused head at a temperature.
    """
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    kwargs: dict[str, Any] = {}
    attention.register()
    if model.quantization:
        kwargs = {"quantization_config": quantization(model), "device_map": {"": device.device()}}
    base = AutoModelForCausalLM.from_pretrained(
        hub.resolve(model.name),
        dtype=getattr(torch, model.dtype),
        trust_remote_code=model.trust_remote_code,
        attn_implementation=attention.NAME,
        **kwargs,
    )
    attention.ensure_told(base, model.name)
    if model.quantization:
        keep_gradients(base)
    elif not model.sharded:  # a whole model of shards may not fit on one device
        base.to(device.device())
    base.config.use_cache = False
    head.ensure_plain(base, model.name)
    add_fused_lm_head(base, temperature, outputs=("log_probs", "entropy"))
    return base


def with_lora(base: Any, lora: LoraSpec, *, reference: bool = False) -> Any:
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    try:
        policy = get_peft_model(base, peft_config(lora))
    except ValueError as error:
        raise ConfigError(f"lora_target_modules: {error}") from error
    if isinstance(base.get_output_embeddings(), LoraLayer):
        raise ConfigError("lora_target_modules: matches the head, whose adapter would not be trained; name layers before it")
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    take_inputs_as_they_are(policy)
    if lora.start:
        adapter.start_from(policy, lora.start, reference=reference)
    return policy


def take_inputs_as_they_are(policy: Any) -> None:
    """For a model that computes under autocast: PEFT would copy the inputs of every LoRA layer to the adapter's fp32, and
    autocast each copy back again, which is then kept for the backward pass. DoRA is left alone, since it takes the norms of
    weights in the inputs' dtype.
    """
    from peft.tuners.lora import LoraLayer

    for module in policy.modules():
        if isinstance(module, LoraLayer) and not module.lora_variant:
            module.cast_input_dtype_enabled = False


def lora_tensors(policy: Any) -> dict[str, Tensor]:
    """The adapter's tensors under the names that PEFT writes to a file, on their device, not copied."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(policy))


def trained_parameters(policy: Any) -> dict[str, Any]:
    """What is trained, by the names that PEFT, or transformers, writes to a file. As they are: whole or in shards."""
    trained = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    return {name.replace(f".{adapter.POLICY}.", "."): parameter for name, parameter in trained.items()}


def expected_shapes(model: ModelSpec, lora: LoraSpec | None, task: str = "CAUSAL_LM") -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor that is trained, from the model's config.json alone: no weights are read."""
    from peft import get_peft_model

    config = _config(model)
    if task == "SEQ_CLS":
        config.num_labels = 1
    with torch.device("meta"):
        base = auto_class(task).from_config(config, trust_remote_code=model.trust_remote_code)
        tensors = lora_tensors(get_peft_model(base, peft_config(lora, task))) if lora else trained_parameters(base)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def ensure_checkpoint_names(model: ModelSpec) -> None:
    """Raises ConfigError unless transformers calls weights as the model's own files do, which is what vLLM loads."""
    from safetensors import safe_open

    stored: set[str] = set()
    for file in hub.weight_files(Path(hub.resolve(model.name))):
        with safe_open(file, "pt") as weights:
            stored.update(weights.keys())
    if other := sorted(expected_shapes(model, None).keys() - stored):
        raise ConfigError(
            f"base_model: {model.name} has no {other[0]} in its files, where transformers keeps weights under other names, so "
            "they cannot go to the engines as they are; add adapter: lora"
        )


def completion_logprobs(policy: Any, row: PackedRow) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] fp32 of the row's completion tokens at the policy's temperature, and entropies [B, T] in nats.

    The head computes the positions that predict what the model wrote, and never all of their logits at once. The entropies take
    no gradient. Values where the row's mask is false mean nothing.
    """
    dtype = base_dtype(policy)
    with computing_in(dtype), head.kernel():
        out = policy(
            input_ids=row.input_ids,
            position_ids=row.position_ids,
            packed=row.attention(dtype),
            shift_labels=row.labels,
            fused_lm_head=True,
        )
    entropy_L = out.entropy[0].detach()  # TRL's kernel leaves it in the graph, and what sums rows up would keep theirs
    return out.log_probs[0][row.queries_BT], entropy_L[row.queries_BT]


def base_dtype(policy: Any) -> torch.dtype:
    """The dtype of the weights that LoRA leaves as they are; without LoRA of all."""
    dtype: torch.dtype = next(policy.parameters()).dtype
    return dtype


def computing_in(dtype: torch.dtype) -> torch.autocast:
    """A context in which LoRA's fp32 parameters compute in the base's dtype, as the weights that they change do.

    Without it every LoRA layer would copy its activations to fp32 and back, at several times the cost.
    """
    return torch.autocast(device.device().type, dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def sequence_logprobs(policy: Any, token_ids: Sequence[int]) -> list[float]:
    """log p(token | tokens before it) at temperature 1 for all but the first token of one sequence."""
    ids = torch.tensor([list(token_ids)], device=device.device())
    with computing_in(base_dtype(policy)):
        logits = policy(input_ids=ids, use_cache=False).logits[0, :-1].float()
    logprobs: list[float] = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
    return logprobs
