"""The memory model beside what jobs really need. `-rP` shows the figures:

python -m pytest -m slow tests/e2e/test_plan_check.py -rP     on CPUs
python -m pytest -m gpu tests/e2e/test_plan_check.py -rP      on a GPU
"""

import json
import os
import subprocess
import sys

import pytest

from orchestrator.memory_check import TOLERANCE
from tests.e2e.conftest import REPOSITORY

# A recipe with rows that two cores are done with in seconds, and with rows that a GPU has something to do for.
SHORT = ("sequence_len=96", "micro_batch_size=4", "gradient_accumulation_steps=2")
LONG = ("sequence_len=1024", "micro_batch_size=8", "gradient_accumulation_steps=2")
SAVING = "gradient_checkpointing=true"
FEW = ("gradient_accumulation_steps=2",)
MANY = ("sequence_len=768", "trl.max_completion_length=256", "resources_per_worker={GPU: 0.5}", "ray.engine_gpus=0.4", *FEW)
JOBS = {
    "SFT, lora": ("sft/smollm2-lora-cpu.yaml", SHORT, LONG),
    "SFT, qlora": ("sft/smollm2-qlora-cpu.yaml", SHORT, LONG),
    "SFT, full, packed": ("sft/smollm2-full-cpu.yaml", SHORT, LONG),
    "SFT, full, checkpointed": ("sft/smollm2-full-cpu.yaml", (*SHORT, SAVING), (*LONG, SAVING)),
    "DPO, lora": ("dpo/smollm2-lora-cpu.yaml", SHORT, LONG),
    "GRPO, lora": ("grpo/smollm2-lora-cpu.yaml", FEW, MANY),
    "GRPO, full": ("grpo/smollm2-full-cpu.yaml", FEW, MANY),
}


def compare(name: str, overrides: tuple[str, ...]) -> None:
    recipe = REPOSITORY / "configs" / JOBS[name][0]
    command = [sys.executable, "-m", "orchestrator", "plan", str(recipe), *overrides, "--check", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, text=True, capture_output=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)["measured"]
    assert measured
    for one in measured:
        off = one["planned"] / one["measured"] - 1
        print(f"{name}, {one['actor']}: planned {one['planned']:,} bytes, measured {one['measured']:,}, {off:+.1%}")
        assert abs(off) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_on_cpus(name: str) -> None:
    compare(name, JOBS[name][1])


@pytest.mark.gpu
@pytest.mark.parametrize("name", JOBS)
def test_on_a_gpu(name: str) -> None:
    compare(name, JOBS[name][2])
