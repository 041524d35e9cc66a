"""Training that starts from an adapter (lora_model_dir), against plain PEFT with that adapter."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from actors import dataset_loop, device, model
from actors.errors import ConfigError
from actors.specs import DatasetTrainSpec, LoraSpec, LossSpec, ModelSpec
from actors.trainer import Trainer
from tests.tiny import alone_logprobs, load_plain, published, random_group, trainer_spec, training_arguments

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = LoraSpec(r=4, alpha=8)
BETA = 0.3
PAIRS = [
    {"prompt_ids": [5, 9, 3], "chosen_ids": [17, 8, 1], "rejected_ids": [22, 4, 1]},
    {"prompt_ids": [31, 6], "chosen_ids": [12, 40, 7, 1], "rejected_ids": [13, 1]},
]
JUDGED = [
    {"prompt_ids": [5, 9, 3], "completion_ids": [17, 8, 1], "label": True},
    {"prompt_ids": [31, 6], "completion_ids": [12, 40, 7, 1], "label": False},
]
TEXTS = [
    {"input_ids": [5, 9, 3, 17, 8], "labels": [5, 9, 3, 17, 8]},
    {"input_ids": [31, 6, 12], "labels": [31, 6, 12]},
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "sft": TEXTS, "dpo": PAIRS, "ipo": PAIRS, "kto": JUDGED, "orpo": PAIRS, "reward_trainer": PAIRS
}  # fmt: skip


@pytest.fixture
def wide(base: str, tmp_path: Path) -> str:
    """One whose matrices are made of whole blocks of NF4 and of bitsandbytes' CPU kernel."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    config = LlamaConfig.from_pretrained(base, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


def with_peft(base: str, folder: Path, task: str = "CAUSAL_LM") -> Any:
    return PeftModel.from_pretrained(load_plain(base, task), folder).eval()


@pytest.fixture
def trainer_of(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a worker builds: the method's trainer, all rows in each batch."""
    monkeypatch.setattr(dataset_loop, "reporter", lambda _: TrainerCallback())

    def build(
        method: str,
        start: Path,
        *,
        lora: LoraSpec = LORA,
        quantization: str | None = None,
        base: str = base,
        dtype: str = "float32",
        **changes: Any,
    ) -> Any:
        Dataset.from_list(ROWS[method]).save_to_disk(tmp_path / "rows")
        files = tuple(map(str, (tmp_path / "rows").glob("data-*.arrow")))
        arguments = {
            **training_arguments(tmp_path / "out", max_steps=2, learning_rate=1e-2),
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 2,
            **({} if method in ("sft", "reward_trainer") else {"beta": BETA}),
            **({"loss_type": "ipo"} if method == "ipo" else {}),
            **changes,
        }
        spec = DatasetTrainSpec(
            method,
            ModelSpec(base, dtype, quantization=quantization),
            replace(lora, start=str(start)),
            files,
            files,
            packed=False,
            rows_per_step=1,
            output_dir=str(tmp_path / "out"),
            job={},
            arguments=arguments,
        )
        return dataset_loop.build_trainer(spec, None)

    return build


@torch.no_grad()
def logprob(policy: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(answer | prompt), one sequence alone."""
    logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return -cross_entropy(logits, torch.tensor(answer), reduction="sum")


def margins(policy: Any) -> Tensor:
    """log p(chosen) - log p(rejected), a row each."""
    return torch.stack(
        [logprob(policy, r["prompt_ids"], r["chosen_ids"]) - logprob(policy, r["prompt_ids"], r["rejected_ids"]) for r in PAIRS]
    )


def moved(start: Path, written: Path) -> float:
    """The largest change of a weight; the two files hold the same tensors."""
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, written))
    assert before.keys() == after.keys()
    return max(float((after[name] - before[name]).abs().max()) for name in before)


def test_sft_starts_with_the_adapters_loss(base: str, adapter: Callable[..., Path], trainer_of: Any, tmp_path: Path) -> None:
    start = adapter()
    policy = with_peft(base, start)
    total = -sum(float(logprob(policy, row["input_ids"][:1], row["input_ids"][1:])) for row in TEXTS)
    expected = total / sum(len(row["input_ids"]) - 1 for row in TEXTS)
    trainer = trainer_of("sft", start)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found[0] == pytest.approx(expected, abs=1e-4) and found[1] < found[0] - 0.01
    trainer.save_model(str(tmp_path / "out"))
    assert 1e-3 < moved(start, tmp_path / "out") < 0.1


@pytest.mark.parametrize("method", ROWS)
def test_inputs_of_the_adapter_are_not_copied_under_autocast(
    adapter: Callable[..., Path], trainer_of: Any, method: str
) -> None:
    """With PEFT's copies to fp32 and back the numbers would be the same, to the bit."""
    start = adapter(task="SEQ_CLS" if method == "reward_trainer" else "CAUSAL_LM")
    results = []
    for copied in (False, True):
        trainer = trainer_of(method, start, dtype="bfloat16", bf16=True, max_steps=3)
        layers = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]
        assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)
        for layer in layers:
            layer.cast_input_dtype_enabled = copied
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(set(losses)) == 3, "it learns"
        results.append((losses, {name: tensor.clone() for name, tensor in model.lora_tensors(trainer.model).items()}))
    (ours, ours_weights), (copying, copying_weights) = results
    assert ours == copying
    assert all(torch.equal(ours_weights[name], tensor) for name, tensor in copying_weights.items())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantized_base(wide: str, adapter: Callable[..., Path], trainer_of: Any, quantization: str) -> None:
    start = adapter(base=wide)
    config = (
        BitsAndBytesConfig(load_in_8bit=True)
        if quantization == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    )
    quantized = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32, quantization_config=config)
    model.keep_gradients(quantized)  # else it would multiply in bfloat16
    policy = PeftModel.from_pretrained(quantized, start).eval()
    trainer = trainer_of("sft", start, quantization=quantization, base=wide)
    tensors = model.lora_tensors(trainer.model)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(start / "adapter_model.safetensors").items())
    total = -sum(float(logprob(policy, row["input_ids"][:1], row["input_ids"][1:])) for row in TEXTS)
    expected = total / sum(len(row["input_ids"]) - 1 for row in TEXTS)
    # int8 scales by a batch's largest activations, so rows beside others are not quite what they are alone
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-3 if quantization == "nf4" else 0.05)


@pytest.mark.skipif(device.has_gpu(), reason="works there")
def test_dora_on_a_base_of_8_bits_is_refused_on_cpus(adapter: Callable[..., Path], trainer_of: Any) -> None:
    """Its first step would end with "'NoneType' object has no attribute 'dtype'", from within bitsandbytes."""
    with pytest.raises(ConfigError, match="^peft_use_dora: on a base of 8 bits needs a GPU"):
        trainer_of("sft", adapter(use_dora=True), lora=replace(LORA, use_dora=True), quantization="int8")


def test_an_evaluation_leaves_the_gradients_of_a_quantized_base(
    wide: str, adapter: Callable[..., Path], trainer_of: Any
) -> None:
    start = adapter(base=wide)
    trainer = trainer_of("sft", start, quantization="nf4", base=wide)
    trainer.evaluate()
    plain = load_plain(wide)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(module.weight.data, compress_statistics=True, quant_type="nf4")
            module.weight.data = dequantize_4bit(packed, state)
    ids = torch.tensor([TEXTS[0]["input_ids"]])
    gradients = []
    for policy in (trainer.model.train(), PeftModel.from_pretrained(plain, start, is_trainable=True).train()):
        policy(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-3)
    assert min(float(gradient.abs().max()) for gradient in gradients[0].values()) > 1e-4


@pytest.mark.parametrize("shape", [{}, {"lora_dropout": 0.5}, {"use_dora": True}])
def test_dpo_compares_with_the_starting_adapter(
    base: str, adapter: Callable[..., Path], trainer_of: Any, tmp_path: Path, shape: dict[str, Any]
) -> None:
    start = adapter(**shape)
    lora = replace(LORA, use_dora="use_dora" in shape, dropout=shape.get("lora_dropout", 0.0))
    trainer = trainer_of("dpo", start, lora=lora, max_steps=3)
    assert not [name for name, p in trainer.model.named_parameters() if p.requires_grad and ".ref." in name]
    before = trainer.evaluate()
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-5), "the policy is its reference"
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert first == pytest.approx(math.log(2), abs=1e-5), "in training too: neither of the two has dropout"
    after = trainer.evaluate()
    trainer.save_model(str(tmp_path / "out"))
    assert moved(start, tmp_path / "out") > 1e-3
    assert not list((tmp_path / "out").glob("*/adapter_model.safetensors")), "the reference is not a result"
    gain = BETA * (margins(with_peft(base, tmp_path / "out")) - margins(with_peft(base, start)))
    assert after["eval_rewards/margins"] == pytest.approx(float(gain.mean()), abs=1e-3) and gain.mean() > 0.01
    assert after["eval_loss"] == pytest.approx(float(-logsigmoid(gain).mean()), abs=1e-3)


def test_kto_compares_with_the_starting_adapter(
    base: str, adapter: Callable[..., Path], trainer_of: Any, tmp_path: Path
) -> None:
    start = adapter()
    trainer = trainer_of("kto", start)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.5, abs=1e-5), "1 - sigmoid(0)"
    trainer.train()
    after = trainer.evaluate()
    trainer.save_model(str(tmp_path / "out"))
    liked = JUDGED[0]
    one, other = (logprob(with_peft(base, f), liked["prompt_ids"], liked["completion_ids"]) for f in (tmp_path / "out", start))
    assert after["eval_rewards/chosen"] == pytest.approx(BETA * float(one - other), abs=1e-3) and one - other > 0.01


def test_orpo_starts_with_the_adapters_odds(base: str, adapter: Callable[..., Path], trainer_of: Any) -> None:
    start = adapter()
    policy = with_peft(base, start)
    mean = sum(float(logprob(policy, r["prompt_ids"], r["chosen_ids"])) / len(r["chosen_ids"]) for r in PAIRS) / len(PAIRS)
    assert trainer_of("orpo", start).evaluate()["eval_rewards/chosen"] == pytest.approx(BETA * mean, abs=1e-3)


@torch.no_grad()
def scores(policy: Any) -> Tensor:
    """[pairs, 2] rewards of chosen and rejected, each conversation alone."""
    sides = ("chosen_ids", "rejected_ids")
    return torch.tensor(
        [[policy(input_ids=torch.tensor([r["prompt_ids"] + r[side]])).logits.item() for side in sides] for r in PAIRS]
    )


def test_a_reward_model_goes_on_from_its_head(base: str, adapter: Callable[..., Path], trainer_of: Any) -> None:
    start = adapter("SEQ_CLS")
    found = scores(with_peft(base, start, "SEQ_CLS"))
    expected = -logsigmoid(found[:, 0] - found[:, 1]).mean()
    assert trainer_of("reward_trainer", start).evaluate()["eval_loss"] == pytest.approx(float(expected), abs=1e-4)


def test_a_reward_model_starts_from_an_sft_adapter(base: str, adapter: Callable[..., Path], trainer_of: Any) -> None:
    start = adapter()
    trainer = trainer_of("reward_trainer", start)
    tensors = model.lora_tensors(trainer.model)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(start / "adapter_model.safetensors").items())
    assert "base_model.model.score.weight" in tensors


def test_a_resumed_job_has_the_same_reference(adapter: Callable[..., Path], trainer_of: Any, tmp_path: Path) -> None:
    start = adapter()

    def run(out: str, resume: Path | None, **changes: Any) -> list[float]:
        trainer = trainer_of("dpo", start, max_steps=4, output_dir=str(tmp_path / out), **changes)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = run("a", None, save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert not list(checkpoint.glob("*/adapter_model.safetensors"))
    assert whole[0] == pytest.approx(math.log(2), abs=1e-5) and whole[3] < whole[0] - 0.01
    assert run("b", checkpoint) == whole


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_grpo_starts_from_the_adapter_and_is_held_to_it(
    base: str, adapter: Callable[..., Path], tmp_path: Path, beta: float
) -> None:
    start = adapter()
    groups = [random_group(5, [4, 1, 7], seed=0), random_group(3, [6, 5], seed=1)]
    advantages = [[1.0, -0.5, 0.25], [0.8, -0.8]]
    spec = trainer_spec(base, loss=LossSpec(max_completion_length=8, beta=beta))
    trainer = Trainer(replace(spec, lora=replace(spec.lora, start=str(start))))
    trainer.set_probe([5, 6, 7, 8, 9])
    before = with_peft(base, start)
    header, _ = published(trainer)
    assert header.probe_logprobs == pytest.approx(model.sequence_logprobs(before, trainer.probe), abs=1e-4)
    assert trainer.base_logprobs() == pytest.approx(model.sequence_logprobs(load_plain(base), trainer.probe), abs=1e-4)
    first = trainer.train(advantages, *groups)
    assert first.kl == pytest.approx(0.0, abs=1e-6) if beta else math.isnan(first.kl)
    trainer.save_policy(str(tmp_path / "out"))
    assert moved(start, tmp_path / "out") > 1e-3
    second = trainer.train(advantages, *groups)
    if beta:
        after = with_peft(base, tmp_path / "out")
        with torch.no_grad():
            gaps = [
                alone_logprobs(before, group, i, 1.0)[0] - alone_logprobs(after, group, i, 1.0)[0]
                for group in groups
                for i in range(len(group.texts))
            ]
        gap = torch.cat(gaps)
        assert second.kl == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-2) and second.kl > 1e-3
