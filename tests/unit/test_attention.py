"""Which models packed rows are for, and packed documents.

What completions compute is compared with each of them alone in test_model.py, and documents in test_methods.py.
"""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    NemotronConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

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
    window = 15
    config = Qwen2Config(num_hidden_layers=2, use_sliding_window=True, sliding_window=window, max_window_layers=1, **SHAPE)
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    policy = model.load_base(ModelSpec(str(tmp_path), "float32")).eval()
    assert policy.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.attention_window(ModelSpec(str(tmp_path), "float32")) == window
    group = random_group(9, [6, 3], seed=0)
    row = pack_row([group], [Sample(0, 0, 1.0), Sample(0, 1, 1.0)])
    with torch.no_grad():
        logprobs_BT, _ = model.completion_logprobs(policy, row)
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


@pytest.mark.parametrize("lengths", [[7], [1, 1, 1], [4, 9, 5, 8, 1, 7, 2], [64, 1, 65]])
def test_documents_look_at_themselves(lengths: list[int]) -> None:
    """Against one mask over the whole row, gradients too."""
    total = sum(lengths)
    torch.manual_seed(0)
    packed = attention.documents(lengths)
    heads = [torch.randn(1, count, total, 6, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(total, total, dtype=torch.bool).tril()
    found, _ = attention.attend(module, *heads, None, packed=packed)
    expected, _ = attention.attend(module, *heads, mask[None, None])
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    grads = [torch.autograd.grad((out * weights).sum(), heads) for out in (found, expected)]
    torch.testing.assert_close(*grads)
    computed = sum(block["queries_BT"].numel() for block in packed["blocks"])
    assert total <= computed <= 1.5 * total and len(packed["blocks"]) <= 3


def test_which_models_take_documents() -> None:
    small = {"num_hidden_layers": 2, **SHAPE}
    assert attention.takes_documents(LlamaConfig(**small))
    assert attention.takes_documents(Qwen2Config(use_sliding_window=False, sliding_window=4096, **small))
    assert not attention.takes_documents(Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1, **small))
    assert attention.takes_documents(MistralConfig(sliding_window=None, **small))
    assert not attention.takes_documents(MistralConfig(sliding_window=64, **small))
    assert not attention.takes_documents(Gemma2Config(layer_types=["full_attention"] * 2, **small)), "its scores are capped"
    assert not attention.takes_documents(GptOssConfig(layer_types=["full_attention"] * 2, **small)), "sdpa is not for it"
    remote = LlamaConfig(**small, auto_map={"AutoModelForCausalLM": "code.Model"})
    assert not attention.takes_documents(remote), "its own code may do anything"


def test_models_that_do_not_hand_on_where_documents_lie_are_found() -> None:
    """Nemotron's layers drop what attention is told, and Doge's make a mask of their own beside it."""
    small = {"num_hidden_layers": 2, **SHAPE}
    for config in (NemotronConfig(**small), DogeConfig(**small)):
        assert not attention.takes_documents(config)
        model = AutoModelForCausalLM.from_config(config)
        with pytest.raises(ConfigError, match="base_model: m has attention of its own"):
            attention.ensure_told(model, "m")
