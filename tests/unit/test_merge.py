"""Merged models against plain PEFT: the adapter on its base, never merged, is what they must answer as."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actors import storage
from orchestrator.cli import main
from tests.tiny import save_adapter, save_llama

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([[5, 9, 3, 17, 8], [22, 4, 4, 31, 6]])
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The same with one matrix for embeddings and output, as small models have it."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(base, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Writes what a job leaves: an adapter, the tokenizer, and the configuration."""

    def write(base: Path, *, task: str = "CAUSAL_LM", keys: str = "bf16: false\n", **lora: Any) -> Path:
        out = tmp_path / "out"
        save_adapter(base, out, task, **lora)
        AutoTokenizer.from_pretrained(base).save_pretrained(out)
        method = "rl: reward_trainer\n" if task == "SEQ_CLS" else ""
        adapter = "adapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\n" if "adapter:" not in keys else ""
        rest = f"base_model: {base}\nlearning_rate: 1e-3\ndatasets: [{{path: none.jsonl, type: completion}}]\n"
        (out / "config.yaml").write_text(rest + method + adapter + keys)
        return out

    return write


def load(folder: Path, task: str = "CAUSAL_LM", dtype: Any = torch.float32) -> Any:
    if task == "SEQ_CLS":
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=1, pad_token_id=0)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def merged(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = main(["merge", *map(str, arguments)])
    output = capsys.readouterr()
    assert code == 0, output.err
    return output.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["merge", *map(str, arguments)]) == 1
    message = capsys.readouterr().err
    assert message.count("eagleray: ") == 1
    return message


LINEAR = {"target_modules": "all-linear"}
SHAPES: dict[str, dict[str, Any]] = {
    "lora": LINEAR,
    "rslora": {**LINEAR, "use_rslora": True},
    "dora": {**LINEAR, "use_dora": True},
    "head too": {**LINEAR, "modules_to_save": ["lm_head"]},
    "embeddings too": {**LINEAR, "modules_to_save": ["embed_tokens"]},
    "both": {**LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
    "lora of the head": {"target_modules": ["q_proj", "lm_head"]},
    "lora of the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", ["base", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_answers_as_the_adapter_on_its_base(
    request: pytest.FixtureRequest, run: Run, capsys: pytest.CaptureFixture[str], kind: str, shape: str
) -> None:
    base: Path = request.getfixturevalue(kind)
    out = run(base, **SHAPES[shape])
    printed = merged(capsys, out)
    assert f'transformers.AutoModelForCausalLM.from_pretrained("{out / "merged"}")' in printed
    assert "float32" in printed and "quantized" not in printed
    expected = PeftModel.from_pretrained(load(base), out)
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert model.dtype == torch.float32
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(load(base))).abs().max() > 0.1, "the adapter changes nothing, so this shows nothing"
    one = torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    assert model.config.tie_word_embeddings == one, "what loaders go by that do not look for both matrices"
    answers = [m.generate(input_ids=IDS, max_new_tokens=8, do_sample=False) for m in (model, expected)]
    assert torch.equal(*answers)
    assert AutoTokenizer.from_pretrained(out / "merged")("w5 w9")["input_ids"] == [5, 9]
    assert str(base) not in (out / "merged" / "config.json").read_text()


def test_a_reward_model_keeps_its_head(run: Run, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(base, task="SEQ_CLS", **LINEAR)
    assert "AutoModelForSequenceClassification" in merged(capsys, out, "--into", out / "elsewhere" / "model")
    model = AutoModelForSequenceClassification.from_pretrained(out / "elsewhere" / "model")
    assert (model.config.num_labels, model.config.pad_token_id) == (1, 0)
    expected = PeftModel.from_pretrained(load(base, "SEQ_CLS"), out)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_rounded_once(run: Run, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each weight is the nearest bfloat16 to W + s B A of the unquantized base, computed here by hand."""
    keys = "bf16: true\nadapter: qlora\nload_in_4bit: true\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\n"
    out = run(base, keys=keys, **LINEAR)
    printed = merged(capsys, out)
    assert "bfloat16" in printed and "quantized; that rounding is not in the merged weights" in printed
    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    plain, adapter = load(base, dtype=torch.bfloat16), load_file(out / "adapter_model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    expected = (plain.get_submodule(name).weight.float() + 8 / 4 * b @ a).bfloat16()
    assert model.dtype == torch.bfloat16 and torch.equal(model.get_submodule(name).weight, expected)


def test_a_checkpoint_is_merged_beside_it(run: Run, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(base, **LINEAR)
    checkpoint = out / "checkpoint-20"
    checkpoint.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # as a GRPO job's: without a tokenizer
        (out / name).rename(checkpoint / name)
    storage.seal(checkpoint)
    assert "give one of its checkpoints: checkpoint-20" in refused(capsys, out)
    assert str(out / "merged-checkpoint-20") in merged(capsys, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(out / "merged-checkpoint-20")
    torch.testing.assert_close(logits(model), logits(PeftModel.from_pretrained(load(base), checkpoint)), rtol=1e-4, atol=1e-4)
    AutoTokenizer.from_pretrained(out / "merged-checkpoint-20")

    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    assert "its digest differs" in refused(capsys, checkpoint, "--into", out / "again")


def test_nothing_is_overwritten_and_nothing_half_written(
    run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(base, **LINEAR)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("mine")
    assert "exists already and nothing is overwritten; remove it, or name another" in refused(
        capsys, out, "--into", tmp_path / "kept"
    )
    assert (tmp_path / "kept" / "thesis.txt").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
        assert f"{out / 'merged'} was not written: disk full" in refused(capsys, out)
    assert not list(out.glob("*merged*")) and not list(out.glob(".merged*"))
    (tmp_path / "empty").mkdir()
    merged(capsys, out, "--into", tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()


def test_what_cannot_be_merged_is_one_message(run: Run, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no folder" in refused(capsys, tmp_path / "nowhere")
    assert "holds a whole model, so there is nothing to merge" in refused(capsys, base)
    assert "holds no adapter; give the output_dir of a finished run" in refused(capsys, tmp_path)
    out = run(base, **LINEAR)
    weights, config = out / "adapter_model.safetensors", out / "adapter_config.json"
    whole, said = load_file(weights), config.read_text()
    first = sorted(whole)[0]
    save_file({name: tensor for name, tensor in whole.items() if name != first}, weights)
    assert f"{first} is missing, and to the base_model of shape" in refused(capsys, out)
    save_file({**whole, first: torch.zeros(4, 7)}, weights)
    assert f"{first} is of shape [4, 7], and to the base_model of shape" in refused(capsys, out)
    save_file({**whole, first: whole[first] * torch.nan}, weights)
    assert f"{first} holds NaN or infinity" in refused(capsys, out)
    weights.write_bytes(b"no tensors")
    assert f"{weights} cannot be read" in refused(capsys, out)
    save_file(whole, weights)
    config.write_text(json.dumps({**json.loads(said), "target_modules": ["no_such_projection"]}))
    assert "does not belong to this base_model" in refused(capsys, out)
    config.write_text("{")
    assert f"{config} cannot be read" in refused(capsys, out)
    config.write_text(said)
    (out / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in refused(capsys, out)
    (out / "config.yaml").rename(out / "config.yml")
    assert "has no config.yaml" in refused(capsys, out)
    assert not (out / "merged").exists()
