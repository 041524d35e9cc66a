"""The policy on packed rows, against transformers on one completion at a time."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors import head, hub, model
from actors.errors import ConfigError
from actors.packing import PackedRow, Sample, pack_row, plan_rows
from actors.specs import LoraSpec, ModelSpec
from actors.types import RolloutGroup
from tests.tiny import SMOLLM2, alone_logprobs, fill_adapter, random_group, save_llama

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def loaded(folder: str, temperature: float) -> Any:
    policy = model.load_policy(
        ModelSpec(folder, "float32"), LoraSpec(4, 8), gradient_checkpointing=False, temperature=temperature
    )
    fill_adapter(policy, seed=1, size=0.1)
    return policy.eval()


@pytest.fixture(scope="module")
def policy(folder: str) -> Any:
    return loaded(folder, 1.0)


@pytest.fixture(scope="module")
def cooler(folder: str) -> Any:
    """The same at TEMPERATURE."""
    return loaded(folder, TEMPERATURE)


@pytest.fixture(scope="module")
def groups() -> list[RolloutGroup]:
    shapes = ((5, [4, 1, 7]), (9, [2, 2]), (3, [6, 5, 1, 1]))
    return [random_group(prompt, completions, seed=i) for i, (prompt, completions) in enumerate(shapes)]


def packed(groups: list[RolloutGroup], per_row: int) -> list[tuple[PackedRow, list[Sample]]]:
    samples = [Sample(g, i, 1.0) for g, group in enumerate(groups) for i in range(len(group.texts))]
    return [(pack_row(groups, row), row) for row in plan_rows(groups, samples, per_row)]


def gradients(policy: Any, total: Tensor) -> dict[str, Tensor]:
    policy.zero_grad()
    total.backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("per_row", [1, 2, 4, 9])
@pytest.mark.parametrize("temperature", [1.0, TEMPERATURE])
def test_packed_logprobs_and_gradients_are_those_of_each_completion_alone(
    policy: Any, cooler: Any, groups: list[RolloutGroup], per_row: int, temperature: float
) -> None:
    policy = policy if temperature == 1.0 else cooler
    packed_total, alone_total = torch.zeros(()), torch.zeros(())
    for row, samples in packed(groups, per_row):
        logprobs_BT, _ = model.completion_logprobs(policy, row)
        for b, sample in enumerate(samples):
            alone_T, _ = alone_logprobs(policy, groups[sample.group], sample.index, temperature)
            torch.testing.assert_close(logprobs_BT[b, : len(alone_T)], alone_T, rtol=0, atol=1e-4)
            # A coefficient a token, so that no two tokens can be exchanged without a trace.
            coefficients_T = torch.arange(1.0, len(alone_T) + 1) * (1 + sample.group + 0.3 * sample.index)
            packed_total = packed_total + (logprobs_BT[b, : len(alone_T)] * coefficients_T).sum()
            alone_total = alone_total + (alone_T * coefficients_T).sum()
    of_packed, of_alone = gradients(policy, packed_total), gradients(policy, alone_total)
    assert len(of_alone) == 2 * 7 * 2  # A and B of seven projections in two layers
    for name, expected in of_alone.items():
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(of_packed[name], expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("kernel", ["ours", "TRL's"])
def test_entropy_is_that_of_the_distribution(
    cooler: Any, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    if kernel == "TRL's":  # as on a GPU
        monkeypatch.setattr(head, "kernel", nullcontext)
    for row, samples in packed(groups, 4):
        _, entropy_BT = model.completion_logprobs(cooler, row)
        assert not entropy_BT.requires_grad
        for b, sample in enumerate(samples):
            _, logits_TV = alone_logprobs(cooler, groups[sample.group], sample.index, TEMPERATURE)
            expected_T = torch.distributions.Categorical(logits=logits_TV).entropy()
            torch.testing.assert_close(entropy_BT[b, : len(expected_T)], expected_T, rtol=0, atol=1e-4)


def test_the_head_sees_only_positions_that_predict_a_completion(
    policy: Any, groups: list[RolloutGroup], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    measure = head._measure

    def watched(z_kV: Tensor, *rest: Any) -> dict[str, Tensor]:
        seen.append(len(z_kV))
        return measure(z_kV, *rest)

    monkeypatch.setattr(head, "_measure", watched)
    for row, _ in packed(groups, 9):
        model.completion_logprobs(policy, row)
    assert sum(seen) == sum(len(ids) for group in groups for ids in group.completion_ids)


def test_a_prompt_may_be_one_token(policy: Any) -> None:
    """Then it stands before its completions alone, and there is nothing that they share."""
    groups = [random_group(1, [4, 2], seed=7), random_group(1, [3], seed=8)]
    for both in (groups[:1], groups, [*groups, random_group(5, [2], seed=9)]):
        for row, samples in packed(both, 9):
            logprobs_BT, _ = model.completion_logprobs(policy, row)
            for b, sample in enumerate(samples):
                alone_T, _ = alone_logprobs(policy, both[sample.group], sample.index, 1.0)
                torch.testing.assert_close(logprobs_BT[b, : len(alone_T)], alone_T, rtol=0, atol=1e-4)


def test_checkpointed_gradients_are_the_same(policy: Any, folder: str, groups: list[RolloutGroup]) -> None:
    checkpointed = model.load_policy(ModelSpec(folder, "float32"), LoraSpec(4, 8), gradient_checkpointing=True)
    checkpointed.load_state_dict(policy.state_dict())
    checkpointed.train()
    ((row, _),) = packed(groups, 9)
    found = []
    for each in (policy, checkpointed):
        logprobs_BT, _ = model.completion_logprobs(each, row)
        found.append(gradients(each, (logprobs_BT * row.mask_BT).sum()))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-5, atol=1e-6)


def test_the_real_model_agrees_with_transformers() -> None:
    policy = model.load_policy(SMOLLM2, LoraSpec(8, 16), gradient_checkpointing=False).eval()
    plain = AutoModelForCausalLM.from_pretrained(hub.resolve(SMOLLM2.name), dtype=torch.float32).eval()
    groups = [random_group(12, [9, 3], seed=0, vocab=40_000), random_group(20, [5, 14], seed=1, vocab=40_000)]
    with torch.no_grad():
        for row, samples in packed(groups, 4):
            logprobs_BT, _ = model.completion_logprobs(policy, row)
            for b, sample in enumerate(samples):
                expected_T, _ = alone_logprobs(plain, groups[sample.group], sample.index, 1.0)
                torch.testing.assert_close(logprobs_BT[b, : len(expected_T)], expected_T, rtol=0, atol=1e-3)


def test_sequence_logprobs_are_those_of_the_sequence(policy: Any, groups: list[RolloutGroup]) -> None:
    group = groups[0]
    ids = [*group.prompt_ids.tolist(), *group.completion_ids[2].tolist()]
    found = model.sequence_logprobs(policy, ids)
    with torch.no_grad():
        rows = torch.log_softmax(policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0], -1)
    assert found == pytest.approx([float(rows[i, ids[i + 1]]) for i in range(len(ids) - 1)], abs=1e-6)


@pytest.mark.parametrize("lora", [LoraSpec(4, 8), LoraSpec(3, 8, target_modules=("q_proj", "down_proj"))])
def test_expected_shapes_are_those_of_a_loaded_policy(folder: str, lora: LoraSpec) -> None:
    spec = ModelSpec(folder, "float32")
    loaded = model.lora_tensors(model.load_policy(spec, lora, gradient_checkpointing=False))
    assert model.expected_shapes(spec, lora) == {name: tuple(t.shape) for name, t in loaded.items()}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_is_what_peft_applies(folder: str, use_rslora: bool) -> None:
    lora = LoraSpec(4, 12, use_rslora=use_rslora)
    policy = model.load_policy(ModelSpec(folder, "float32"), lora, gradient_checkpointing=False)
    applied = {m.scaling["default"] for m in policy.modules() if isinstance(getattr(m, "scaling", None), dict)}
    assert applied == {model.scaling(lora)} == {6.0 if use_rslora else 3.0}


def test_lora_is_fp32_and_trains_alone_also_on_a_bf16_base(folder: str) -> None:
    policy = model.load_policy(ModelSpec(folder, "bfloat16"), LoraSpec(4, 8), gradient_checkpointing=False)
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_targets_that_the_model_lacks_are_an_error(folder: str) -> None:
    lora = LoraSpec(4, 8, target_modules=("no_such_projection",))
    with pytest.raises(ConfigError, match=r"lora_target_modules: .*no_such_projection"):
        model.load_policy(ModelSpec(folder, "float32"), lora, gradient_checkpointing=False)


def test_lora_on_the_head_is_an_error(folder: str) -> None:
    """The head is computed from its weights alone, so an adapter on it would be trained by nothing."""
    lora = LoraSpec(4, 8, target_modules=".*(q_proj|lm_head)")
    with pytest.raises(ConfigError, match="lora_target_modules: matches the head"):
        model.load_policy(ModelSpec(folder, "float32"), lora, gradient_checkpointing=False)


def test_the_tokenizer_is_the_one_beside_the_weights(folder: str) -> None:
    assert model.load_tokenizer(ModelSpec(folder, "float32"))("w7 w9")["input_ids"] == [7, 9]
    assert (Path(folder) / "tokenizer.json").is_file()


def test_a_job_names_special_tokens_and_a_template_of_its_own(folder: str) -> None:
    own = model.load_tokenizer(ModelSpec(folder, "float32"))
    assert (own.eos_token, own.pad_token) == ("<eos>", "<pad>")
    named = (("eos_token", "w7"), ("pad_token", "<unk>"))
    spec = ModelSpec(folder, "float32", special_tokens=named, chat_template="{{ messages[0]['content'] + eos_token }}")
    tokenizer = model.load_tokenizer(spec)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (7, 2, len(own))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w9 "}], tokenize=False) == "w9 w7"


def test_weights_under_other_names_than_the_files_cannot_go_to_the_engines(tmp_path: Path) -> None:
    spec = ModelSpec(save_llama(tmp_path), "float32")
    model.ensure_checkpoint_names(spec)
    file = tmp_path / "model.safetensors"
    save_file({name.replace("layers.1.mlp", "layers.1.experts"): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match=r"has no model\.layers\.1\.mlp\.down_proj\.weight in its files.*add adapter: lora"):
        model.ensure_checkpoint_names(spec)
