"""What tests of the worker side share: tiny Llamas on disk, arguments of a short training, rollout groups of random tokens,
adapters that matter.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from actors import hub
from actors.model import auto_class
from actors.specs import LoraSpec, LossSpec, ModelSpec, OptimizerSpec, TrainerSpec
from actors.types import RolloutGroup

VOCAB = 48
SMOLLM2 = ModelSpec("HuggingFaceTB/SmolLM2-135M-Instruct", "float32")


def save_llama(folder: Path) -> str:
    """A random Llama of VOCAB tokens with grouped heads and its tokenizer; returns the folder's name."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_reward_llama(folder: Path, labels: int = 1) -> str:
    """A random classifier of the shape of `save_llama`'s model, with its tokenizer and a chat template."""
    save_llama(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ 'w3 ' + m['content'] + ' w4 ' }}{% endfor %}{{ ending or 'w5' }}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(folder, num_labels=labels)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def save_smollm2_llama(folder: Path, **shape: Any) -> str:
    """A tiny random Llama with SmolLM2's tokenizer; returns the folder's name. shape: fields of LlamaConfig."""
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2.name))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **shape,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def training_arguments(out: Path | str, **changes: Any) -> dict[str, Any]:
    """Of TRL's trainers: fp32 on the CPU, a record each step, nothing on disk but what `changes` asks for."""
    return {
        "output_dir": str(out),
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def random_group(prompt: int, completions: Sequence[int], *, seed: int, vocab: int = VOCAB) -> RolloutGroup:
    """A group with a prompt of `prompt` tokens and completions of the given lengths, all random."""
    rng = np.random.default_rng(seed)
    return RolloutGroup(
        policy_version=0,
        prompt_ids=rng.integers(3, vocab, prompt, dtype=np.int32),
        completion_ids=tuple(rng.integers(3, vocab, n, dtype=np.int32) for n in completions),
        logprobs=tuple(rng.normal(-4.0, 0.5, n).astype(np.float32) for n in completions),
        truncated=(False,) * len(completions),
        texts=tuple(f"completion {i}" for i in range(len(completions))),
    )


def fill_adapter(policy: Any, *, seed: int, size: float) -> None:
    """Gives every LoRA B, which starts at zero, random values of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def published(trainer: Any) -> tuple[Any, ...]:
    """What a trainer publishes, as an engine gets it: the header, and copies of the buckets."""
    *buckets, header = (part.copy() if isinstance(part, np.ndarray) else part for part in trainer.publish())
    return (header, *buckets)


def load_plain(folder: Path | str, task: str = "CAUSAL_LM") -> Any:
    """The model in a folder, in fp32; for SEQ_CLS with a new head of one number, the same each time."""
    torch.manual_seed(3)
    kwargs = {"num_labels": 1} if task == "SEQ_CLS" else {}
    return auto_class(task).from_pretrained(folder, dtype=torch.float32, **kwargs)


def save_adapter(base: Path | str, folder: Path, task: str = "CAUSAL_LM", **lora: Any) -> None:
    """An adapter that matters, made by PEFT alone: all that is trained is moved at random. lora: fields of LoraConfig."""
    policy = get_peft_model(load_plain(base, task), LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": task, **lora}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    policy.save_pretrained(folder)


def alone_logprobs(policy: Any, group: RolloutGroup, index: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [T] of one completion and logits [T, V] at temperature, from a plain forward pass.

    The sequence is prompt and completion and nothing else: no mask, no positions, no packing.
    """
    ids = torch.tensor([[*group.prompt_ids.tolist(), *group.completion_ids[index].tolist()]])
    logits = policy(input_ids=ids, use_cache=False).logits[0].float() / temperature
    logits_TV = logits[len(group.prompt_ids) - 1 : -1]
    completion_T1 = ids[0, len(group.prompt_ids) :, None]
    return torch.log_softmax(logits_TV, -1).gather(-1, completion_T1)[:, 0], logits_TV


def trainer_spec(
    folder: str,
    *,
    optimizer: OptimizerSpec | None = None,
    loss: LossSpec | None = None,
    dropout: float = 0.0,
    temperature: float = 1.0,
    micro_batch_size: int = 3,
    num_iterations: int = 1,
    mask_truncated_completions: bool = False,
) -> TrainerSpec:
    """A trainer of the tiny model, its gradient never clipped unless asked."""
    return TrainerSpec(
        model=ModelSpec(folder, "float32"),
        lora=LoraSpec(r=4, alpha=8, dropout=dropout),
        optimizer=optimizer or OptimizerSpec(1e-2, "constant", 0, 10, max_grad_norm=1e9),
        loss=loss or LossSpec(max_completion_length=8),
        micro_batch_size=micro_batch_size,
        temperature=temperature,
        num_iterations=num_iterations,
        mask_truncated_completions=mask_truncated_completions,
    )
