"""What commands that use a result find in the folders that runs leave, and what engines load of it."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors import hub, snapshot, storage
from actors.adapter import as_snapshot
from actors.errors import CheckpointError, EaglerayError
from actors.formats.templates import CHAT_TEMPLATES
from actors.model import expected_shapes
from actors.specs import ModelSpec
from orchestrator.answering import tokenizer_of
from orchestrator.cli import main
from orchestrator.config import load
from orchestrator.display import Display
from orchestrator.jobs import folders_of, lora_spec, write_config
from orchestrator.results import Result, find, loadable, step_of
from tests.tiny import load_plain, save_adapter, save_llama

pytestmark = pytest.mark.usefixtures("one_thread")
Run = Callable[..., Path]


class Told(Display):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.text = io.StringIO()
        super().__init__(Console(file=self.text))


def found(folder: Path) -> Result:
    return find(folder, Told())


@pytest.fixture
def run(tmp_path: Path, base: str) -> Run:
    """Writes what a run leaves in a folder of it, `where`; by default a finished one with an adapter."""

    def write(where: str = ".", *, keys: str = "", saved: bool = True, whole: bool = False, **lora: Any) -> Path:
        out = tmp_path / "sums"
        folder = out / where
        folder.mkdir(parents=True, exist_ok=True)
        adapter = "" if whole else "adapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\n"
        job = f"base_model: {base}\nlearning_rate: 1e-3\nbf16: false\ndatasets: [{{path: none.jsonl, type: completion}}]\n"
        (out / "config.yaml").write_text(job + adapter + keys)
        if saved and whole:
            save_llama(folder)
        elif saved:
            save_adapter(base, folder, **{"target_modules": "all-linear", **lora})
        if where.startswith("checkpoint-"):
            step = int(where.removeprefix("checkpoint-"))
            storage.write_json(folder / storage.STATE, {"step": step, "job": {}})
            save_file({"exp_avg": torch.ones(2)}, folder / "optimizer.safetensors")
            storage.seal(folder)
        return out

    return write


def test_a_run_is_its_result(run: Run) -> None:
    out = run()
    result = found(out)
    assert (result.folder, result.run, result.name, result.adapted) == (out, out, "sums", True)
    assert result.tokenizer is None and step_of(result) is None
    AutoTokenizer.from_pretrained(result.config.base_model).save_pretrained(out)
    assert found(out).tokenizer == str(out)


def test_a_run_that_has_not_ended_is_its_newest_whole_checkpoint(run: Run) -> None:
    run("checkpoint-2")
    run("checkpoint-10")
    out = run("checkpoint-12")
    (out / "checkpoint-12" / storage.MANIFEST).unlink()  # being written
    told = Told()
    result = find(out, told)
    assert (result.folder, result.name, step_of(result)) == (out / "checkpoint-10", "sums/checkpoint-10", 10)
    assert "newest checkpoint, checkpoint-10" in told.text.getvalue()
    assert step_of(found(out / "checkpoint-2")) == 2
    run()
    assert found(out).folder == out


def test_whole_models_and_merged_ones(run: Run) -> None:
    out = run("merged", whole=True)
    assert (found(out / "merged").name, found(out / "merged").adapted) == ("sums/merged", False)
    assert not found(run(whole=True)).adapted


def test_what_is_no_result_is_one_message(run: Run, tmp_path: Path, base: str) -> None:
    cases: dict[Path, str] = {
        tmp_path / "nowhere": "there is no folder",
        Path(base): "is no output_dir of a run: it has no config.yaml",
        run("rollouts", saved=False) / "rollouts": "holds no adapter and no model; give the output_dir",
        run(saved=False): "holds no adapter, no model and no whole checkpoint yet; wait for its first one",
    }
    for folder, message in cases.items():
        with pytest.raises(EaglerayError, match=message):
            found(folder)
    with pytest.raises(EaglerayError, match="holds a reward model, which scores answers and gives none"):
        found(run(keys="rl: reward_trainer\n"))


def test_a_damaged_checkpoint_is_told_before_anything_is_loaded(run: Run) -> None:
    weights = run("checkpoint-3") / "checkpoint-3" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is not what was written"):
        found(weights.parent)


def test_an_adapter_of_linear_layers_is_loaded_beside_its_base(run: Run, base: str) -> None:
    out = run()
    with loadable(found(out), Told()) as weights:
        assert (weights.model, weights.adapter) == (base, out)
    whole = load_file(out / "adapter_model.safetensors")
    first = sorted(whole)[0]
    save_file({**whole, first: whole[first] * torch.nan}, out / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds NaN or infinity"), loadable(found(out), Told()):
        pass


@pytest.mark.parametrize("kind", ["dora", "head"])
def test_an_adapter_that_no_engine_knows_is_merged_for_as_long_as_it_is_used(run: Run, base: str, kind: str) -> None:
    lora: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"modules_to_save": ["lm_head"]}
    out = run(**lora)
    before = set(out.iterdir())
    with loadable(found(out), Told()) as weights:
        assert weights.adapter is None
        merged = AutoModelForCausalLM.from_pretrained(weights.model)
        ids = torch.tensor([[5, 9, 3, 17]])
        with torch.no_grad():
            expected = PeftModel.from_pretrained(load_plain(base), out)(input_ids=ids).logits
            torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert AutoTokenizer.from_pretrained(weights.model)("w5")["input_ids"] == [5]
    assert set(out.iterdir()) == before


def test_a_whole_model_of_a_checkpoint_comes_without_its_optimizer(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would load all that is called *.safetensors."""
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "cache"))
    checkpoint = run("checkpoint-4", whole=True) / "checkpoint-4"
    with loadable(found(checkpoint), Told()) as weights:
        folders = {Path(hub.resolve(weights.model)) for _ in range(2)}
    (folder,) = folders
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(load_plain(folder).lm_head.weight, load_plain(checkpoint).lm_head.weight)
    assert len(list(folder.parent.iterdir())) == 1


def test_a_template_that_the_job_named_goes_with_its_adapter(run: Run, tmp_path: Path) -> None:
    """An online job's adapter comes without a tokenizer."""
    out = run(keys="rl: grpo\nmicro_batch_size: 8\nchat_template: chatml\ntrl: {reward_funcs: [m.f]}\n")
    assert tokenizer_of(found(out)).chat_template == CHAT_TEMPLATES["chatml"]
    assert main(["merge", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out / "merged").chat_template == CHAT_TEMPLATES["chatml"]
    assert tokenizer_of(found(run())).chat_template is None


def test_an_adapter_becomes_what_engines_validate(run: Run, base: str) -> None:
    """The snapshot holds the file's numbers, and is whole in the eyes of an engine of this base."""
    out = run()
    tensors = load_file(out / "adapter_model.safetensors")
    header, bucket = as_snapshot(tensors, base_model=base, rank=4, scaling=2.0, version=1)
    shapes = expected_shapes(ModelSpec(base, "float32"), lora_spec(found(out).config))
    assert snapshot.validate(header, [bucket], shapes, base_model=base, rank=4, scaling=2.0) == header.digest
    unpacked = snapshot.unpack(header.entries, bucket)
    assert unpacked.keys() == tensors.keys() and all(torch.equal(unpacked[name], tensors[name]) for name in tensors)


def test_a_run_knows_where_its_files_were(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, and in the same places below the current one where the first folder is gone."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "configs").mkdir(parents=True)
    elsewhere.mkdir()
    out = run()
    (project / "configs" / "job.yaml").write_text((out / "config.yaml").read_text())
    monkeypatch.chdir(project)
    write_config(load("configs/job.yaml"), out)
    monkeypatch.chdir(elsewhere)
    expected = [project, project / "configs", elsewhere, elsewhere / "configs"]
    assert folders_of(out) == [str(folder) for folder in expected]
    assert found(out).config.source.folders == [str(folder) for folder in expected]
    assert json.loads((out / "origin.json").read_text()) == {"folder": str(project), "config": "configs/job.yaml"}
