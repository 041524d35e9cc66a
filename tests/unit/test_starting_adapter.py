"""Job files with lora_model_dir: the adapter says what it is, and what contradicts it is named before anything starts."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.errors import ConfigError
from orchestrator import config as configuration
from orchestrator.dataset_job import identity
from orchestrator.jobs import with_absolute_paths
from orchestrator.runnable import ensure_runnable
from orchestrator.starting_adapter import adopted, ensure_fits

pytestmark = pytest.mark.usefixtures("one_thread")
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
    shutil.copytree(tmp_path / "moved", other)
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    assert identity(started(tmp_path, base, other)) != saved
