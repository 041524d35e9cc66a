"""Through Ray's job API, on a cluster that is already running, with its token and its dashboard."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import requests

from tests.e2e.conftest import REPOSITORY, finish

pytestmark = pytest.mark.slow
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture(scope="module")
def head() -> Iterator[tuple[str, dict[str, str]]]:
    """A head node on free ports; yields the dashboard's address and the environment that knows its token."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    with TemporaryDirectory(prefix="er", dir="/tmp") as folder:
        environment = {**os.environ, "HOME": folder, "RAY_TMPDIR": folder}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as an activated .venv has it
        environment["EAGLERAY_CACHE"] = str(Path.home() / ".cache" / "eagleray")
        for name in ("RAY_ADDRESS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
            environment.pop(name, None)
        command = [*RAY, "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
        command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--temp-dir={folder}"]
        with open(Path(folder) / "head.log", "w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{ports[1]}"
        try:
            for _ in range(120):
                try:
                    requests.get(address, timeout=1)
                    break
                except requests.ConnectionError:
                    assert process.poll() is None, (Path(folder) / "head.log").read_text()
                    time.sleep(0.5)
            yield address, environment
        finally:
            process.terminate()
            process.wait(30)


def run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return finish(process, 400)


def test_submit_runs_the_job_and_returns_its_code(
    head: tuple[str, dict[str, str]], job: Callable[..., Path], tmp_path: Path
) -> None:
    address, environment = head
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
