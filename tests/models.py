"""config.json of models as their makers publish them, as far as it decides a size, and jobs on them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.schema import DatasetConfig, JobConfig


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, words: int, *, tied: bool) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "tie_word_embeddings": tied,
    }


def _llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    shape = _qwen(hidden, inner, layers, heads, 8, 128256, tied=False)
    return {**shape, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}


CONFIGS: Mapping[str, dict[str, Any]] = {
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936, tied=True),
    "Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2, 151936, tied=True),
    "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, 152064, tied=False),
    "Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8, 152064, tied=False),
    "Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8, 152064, tied=False),
    "Qwen2.5-72B": _qwen(8192, 29568, 80, 64, 8, 152064, tied=False),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64),
}


def save_configs(folder: Path) -> dict[str, str]:
    """Writes them; returns the folder of each."""
    for name, content in CONFIGS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(content))
    return {name: str(folder / name) for name in CONFIGS}


def model_job(folder: str, adapter: str | None, **changes: Any) -> JobConfig:
    """A job on a model; changes: fields, those of a section with its name and two underscores in front."""
    config = JobConfig(base_model=folder, learning_rate=1e-4, datasets=[DatasetConfig(path="rows.jsonl", type="chat_template")])
    if adapter:
        config.adapter, config.lora_r, config.lora_alpha, config.lora_target_linear = adapter, 16, 32, True
        config.load_in_4bit = adapter == "qlora"
    if changes.get("rl") == "grpo":
        config.datasets, config.trl.reward_funcs, config.trl.beta = [DatasetConfig(path="rows.jsonl")], ["a.b"], 0.0
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(config, section) if section else config, key, value)
    return config
