"""Axolotl's keys for shards: what transformers gets, and what is refused or noted before anything starts."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator import sharding
from orchestrator.arguments import training_arguments
from orchestrator.config import load
from orchestrator.dataset_plan import describe, make_dataset_plan
from orchestrator.plan import Node
from orchestrator.runnable import ensure_runnable
from orchestrator.schema import JobConfig

JOB = (
    "base_model: m\nlearning_rate: 1e-4\ndatasets: [{path: rows.jsonl, type: alpaca}]\n"
    "micro_batch_size: 2\ngradient_accumulation_steps: 4\nray_num_workers: 2\nmax_grad_norm: 0.5\n"
)
ZERO3 = "deepspeed: deepspeed_configs/zero3_bf16.json\n"
FSDP = "fsdp_version: 2\n"
QLORA = "adapter: qlora\nload_in_4bit: true\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"


def job(folder: Path, text: str) -> JobConfig:
    path = folder / "job.yaml"
    path.write_text(JOB + text)
    return load(path)


def arguments(config: JobConfig, gpu: bool = True) -> dict[str, Any]:
    return training_arguments(config, gpu=gpu, dtype="bfloat16", steps_per_epoch=10, total_steps=40)


def test_fsdp_as_axolotl_writes_it(tmp_path: Path) -> None:
    text = (
        "fsdp_version: 2\nfsdp_config:\n  offload_params: true\n  cpu_ram_efficient_loading: true\n"
        "  auto_wrap_policy: TRANSFORMER_BASED_WRAP\n  transformer_layer_cls_to_wrap: LlamaDecoderLayer\n"
        "  state_dict_type: FULL_STATE_DICT\n  fsdp_reshard_after_forward: false\n  activation_checkpointing: true\n"
    )
    config = job(tmp_path, text)
    ensure_runnable(config)
    found = arguments(config)
    expected = {
        "version": 2,
        "cpu_offload": True,
        "cpu_ram_efficient_loading": True,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "reshard_after_forward": False,
    }
    assert found["fsdp"] is True and found["fsdp_config"] == expected
    assert found["gradient_checkpointing"] is True, "asked for in fsdp_config"
    assert "cpu_offload" not in arguments(config, gpu=False)["fsdp_config"]
    nodes = [Node("a", {"CPU": 8.0, "GPU": 2.0})]
    assert "sharding    FSDP2" in "\n".join(describe(config, make_dataset_plan(config, nodes)))


@pytest.mark.parametrize(
    ("more", "told"),
    [("", True), ("bf16: false\n", False), (FSDP, False), (f"{FSDP}bf16: full\n", True), (ZERO3, False), (QLORA, False)],
)
def test_updates_that_bfloat16_loses_are_told_of(tmp_path: Path, more: str, told: bool) -> None:
    config = job(tmp_path, more)
    lines = describe(config, make_dataset_plan(config, [Node("a", {"CPU": 8.0, "GPU": 2.0})]))
    assert any("small updates vanish in bfloat16" in line and "fsdp_version: 2" in line for line in lines) == told


@pytest.mark.parametrize(("more", "mixes"), [("", True), (FSDP, False), (FSDP + QLORA, True), (ZERO3, True)])
def test_bf16_full_trains_no_copies_in_fp32(tmp_path: Path, more: str, mixes: bool) -> None:
    """FSDP2 alone makes them, of all weights; without mixed precision DeepSpeed and adapters would compute in fp32."""
    assert arguments(job(tmp_path, f"{more}bf16: full\n"))["bf16"] is mixes
    assert arguments(job(tmp_path, f"{more}bf16: true\n"))["bf16"] is True


@pytest.mark.parametrize(("more", "used"), [("rl: dpo\n", False), ("rl: kto\n", False), ("rl: orpo\n", True), ("", True)])
def test_each_rank_loads_the_reference_of_full_fine_tuning(tmp_path: Path, more: str, used: bool) -> None:
    """TRL shards that model as each rank has loaded it: with this option ranks but the first have zeros."""
    sharded = f"{more}fsdp_version: 2\nfsdp_config: {{cpu_ram_efficient_loading: true}}\n"
    config = job(tmp_path, sharded)
    assert ("cpu_ram_efficient_loading" in arguments(config)["fsdp_config"]) == used
    told = [problem.text for problem in sharding.notes(config) if problem.key == "fsdp_config.cpu_ram_efficient_loading"]
    assert len(told) == (not used) and all("a reference of zeros" in text for text in told)
    assert arguments(job(tmp_path, sharded + QLORA))["fsdp_config"]["cpu_ram_efficient_loading"] is True


def test_deepspeed_from_a_file_beside_the_job(tmp_path: Path) -> None:
    (tmp_path / "zero3.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": True}, "train_micro_batch_size_per_gpu": 2})
    )
    config = job(tmp_path, "deepspeed: zero3.json\n")
    ensure_runnable(config)
    found = arguments(config)["deepspeed"]
    assert found["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["train_batch_size"] == found["gradient_clipping"] == found["gradient_accumulation_steps"] == "auto"
    assert "fsdp" not in arguments(config)


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"),
    [
        ("deepspeed_configs/zero1.json", 1, set()),
        ("/workspace/axolotl/deepspeed_configs/zero2.json", 2, set()),
        ("deepspeed_configs/zero1_torch_compile.json", 1, set()),
        ("deepspeed_configs/zero2_torch_compile.json", 2, {"offload_optimizer"}),
        ("deepspeed_configs/zero3_bf16.json", 3, set()),
        ("deepspeed_configs/zero3_bf16_cpuoffload_params.json", 3, {"offload_param"}),
        ("deepspeed_configs/zero3_bf16_cpuoffload_all.json", 3, {"offload_param", "offload_optimizer"}),
    ],
)
def test_a_file_that_axolotl_ships_need_not_be_there(tmp_path: Path, name: str, stage: int, offloaded: set[str]) -> None:
    config = job(tmp_path, f"deepspeed: {name}\n")
    ensure_runnable(config)
    found = arguments(config)["deepspeed"]["zero_optimization"]
    assert found["stage"] == stage and {part for part in found if part.startswith("offload")} == offloaded


def test_a_file_that_is_there_wins_over_the_one_that_axolotl_ships(tmp_path: Path) -> None:
    (tmp_path / "deepspeed_configs").mkdir()
    (tmp_path / "deepspeed_configs" / "zero3.json").write_text('{"zero_optimization": {"stage": 2}}')
    config = job(tmp_path, "deepspeed: deepspeed_configs/zero3.json\n")
    assert arguments(config)["deepspeed"]["zero_optimization"]["stage"] == 2


def test_nothing_is_sharded_unasked(tmp_path: Path) -> None:
    assert not {"fsdp", "fsdp_config", "deepspeed"} & set(arguments(job(tmp_path, "")))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("deepspeed: nowhere.json\n", ":8: deepspeed: there is no file nowhere.json"),
        ("deepspeed: {zero_optimization: {stage: 5}}\n", ":8: deepspeed: zero_optimization.stage is 5"),
        ("deepspeed: {fp16: {enabled: true}}\n", "deepspeed: fp16 is on"),
        ("deepspeed: {train_micro_batch_size_per_gpu: 3}\n", "is 3, but micro_batch_size is 2; write auto"),
        ("deepspeed: {train_batch_size: 8}\n", "is 8, but the rows of a step is 16; write auto"),
        ("deepspeed: {gradient_clipping: 1.0}\n", "is 1.0, but max_grad_norm is 0.5; write auto"),
        ("deepspeed: {zero_optimization: {stage: 3}}\n" + QLORA, "load_in_4bit: ZeRO-3 does not shard a quantized model"),
        ("fsdp_version: 2\nfsdp_config: {offload_parms: true}\n", "fsdp_config.offload_parms: is not an option"),
        ("fsdp_version: 2\noptimizer: adamw_bnb_8bit\n", "optimizer: adamw_bnb_8bit cannot work on shards"),
        ("fsdp_version: 2\n" + QLORA.replace("qlora", "lora").replace("4bit", "8bit"), "load_in_8bit: FSDP cannot shard int8"),
    ],
)
def test_what_cannot_be_sharded_is_named(tmp_path: Path, text: str, expected: str) -> None:
    config = job(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(expected)):
        ensure_runnable(config)


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{zero")
    with pytest.raises(ConfigError, match=re.escape("deepspeed: ds.json cannot be read as JSON")):
        ensure_runnable(job(tmp_path, "deepspeed: ds.json\n"))


def test_what_fsdp1_had_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "eagleray"):
        options = "fsdp_use_orig_params: true, limit_all_gathers: true, cpu_offload_pin_memory: false"
        config = job(tmp_path, f"fsdp_config: {{{options}}}\n")
        ensure_runnable(config)
    assert arguments(config)["fsdp_config"] == {"version": 2}
    noted = "\n".join(caplog.messages)
    assert "fsdp_config.fsdp_use_orig_params: not used" in noted and "fsdp_config.limit_all_gathers: not used" in noted
    assert "fsdp_config.cpu_offload_pin_memory: not used: it changes memory and speed" in noted
    assert "FSDP2 shards the model, whatever version is written" in noted
