"""The demo's recipe on a GPU that trainer and engine share."""

from pathlib import Path

import pytest

from tests.e2e.conftest import finish, start
from tests.e2e.test_run import records

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sync", ["fused", "adapter"])
def test_the_demo_recipe_learns_on_a_shared_gpu(tmp_path: Path, sync: str) -> None:
    shared = ["resources_per_worker={GPU: 0.5}", "ray.engine_gpus=0.5", "vllm.enforce_eager=true"]
    out = tmp_path / "out"
    code, output = finish(
        start("run", "configs/grpo/smollm2-lora-cpu.yaml", f"output_dir={out}", f"ray.sync={sync}", *shared)
    )
    assert code == 0, output
    before, after = (record["eval/accuracy"] for record in records(out, "eval"))
    assert after > before + 0.2, output
    train = records(out, "train")
    print({name: max(record[name] for record in train) for name in ("probe_gap", "engine_gap")})
