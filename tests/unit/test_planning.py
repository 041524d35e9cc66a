"""Whether jobs fit on clusters that exist only here, and what would make them fit; how that is drawn."""

import dataclasses
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from actors.errors import ConfigError
from orchestrator import planning
from orchestrator.drawing import drawing
from orchestrator.fit import gpus_of
from orchestrator.hardware import GIB, said
from orchestrator.plan import Node, make_plan
from orchestrator.planning import Planned, Read, planned, suggestions, with_changes
from orchestrator.schema import JobConfig
from tests.models import model_job, save_configs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_configs(tmp_path_factory.mktemp("models"))


def read(config: JobConfig) -> Read:
    return Read(config, rows=100, reward_models=(), tokens=None)


def plan_on(config: JobConfig, cluster: str | list[Node]) -> Planned:
    return planned(config, said(cluster) if isinstance(cluster, str) else cluster, read(config))


GRPO: dict[str, Any] = {
    "rl": "grpo", "sequence_len": 1024, "trl__max_completion_length": 512, "micro_batch_size": 2,
    "gradient_accumulation_steps": 8, "gradient_checkpointing": True,
}  # fmt: skip
SHARDED = {**GRPO, "fsdp_version": 2, "ray_num_workers": 4}
SAVING = {"gradient_checkpointing": True}
SLOW = pytest.mark.slow
LONG_ROWS = {"sequence_len": 2048, "micro_batch_size": 4}
COLOCATED = {"trl__vllm_mode": "colocate", "vllm__gpu_memory_utilization": 0.5}


def test_shares_of_a_gpu_go_where_one_is_begun() -> None:
    nodes = [Node("a", {"CPU": 16.0, "GPU": 4.0}, gpu_bytes=GIB)]
    config = model_job("m", "lora", **GRPO, resources_per_worker={"GPU": 0.6}, ray__engine_gpus=0.4, ray__engines=3)
    # The trainer begins the first GPU, and one engine still goes on it; the others share the second.
    assert gpus_of(make_plan(config, nodes, 100)) == [(0,), (0,), (1,), (1,)]
    parallel = model_job("m", "lora", **GRPO, vllm__tensor_parallel_size=2)
    assert gpus_of(make_plan(parallel, nodes, 100)) == [(2,), (0, 1)]


def test_a_gpu_that_is_shared_holds_both(models: dict[str, str]) -> None:
    config = model_job(models["Qwen2.5-1.5B"], "lora", **GRPO, resources_per_worker={"GPU": 0.5}, ray__engine_gpus=0.5)
    (place,) = plan_on(config, "1x24GB").fit.places
    assert [share.actor for share in place.shares] == ["trainer 0", "engine 0"]
    engine = place.shares[1].memory
    assert engine.total == round(0.5 * 0.9 * 24 * GIB)  # its share of what vLLM takes


def test_engines_that_sleep_leave_room_to_train(models: dict[str, str]) -> None:
    """14 GB of LoRA training beside an engine of 12 GB: one after the other they have room in 24, side by side not."""
    config = model_job(models["Qwen2.5-3B"], "lora", **{**GRPO, "gradient_checkpointing": False}, **COLOCATED)
    beside = plan_on(config, "1x24GB")
    assert "trainer 0 and engine 0 need" in beside.problems[0]
    asleep = plan_on(with_changes(config, {"trl.vllm_enable_sleep_mode": True}), "1x24GB")
    assert not asleep.problems


def test_whole_policies_need_room_in_the_object_store(models: dict[str, str]) -> None:
    """Of 70.6 billion weights in two bytes each there are two: 282e9 bytes, and Ray takes 200e9 of a large machine."""
    parts = {"fsdp_version": 2, "ray_num_workers": 8, "vllm__tensor_parallel_size": 4}
    whole = model_job(models["Llama-3.1-70B"], None, **GRPO, **parts)
    (note,) = plan_on(whole, "2x8x80GB").fit.notes
    assert "holds 2 policies, 262.8 GB, on" in note and "has 186.3 GB unless" in note
    assert not plan_on(model_job(models["Llama-3.1-70B"], "lora", **GRPO, **parts), "2x8x80GB").fit.notes
    assert not plan_on(model_job(models["Llama-3.1-8B"], None, **GRPO), "8x80GB").fit.notes


def test_an_engine_without_room_for_one_sequence_is_told(models: dict[str, str]) -> None:
    (problem,) = plan_on(model_job(models["Qwen2.5-14B"], "qlora", **GRPO), "2x24GB").problems[-1:]
    assert "its KV cache holds 0 tokens; one sequence may have 1024" in problem and "weights of 27.5 GB" in problem


def test_bundles_that_are_too_large_are_told_once(models: dict[str, str]) -> None:
    config = model_job(models["Llama-3.1-70B"], "lora", ray_num_workers=8, gradient_checkpointing=True)
    (problem,) = plan_on(config, "8x80GB").problems
    assert (
        problem.startswith("worker 0 needs 140.8 GB") and "GPU 0 of node 0 (and 7 more like it), which has 80.0 GB" in problem
    )
    assert "weights 132" in problem


def test_machines_without_gpus_hold_all_their_actors(models: dict[str, str]) -> None:
    nodes = [Node("small", {"CPU": 4.0}, memory=8 * GIB)]
    config = model_job(models["Qwen2.5-1.5B"], "lora", **{**GRPO, "ray__kv_cache_gib": 2, "bf16": False})
    (problem,) = plan_on(config, nodes).problems
    assert "trainer 0 and engine 0 need" in problem and "the memory of small, which has 8.0 GB" in problem
    assert not plan_on(config, [dataclasses.replace(nodes[0], memory=40 * GIB)]).problems
    assert not plan_on(config, [dataclasses.replace(nodes[0], memory=None)]).problems  # what is not known is no problem


# What would make it fit.


@pytest.mark.parametrize(
    ("name", "adapter", "changes", "cluster", "expected"),
    [
        ("Qwen2.5-7B", None, LONG_ROWS, "1x80GB", {"gradient_checkpointing", "micro_batch_size", "adapter"}),
        pytest.param("Llama-3.1-70B", "lora", SAVING, "4x80GB", {"fsdp_version", "adapter"}, marks=SLOW),
        pytest.param("Qwen2.5-32B", "lora", SHARDED, "8x40GB", {"vllm.tensor_parallel_size"}, marks=SLOW),
        ("Qwen2.5-3B", "lora", GRPO, "1x24GB", {"trl.vllm_mode"}),
        ("Qwen2.5-7B", None, {**SAVING, "fsdp_version": 2, "ray_num_workers": 2}, "2x48GB", {"bf16", "adapter"}),
    ],
)  # fmt: skip
def test_suggestions_fit(
    models: dict[str, str], name: str, adapter: str | None, changes: dict[str, Any], cluster: str, expected: set[str]
) -> None:
    config = model_job(models[name], adapter, **changes)
    assert plan_on(config, cluster).problems
    found = suggestions(config, said(cluster), read(config))
    assert found and expected <= {key for suggestion in found for key in suggestion.changes}
    for suggestion in found:
        changed = plan_on(with_changes(config, suggestion.changes), cluster)
        assert not changed.problems and changed.fullest == suggestion.fullest <= 1.0


def test_a_step_keeps_its_rows(models: dict[str, str]) -> None:
    config = model_job(models["Qwen2.5-7B"], None, sequence_len=2048, micro_batch_size=4)
    for suggestion in suggestions(config, said("1x80GB"), read(config)):
        changed = with_changes(config, suggestion.changes)
        assert changed.micro_batch_size * changed.gradient_accumulation_steps == 4


def test_engines_have_as_many_gpus_as_divide_the_models_heads(
    models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 28 heads."""
    config = model_job(models["Qwen2.5-7B"], "lora", **GRPO, vllm__tensor_parallel_size=8)
    expected = r"tensor_parallel_size: is 8, which does not divide the 28 attention heads .*; use one of 1, 2, 4, 7, 14, 28$"
    with pytest.raises(ConfigError, match=expected):
        plan_on(config, "2x8x80GB")
    assert not plan_on(with_changes(config, {"vllm.tensor_parallel_size": 4}), "2x8x80GB").problems
    # With 60 % of 9 GB, 4 GPUs have no room for a KV cache beside the weights; 8 would, and nothing else alone.
    small = with_changes(config, {"fsdp_version": 2, "ray_num_workers": 8, "vllm.tensor_parallel_size": 4})
    small.vllm.gpu_memory_utilization = 0.6
    monkeypatch.setattr(planning, "MOST_CHANGES", 1)
    assert "its KV cache holds 0 tokens" in plan_on(small, "2x8x9GB").problems[0]
    assert suggestions(small, said("2x8x9GB"), read(small)) == []


@SLOW
def test_what_would_be_no_job_is_not_suggested(models: dict[str, str]) -> None:
    """KTO compares the rows of a batch, so one of two rows cannot be cut in half."""
    config = model_job(models["Qwen2.5-7B"], "lora", rl="kto", sequence_len=2048, micro_batch_size=2)
    found = suggestions(config, said("1x24GB"), read(config))
    assert found and all("micro_batch_size" not in suggestion.changes for suggestion in found)


@SLOW
def test_nothing_is_suggested_where_nothing_helps(models: dict[str, str]) -> None:
    config = model_job(models["Llama-3.1-70B"], "qlora", gradient_checkpointing=True)
    assert suggestions(config, said("1x24GB"), read(config)) == []


# How it is drawn.


def drawn(job: Planned) -> str:
    written = StringIO()
    Console(width=100, file=written).print(drawing(job))
    return written.getvalue()


def test_what_is_alike_is_drawn_once(models: dict[str, str]) -> None:
    config = model_job(
        models["Qwen2.5-72B"], "lora", **GRPO, fsdp_version=2, ray_num_workers=8, vllm__tensor_parallel_size=4, ray__engines=12
    )
    text = drawn(plan_on(config, "8x8x80GB"))
    assert "node 0 to node 5, 6 alike: 128 CPU + 8 GPU of 80.0 GB" in text
    assert "GPU 0-7 engine 0-1" in text and "GPU 0-7 trainer 0-7" in text and "72.0 of 80.0 GB" in text
    assert "8 GPU free" in text
    assert "W weights" in text and "K kv cache" in text


def test_a_bar_is_as_long_as_what_is_needed(models: dict[str, str]) -> None:
    config = model_job(models["Qwen2.5-7B"], "lora", gradient_checkpointing=True)
    (line,) = (line for line in drawn(plan_on(config, "1x80GB")).splitlines() if "worker 0" in line)
    bar = line.split("worker 0 ")[1].split(" ")[0]
    place = plan_on(config, "1x80GB").fit.places[0]
    assert place.capacity and len(bar) == 32
    assert 32 - bar.count(".") == pytest.approx(32 * place.total / place.capacity, abs=1)
    assert bar.count("W") == pytest.approx(32 * place.shares[0].memory.terms["weights"] / place.capacity, abs=1)
    too_large = drawn(plan_on(model_job(models["Llama-3.1-70B"], "lora", gradient_checkpointing=True), "1x80GB"))
    assert "of 80.0 GB, too much" in too_large
