"""Which models packed rows are for. What they compute is compared with each completion alone in test_model.py."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen2ForCausalLM

from actors import attention, model
from actors.errors import ConfigError
from actors.packing import Sample, pack_row
from actors.specs import ModelSpec
from tests.tiny import VOCAB, alone_logprobs, random_group

SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_layers_through_which_completions_would_meet_are_refused() -> None:
    llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SHAPE))
    attention.ensure_can_pack(llama.config, "a llama")
    attention.ensure_told(llama, "a llama")
    llama.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="base_model: a hybrid has layers of the kind linear_attention"):
        attention.ensure_can_pack(llama.config, "a hybrid")
    llama.config.layer_types = None
    llama.config.attn_logit_softcapping = 50.0
    with pytest.raises(ConfigError, match="base_model: a gemma caps its attention's scores"):
        attention.ensure_can_pack(llama.config, "a gemma")
    llama._supports_attention_backend = False
    with pytest.raises(ConfigError, match="base_model: its own has attention of its own"):
        attention.ensure_told(llama, "its own")


def test_a_window_that_holds_a_sequence_changes_nothing(tmp_path: Path) -> None:
    """Of a model whose second layer looks back so far as prompt and completion reach."""
    attention.register()
    window = 15
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=window, max_window_layers=1, **SHAPE)
    torch.manual_seed(0)
    policy = Qwen2ForCausalLM(config).eval()
    policy.save_pretrained(tmp_path)
    assert policy.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.attention_window(ModelSpec(str(tmp_path), "float32")) == window
    group = random_group(9, [6, 3], seed=0)
    row = pack_row([group], [Sample(0, 0, 1.0), Sample(0, 1, 1.0)])
    with torch.no_grad():
        policy.set_attn_implementation(attention.NAME)
        logprobs_BT, _ = model.completion_logprobs(model.row_logits(policy, row), row, 1.0)
        policy.set_attn_implementation("eager")
        for i in range(2):
            alone_T, _ = alone_logprobs(policy, group, i, 1.0)
            torch.testing.assert_close(logprobs_BT[i, : len(alone_T)], alone_T, atol=1e-5, rtol=1e-5)


def test_a_model_of_one_kind_of_layer_may_have_a_window(tmp_path: Path) -> None:
    MistralConfig(sliding_window=64, num_hidden_layers=1, **SHAPE).save_pretrained(tmp_path)
    assert model.attention_window(ModelSpec(str(tmp_path), "float32")) == 64


def test_a_model_that_sees_everything_has_no_window(tmp_path: Path) -> None:
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **SHAPE)).save_pretrained(tmp_path)
    assert model.attention_window(ModelSpec(str(tmp_path), "float32")) is None
