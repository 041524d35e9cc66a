"""The weights that an engine loads: those that the trainer computes with, to the last bit of rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from actors import model
from actors.install import BaseWeights, merged_weights
from actors.specs import LoraSpec, ModelSpec
from tests.tiny import fill_adapter, save_smollm2_llama

LORA = LoraSpec(r=4, alpha=8)
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_smollm2_llama(tmp_path_factory.mktemp("llama"), tie_word_embeddings=request.param, **SHAPE)


def by_the_trainer(module: Any) -> torch.Tensor:
    """What a layer of bitsandbytes multiplies with: its answer to the unit vectors."""
    return module(torch.eye(module.in_features)).T


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_engine_has_the_weights_of_the_quantized_trainer(folder: str, quantization: str) -> None:
    spec = ModelSpec(folder, "float32", quantization=quantization)
    policy = model.load_policy(spec, LORA, gradient_checkpointing=False)
    fill_adapter(policy, seed=1, size=0.1)
    tensors = {name: tensor.detach() for name, tensor in model.lora_tensors(policy).items()}
    base = BaseWeights(folder, model.quantized_weights(spec), quantization)
    merged = dict(merged_weights(base, tensors, model.scaling(LORA), torch.float32, torch.device("cpu")))
    layers = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in policy.named_modules()
        if isinstance(module, Linear4bit | Linear8bitLt)
    }
    assert {f"{name}.weight" for name in layers} == base.quantized
    assert len(layers) == 14
    # LLM.int8() rounds what comes in as well; a unit vector it rounds to itself.
    tolerance = {"nf4": 1e-6, "int8": 2e-3}[quantization]
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, layer in layers.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
        expected = by_the_trainer(layer) + model.scaling(LORA) * b @ a
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=tolerance, rtol=tolerance)
        assert not torch.allclose(by_the_trainer(layer), whole[f"{name}.weight"], atol=tolerance), "nothing was rounded"
    for name in set(merged) - base.quantized:
        assert torch.equal(merged[name], whole[name])


@pytest.mark.parametrize("in_parts", [True, False])
def test_the_same_weights_in_another_naming_are_left_alone(tmp_path: Path, in_parts: bool) -> None:
    """As in Mistral's repositories. vLLM knows both namings, takes what comes first, and leaves out the merged ones."""
    folder = Path(save_smollm2_llama(tmp_path, **SHAPE))
    own = AutoModelForCausalLM.from_pretrained(folder)
    own.save_pretrained(folder, max_shard_size="40KB" if in_parts else "1GB")
    if in_parts:
        (folder / "model.safetensors").unlink(missing_ok=True)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    other = {"layers.0.attention.wq.weight": torch.zeros(64, 64)}
    save_file(other, folder / "consolidated.safetensors")
    names = [name for name, _ in merged_weights(BaseWeights(str(folder)), {}, 1.0, torch.float32, torch.device("cpu"))]
    assert set(names) | {"lm_head.weight"} == set(own.state_dict()) and len(names) == len(set(names))
    assert not set(names) & set(other)


def test_a_module_without_a_weight_is_named(tmp_path: Path) -> None:
    folder = save_smollm2_llama(tmp_path, **SHAPE)
    lost = {"base_model.model.model.layers.7.mlp.up_proj.lora_A.weight": torch.zeros(4, 64)}
    with pytest.raises(KeyError, match=r"no weight in .* for 1 LoRA modules, first .*layers\.7\.mlp\.up_proj"):
        list(merged_weights(BaseWeights(folder), lost, 1.0, torch.float32, torch.device("cpu")))
