"""Jobs that start from an adapter (lora_model_dir), against plain PEFT with that adapter."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from actors import dataset_loop, model
from actors.errors import ConfigError
from actors.specs import DatasetTrainSpec, LoraSpec, LossSpec, ModelSpec
from actors.trainer import Trainer
from orchestrator import config as configuration
from orchestrator.dataset_job import identity
from orchestrator.jobs import with_absolute_paths
from orchestrator.runnable import ensure_runnable
from orchestrator.starting_adapter import adopted, ensure_fits
from tests.tiny import alone_logprobs, move_trainable, random_group, save_llama, trainer_spec, training_arguments

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


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def wide(base: str, tmp_path: Path) -> str:
    """One whose matrices are made of whole blocks of NF4 and of bitsandbytes' CPU kernel."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_key_value_heads": 4}
    config = LlamaConfig.from_pretrained(base, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.fixture
def adapter(tmp_path: Path, base: str) -> Callable[..., Path]:
    """Writes an adapter that matters, made by PEFT alone."""

    def write(task: str = "CAUSAL_LM", base: str = base, **changes: Any) -> Path:
        folder = tmp_path / "start"
        given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": task, **changes}
        policy = get_peft_model(plain(base, task), LoraConfig(**given))
        move_trainable(policy)
        policy.save_pretrained(folder)
        return folder

    return write


def plain(base: str, task: str = "CAUSAL_LM") -> Any:
    torch.manual_seed(3)  # of a new head
    if task == "SEQ_CLS":
        return AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=1)
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def with_peft(base: str, folder: Path, task: str = "CAUSAL_LM") -> Any:
    return PeftModel.from_pretrained(plain(base, task), folder).eval()


@pytest.fixture
def trainer_of(tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What a worker builds: the method's trainer, all rows in each batch."""
    monkeypatch.setattr(dataset_loop, "reporter", lambda _: TrainerCallback())

    def build(
        method: str, start: Path, *, lora: LoraSpec = LORA, quantization: str | None = None, base: str = base, **changes: Any
    ) -> Any:
        Dataset.from_list(ROWS[method]).save_to_disk(tmp_path / "rows")
        files = tuple(map(str, (tmp_path / "rows").glob("*.arrow")))
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
            ModelSpec(base, "float32", quantization=quantization),
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
    policy = PeftModel.from_pretrained(quantized, start).eval()
    trainer = trainer_of("sft", start, quantization=quantization, base=wide)
    tensors = model.lora_tensors(trainer.model)
    assert all(torch.equal(tensors[name], tensor) for name, tensor in load_file(start / "adapter_model.safetensors").items())
    total = -sum(float(logprob(policy, row["input_ids"][:1], row["input_ids"][1:])) for row in TEXTS)
    expected = total / sum(len(row["input_ids"]) - 1 for row in TEXTS)
    # int8 scales by a batch's largest activations, so rows beside others are not quite what they are alone
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-3 if quantization == "nf4" else 0.05)


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
    header, _ = trainer.publish()
    assert header.probe_logprobs == pytest.approx(model.sequence_logprobs(before, trainer.probe), abs=1e-4)
    assert trainer.base_logprobs() == pytest.approx(model.sequence_logprobs(plain(base), trainer.probe), abs=1e-4)
    first = trainer.train(advantages, *groups)
    assert first.kl == pytest.approx(0.0, abs=1e-6) if beta else math.isnan(first.kl)
    trainer.save_adapter(str(tmp_path / "out"))
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


JOB = """base_model: {base}
adapter: lora
lora_model_dir: {start}
learning_rate: 1e-3
"""
SFT = "datasets: [{path: none.jsonl, type: completion}]\n"
GRPO = "rl: grpo\ntrl: {reward_funcs: [a.b]}\ndatasets: [{path: none.jsonl}]\nmicro_batch_size: 8\n"


def started(tmp_path: Path, base: str, start: Path, extra: str = "", method: str = SFT) -> Any:
    """The job of a file, as far as a run goes before anything starts."""
    path = tmp_path / "job.yaml"
    path.write_text(JOB.format(base=base, start=start) + extra + method)
    config = configuration.load(path)
    ensure_runnable(config)
    config = adopted(with_absolute_paths(config))
    ensure_fits(config)
    return config


def test_the_adapter_says_what_it_is(
    tmp_path: Path, base: str, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = adapter(use_rslora=True, lora_dropout=0.25, modules_to_save=["lm_head"], target_modules=["q_proj", "up_proj"])
    monkeypatch.chdir(tmp_path)
    config = started(tmp_path, base, Path("start"))
    assert config.lora_model_dir == str(start)
    shape = (config.lora_r, config.lora_alpha, config.lora_dropout, config.peft_use_rslora, config.peft_use_dora)
    assert shape == (4, 8, 0.25, True, False)
    assert (config.lora_target_modules, config.lora_modules_to_save) == (["q_proj", "up_proj"], ["lm_head"])
    agreeing = "lora_r: 4\nlora_alpha: 8\npeft_use_rslora: true\nlora_target_modules: [up_proj, q_proj]\nlora_dropout: 0.1\n"
    assert started(tmp_path, base, start, agreeing).lora_dropout == 0.1
    (tmp_path / "again.yaml").write_text(configuration.dump(config))
    again = adopted(configuration.load(tmp_path / "again.yaml"))
    assert again == config, "the configuration that a run leaves is the same job"


@pytest.mark.parametrize(
    ("shape", "extra", "expected"),
    [
        ({}, "lora_r: 8\n", ":5: lora_r: is 8, but the adapter in START has 4; remove the key"),
        ({}, "lora_alpha: 32\n", ":5: lora_alpha: is 32, but the adapter in START has 8"),
        ({}, "peft_use_rslora: true\n", "peft_use_rslora: is true, but the adapter in START has false"),
        ({"use_dora": True}, "peft_use_dora: false\n", "peft_use_dora: is false, but the adapter in START has true"),
        ({}, "lora_modules_to_save: [lm_head]\n", "lora_modules_to_save: is ['lm_head'], but the adapter in START has None"),
        (
            {"target_modules": ["q_proj"]},
            "lora_target_linear: true\n",
            "lora_target_linear: means the modules down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, "
            "but the adapter in START has q_proj; remove the key",
        ),
        (
            {"target_modules": ["q_proj"]},
            "lora_target_modules: [k_proj]\n",
            "lora_target_modules: means the modules k_proj, but the adapter in START has q_proj",
        ),
        ({"rank_pattern": {"q_proj": 2}}, "", "lora_model_dir: the adapter in START has rank_pattern {'q_proj': 2}"),
        ({"task_type": "SEQ_CLS"}, "", "lora_model_dir: the adapter in START is a reward model's"),
    ],
)
def test_contradictions_are_named_with_both_values(
    tmp_path: Path, base: str, adapter: Callable[..., Path], shape: dict[str, Any], extra: str, expected: str
) -> None:
    start = adapter(shape.pop("task_type", "CAUSAL_LM"), **shape)
    with pytest.raises(ConfigError, match=re.escape(expected.replace("START", str(start)))):
        started(tmp_path, base, start, extra)


@pytest.mark.parametrize(
    ("shape", "extra", "expected"),
    [
        ({"r": 3}, "ray: {sync: adapter}\n", "has lora_r, and ray.sync: adapter needs a rank that vLLM has"),
        ({"use_dora": True}, "", "has peft_use_dora, and vLLM cannot sample"),
        ({"modules_to_save": ["lm_head"]}, "", "has lora_modules_to_save, and only LoRA weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "", "has lora_target_modules, and embeddings cannot be"),
    ],
)
def test_what_grpo_does_not_do_is_found_in_the_adapter(
    tmp_path: Path, base: str, adapter: Callable[..., Path], shape: dict[str, Any], extra: str, expected: str
) -> None:
    start = adapter(**shape)
    with pytest.raises(ConfigError, match=re.escape(f":3: lora_model_dir: the adapter in {start} {expected}")):
        started(tmp_path, base, start, extra, GRPO)
    assert started(tmp_path, base, start).lora_r == shape.get("r", 4)


def test_a_folder_that_is_none_is_named(tmp_path: Path, base: str, adapter: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match=":3: lora_model_dir: .*: there is no such folder"):
        started(tmp_path, base, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=":3: lora_model_dir: .*: it holds no adapter"):
        started(tmp_path, base, tmp_path)
    start = adapter()
    config = start / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps({**said, "base_model_name_or_path": "org/other"}))
    with pytest.raises(ConfigError, match=f":1: base_model: is {base}, but the adapter in {start} was trained on org/other"):
        started(tmp_path, base, start)
    config.write_text(json.dumps({**said, "base_model_name_or_path": None}))
    weights = start / "adapter_model.safetensors"
    wide = {name: torch.zeros(*tensor.shape[:-1], 7) for name, tensor in load_file(weights).items()}
    save_file(wide, weights)
    with pytest.raises(ConfigError, match=r"lora_model_dir: in the adapter .* is \[4, 7\], but .* needs \[4, 48\]"):
        started(tmp_path, base, start)
    weights.write_bytes(weights.read_bytes()[:40])
    with pytest.raises(ConfigError, match="lora_model_dir: .* cannot be read"):
        started(tmp_path, base, start)
    weights.rename(start / "adapter_model.bin")
    with pytest.raises(ConfigError, match="lora_model_dir: .* is a pickle, which is never read"):
        started(tmp_path, base, start)


def test_a_resumed_job_must_start_from_the_same_adapter(tmp_path: Path, base: str, adapter: Callable[..., Path]) -> None:
    (tmp_path / "none.jsonl").write_text('{"text": "w3"}\n')
    start = adapter()
    saved = identity(started(tmp_path, base, start))
    start.rename(tmp_path / "moved")
    assert identity(started(tmp_path, base, tmp_path / "moved")) == saved, "the same adapter, wherever it lies"
    other = tmp_path / "other"
    with_peft(base, tmp_path / "moved").save_pretrained(other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    assert identity(started(tmp_path, base, other)) != saved
