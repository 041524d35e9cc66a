"""`plan` and `advise` for the machines of a running cluster, whose GPUs are only said."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.hardware import GIB
from tests.e2e.conftest import REPOSITORY, Head, head_node, run

pytestmark = pytest.mark.slow
PROGRAM = [sys.executable, "-m", "orchestrator"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node(8, "--num-gpus=2", "--labels=ray.io/accelerator-type=H100") as head:
        yield head


def test_it_is_asked_what_it_has(job: Callable[..., Path], head: Head, tmp_path: Path) -> None:
    there = {**head.environment, "RAY_ADDRESS": head.gcs}
    code, output = run([*PROGRAM, "plan", str(job()), "--json"], there)
    assert code == 0, output
    plan = json.loads(output[output.index("{") :])
    (node,) = plan["nodes"]
    assert (node["gpu_type"], node["gpu_bytes"], node["resources"]["GPU"]) == ("H100", 80 * GIB, 2.0)
    assert {bundle["actor"]: bundle["resources"]["GPU"] for bundle in plan["bundles"]} == {"trainer 0": 1.0, "engine 0": 1.0}
    assert not (tmp_path / "out").exists(), "nothing was started"
    code, output = run([*PROGRAM, "plan", str(job(ray__engines=2))], there)
    assert code == 1 and "the cluster cannot hold this job" in output and "ray.engines=1" in output, output


def test_advice_is_for_what_is_there(head: Head, tmp_path: Path, llama: Path) -> None:
    rows, written = REPOSITORY / "configs/sft/tickets-train.jsonl", tmp_path / "job.yaml"
    command = [*PROGRAM, "advise", str(rows), "--model", str(llama), "--write", str(written)]
    code, output = run(command, {**head.environment, "RAY_ADDRESS": head.gcs})
    assert code == 0 and "2 x 80 GB: 1 rank" in output, output
    assert "rl" not in yaml.safe_load(written.read_text()), "rows of messages are for SFT"
