"""Through Ray's job API, on a cluster that is already running, with its token and its dashboard."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import RAY, REPOSITORY, Head, head_node, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node(cpus=2) as head:
        yield head


def test_submit_runs_the_job_and_returns_its_code(
    head: Head, job: Callable[..., Path], tmp_path: Path
) -> None:
    address, environment = head.dashboard, head.environment
    config = job()
    code, output = run([sys.executable, "-m", "orchestrator", "submit", str(config), "--address", address], environment)
    assert code == 1 and "is outside the current folder" in output

    text = config.read_text()
    travelling = REPOSITORY / "configs" / "submit-test.yaml"
    travelling.write_text(text)
    try:
        command = [sys.executable, "-m", "orchestrator", "submit", str(travelling), "--address", address]
        rewards = "trl.reward_funcs=[configs.grpo.sums.brief]"
        code, output = run([*command, rewards], environment)
        assert code == 0, output
        assert "done: 4 steps" in output and "succeeded" in output
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
        top = [sys.executable, "-m", "orchestrator", "top", "--address", address, "--once"]
        code, output = run(top, environment)
        assert code == 0, output
        assert "● done" in output and "step 4 of 4" in output, "by the links in Ray's folder of logs"
        without_token = {**environment, "HOME": str(tmp_path)}
        code, output = run(top, without_token)
        assert code == 1 and "refuses this token, or none" in output, output
        code, output = run([*command, rewards], environment)
        assert code == 1, output
        assert "holds an earlier run" in output and "failed" in output

        entry = ["--", "python", "-m", "orchestrator", "run", "configs/submit-test.yaml", rewards, f"output_dir={tmp_path}/two"]
        code, output = run([*RAY, "job", "submit", "--address", address, "--working-dir", ".", *entry], environment)
        assert code == 0, output
        assert (tmp_path / "two" / "adapter_model.safetensors").is_file()
    finally:
        travelling.unlink()


def test_no_cluster_is_one_message(job: Callable[..., Path]) -> None:
    command = [sys.executable, "-m", "orchestrator", "submit", "configs/grpo/smollm2-lora-cpu.yaml"]
    code, output = run([*command, "--address", "http://127.0.0.1:9"], dict(os.environ))
    assert code == 1
    assert "no Ray cluster answers at http://127.0.0.1:9" in output
    assert "Traceback" not in output
