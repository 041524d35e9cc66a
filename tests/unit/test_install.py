"""The weights that an engine loads: those that the trainer computes with, to the last bit of rounding."""

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from actors import install, model, snapshot
from actors.install import BaseWeights, PolicyInstaller, merged_weights
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


class InPlace(torch.nn.Module):
    """Takes weights as vLLM's models do, into the tensors that it computes with; number `breaks_at` breaks it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.state = {name: torch.zeros_like(tensor) for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
        self.breaks_at = 0

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for number, (name, tensor) in enumerate(weights, start=1):
            if number == self.breaks_at:
                raise MemoryError("no room")
            self.state[name].copy_(tensor)


def test_a_load_in_place_that_breaks_half_way_is_undone_by_the_one_before(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "serves_as_loaded", lambda model: True)
    served = InPlace(folder)
    nothing = dict.fromkeys(("reset_lora_state", "reset_encoder_cache", "reset_mm_cache"), lambda: None)
    config = SimpleNamespace(dtype=torch.float32)
    worker = PolicyInstaller()
    worker.model_runner = SimpleNamespace(
        get_model=lambda: served, model_config=config, device=torch.device("cpu"), **nothing
    )
    policy = model.load_policy(ModelSpec(folder, "float32"), LORA, gradient_checkpointing=False)
    found = []
    for seed in (1, 2):
        fill_adapter(policy, seed=seed, size=0.1)
        entries, bucket, _ = snapshot.pack(model.lora_tensors(policy))
        found.append((BaseWeights(folder), entries, [bucket], model.scaling(LORA)))
    worker.eagleray_fuse(*found[0])
    before = {name: tensor.clone() for name, tensor in served.state.items()}
    served.breaks_at = len(before) // 2
    with pytest.raises(MemoryError):
        worker.eagleray_fuse(*found[1])
    assert any(not torch.equal(before[name], tensor) for name, tensor in served.state.items())
    served.breaks_at = 0
    worker.eagleray_fuse(*found[0])
    assert all(torch.equal(before[name], tensor) for name, tensor in served.state.items())
