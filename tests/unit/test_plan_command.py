"""`eagleray plan` as a person types it, on clusters that are only said. Nothing is started."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from actors import device
from orchestrator import cluster
from orchestrator.cli import main
from orchestrator.memory_check import Measured
from orchestrator.plan import Node
from orchestrator.plan_command import told
from tests.models import CONFIGS
from tests.tiny import save_llama

GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, a tokenizer, and the config.json of a model that has no weights here."""
    folder = tmp_path_factory.mktemp("job")
    save_llama(folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIGS["Llama-3.1-8B"]))
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "w{i} w{i + 1} w5"}}\n' for i in range(3, 23)))
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "{"w4 " * n}"}}\n' for n in (3, 5)))
    return folder


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


def write(folder: Path, **changes: Any) -> str:
    job: dict[str, Any] = {"base_model": str(folder / "model"), "learning_rate": 1e-4, "sequence_len": 1024} | changes
    if job.get("rl") == "grpo":
        job["datasets"] = [{"path": str(folder / "prompts.jsonl")}]
        job |= {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "gradient_accumulation_steps": 8}
        job["trl"] = {"max_completion_length": 100, "reward_funcs": ["a.b"]}
    else:
        job["datasets"] = [{"path": str(folder / "texts.jsonl"), "type": "completion"}]
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return str(path)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_job_that_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, write(folder, rl="grpo"), "--cluster", "2x80GB")
    assert (code, err) == (0, "")
    assert "GPU 0 trainer 0 W" in out and "GPU 1 engine 0  W" in out and "72.0 of 80.0 GB" in out
    # 8 completions of one prompt of 3 tokens
    assert "expected    up to 803 tokens a step, prompts of 3 tokens on average" in out
    # 72 GB less 15 of weights, and 1 or 2 of work, of 128 KiB a token
    assert re.search(r"kv cache    4[345]\d,\d{3} tokens an engine: 4[234]\d sequences of 1024 at once", out)
    assert not (Path.cwd() / "model-out").exists()


def test_a_job_that_does_not_fit_and_what_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, write(folder), "--cluster", "1x24GB")
    assert code == 1 and "of 24.0 GB, too much" in out
    assert err.startswith("eagleray: the cluster cannot hold this job:\n  worker 0 needs 6")
    assert "GPU 0 of node 0, which has 24.0 GB: (" in err and "weights 15.0 GB" in err
    lines = err.splitlines()
    first = lines[lines.index("  with one of these it would:") + 1].split("  (")[0].split()
    assert first[0] == "gradient_checkpointing=true" or first[0].startswith("adapter=")
    code, _, err = plan(capsys, write(folder), *first, "--cluster", "1x24GB")
    assert (code, err) == (0, "")  # as it stands there, it can be put on the command line


def test_nothing_that_helps_is_said_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, write(folder), "--cluster", "1x2GB")
    assert code == 1 and "makes it fit; use more or larger GPUs" in err


def test_json_says_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, write(folder, rl="grpo"), "--cluster", "2x80GB", "--json")
    found = json.loads(out)
    assert (code, found["fits"], found["problems"], found["tokens_per_step"]) == (0, True, [], 803)
    places = [(place["node"], place["gpu"], place["capacity"]) for place in found["memory"]]
    assert places == [(0, 0, 80 * GIB), (0, 1, 80 * GIB)]
    trainer = found["memory"][0]["actors"]["trainer 0"]
    assert sum(trainer["terms"].values()) == found["memory"][0]["needed"]
    assert [bundle["actor"] for bundle in found["bundles"]] == ["trainer 0", "engine 0"]
    code, out, err = plan(capsys, write(folder), "--cluster", "1x24GB", "--json")
    found = json.loads(out)
    assert code == 1 and not found["fits"] and found["suggestions"][0]["fullest"] <= 1
    assert err.startswith("eagleray: the cluster cannot hold this job")


def test_rows_are_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = write(folder, micro_batch_size=4, gradient_accumulation_steps=2)
    # texts of 3 and 5 tokens and their ends, 8 rows a step
    assert "expected    about 40 tokens a step, rows of 5 tokens on average" in plan(capsys, job, "--cluster", "1x80GB")[1]
    assert "about 8,192 tokens" in plan(capsys, job, "sample_packing=true", "--cluster", "8x80GB")[1]


def test_what_is_wrong_ends_in_one_message(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    good = write(folder, rl="grpo")
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "config.json").write_text('{"model_type": "nobody-knows"}')
    cases = {
        ("--cluster", "many"): "--cluster many: say auto, 8x80GB",
        ("--cluster", "8x80GB", "--check"): "--check measures on the machines that are there; leave --cluster out",
        (f"base_model={folder}/broken", "--cluster", "2x80GB"): "broken/config.json cannot be read",
        ("base_model=nobody/nothing", "--cluster", "2x80GB"): "nobody/nothing is no folder, not in the hub's cache",
        ("lora_target_linear=false", "lora_target_modules=[zz]", "--cluster", "2x80GB"): "lora_target_modules: Target modules",
    }
    for arguments, expected in cases.items():
        code, _, err = plan(capsys, good, *arguments)
        assert code == 1 and err.count("eagleray: ") == 1 and expected in err and "Traceback" not in err, (arguments, err)
    monkeypatch.setattr(cluster, "local_nodes", lambda: [Node("gpus", {"CPU": 8.0, "GPU": 2.0})])
    code, _, err = plan(capsys, good)
    assert code == 1 and "the GPUs of gpus are of an unknown type; say how large they are, such as --cluster 8x80GB" in err


def test_changes_are_written_as_overrides() -> None:
    changes = {"fsdp_version": 2, "load_in_4bit": True, "resources_per_worker": {"GPU": 0.5}}
    assert told(changes) == "fsdp_version=2 load_in_4bit=true resources_per_worker={GPU: 0.5}"


# What `--check` compares, and how it measures.


def test_the_peak_of_tensors_on_a_cpu() -> None:
    import torch

    if device.has_gpu():
        pytest.skip("measures CPU tensors")
    million = 2**20
    held = torch.zeros(3, million)
    with device.measured() as peak:
        first = torch.zeros(million)
        del first
        second = torch.zeros(2, million)
        product = (second + second).sum()  # a third and a fourth for a moment
    found = peak()
    assert held.nbytes <= found and product == 0
    assert device.tensor_bytes() >= held.nbytes + second.nbytes
    # What other tests hold is in both numbers.
    assert found - device.tensor_bytes() == pytest.approx(2 * 4 * million, abs=2**16)


def test_a_plan_may_be_fifteen_percent_off() -> None:
    from orchestrator.memory import Memory

    memory = Memory("backward pass", {"weights": 100, "activations": 15, "overhead": 900})
    assert Measured("trainer 0", memory, 100).agrees and not Measured("trainer 0", memory, 99).agrees
    assert not Measured("trainer 0", memory, 136).agrees and Measured("trainer 0", memory, 135).agrees
