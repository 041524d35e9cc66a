"""The demo's recipe on one GPU and on two: engines beside the trainer and in turn with it, the model whole and in shards; and
full fine-tuning.
"""

from pathlib import Path

import pytest

from actors.device import gpu_count
from tests.e2e.conftest import finish, start
from tests.e2e.test_run import records

pytestmark = pytest.mark.gpu


HALF = ["resources_per_worker={GPU: 0.5}", "ray.engine_gpus=0.4"]
COLOCATE = ["trl.vllm_mode=colocate", "trl.vllm_enable_sleep_mode=true", "vllm.gpu_memory_utilization=0.3"]
ONE_GPU = {
    "fused": HALF,
    "adapter": [*HALF, "ray.sync=adapter"],
    "async": [*HALF, "ray.max_staleness=1"],
    "colocate": COLOCATE,
    "fsdp2": [*HALF, "fsdp_version=2"],
    "zero2": [*HALF, "deepspeed={zero_optimization: {stage: 2}}"],
}
RANKS = ["ray_num_workers=2", "gradient_accumulation_steps=2"]
TWO_RANKS = [*RANKS, "resources_per_worker={GPU: 0.6}", "ray.engine_gpus=0.4"]
TWO_GPUS = {
    "separate": [],
    "separate, async": ["ray.max_staleness=1"],
    "colocate": [*RANKS, *COLOCATE],
    "whole copies": TWO_RANKS,
    "fsdp2": [*TWO_RANKS, "fsdp_version=2"],
    "zero3": [*TWO_RANKS, "deepspeed={zero_optimization: {stage: 3}}"],
}


def learns(tmp_path: Path, *overrides: str, recipe: str = "smollm2-lora-cpu") -> list[dict[str, float]]:
    """Runs a recipe; returns the records of its steps."""
    out = tmp_path / "out"
    job = ["run", f"configs/grpo/{recipe}.yaml", f"output_dir={out}", "vllm.enforce_eager=true"]
    code, output = finish(start(*job, *overrides))
    assert code == 0, output
    before, after = (record["eval/accuracy"] for record in records(out, "eval"))
    assert after > before + 0.1, output
    return records(out, "train")


@pytest.mark.parametrize("placement", ONE_GPU)
def test_one_gpu(tmp_path: Path, placement: str) -> None:
    train = learns(tmp_path, *ONE_GPU[placement])
    if placement == "colocate":
        assert all(record["gpu_free_training"] > record["gpu_free_sampling"] + 5 for record in train)


@pytest.mark.skipif(gpu_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("placement", TWO_GPUS)
def test_two_gpus(tmp_path: Path, placement: str) -> None:
    learns(tmp_path, *TWO_GPUS[placement])


@pytest.mark.parametrize("overrides", [[], ["fsdp_version=2"]], ids=["whole", "fsdp2"])
def test_all_weights(tmp_path: Path, overrides: list[str]) -> None:
    learns(tmp_path, *HALF, *overrides, recipe="smollm2-full-cpu")


def test_a_base_of_four_bits(tmp_path: Path) -> None:
    """It starts from less, since rounding costs this small model half of what it knew."""
    learns(tmp_path, *HALF, "adapter=qlora", "load_in_4bit=true")
