"""Through Ray's job API, on a cluster that is already running, with its token and its dashboard."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import RAY, REPOSITORY, Head, finish, head_node, run

pytestmark = pytest.mark.slow

EAGLERAY = [sys.executable, "-m", "orchestrator"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node(cpus=2) as head:
        yield head


def test_submit_runs_the_job_and_returns_its_code(
    head: Head, job: Callable[..., Path], tmp_path: Path
) -> None:
    address, environment = head.dashboard, head.environment
    travelling = REPOSITORY / "configs" / "submit-test.yaml"
    travelling.write_text(job().read_text())
    try:
        command = [*EAGLERAY, "submit", str(travelling), "--address", address]
        rewards = "trl.reward_funcs=[configs.grpo.sums.brief]"
        code, output = run([*command, rewards], environment)
        assert code == 0, output
        assert "done: 4 steps" in output and "succeeded" in output
        assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
        top = [sys.executable, "-m", "orchestrator", "top", "--address", address, "--once"]
        code, output = run(top, environment)
        assert code == 0, output
        assert "● done" in output and "step 4 of 4" in output, "by the links in Ray's folder of logs"
        code, output = run(top, {**environment, "RAY_AUTH_TOKEN": "another"})
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


def test_jobs_are_listed_followed_and_stopped(head: Head, job: Callable[..., Path], tmp_path: Path) -> None:
    """From another folder than the configuration's, by a person who has the token and sets no RAY_AUTH_MODE."""
    environment = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_MODE"}
    environment |= {"RAY_API_SERVER_ADDRESS": head.dashboard}

    def eagleray(*words: str, **changes: str) -> tuple[int, str]:
        return run([*EAGLERAY, *words], {**environment, **changes})

    (tmp_path / "mine").mkdir()
    for path in (job(max_steps=100_000, save_steps=100_000), tmp_path / "tiny_rewards.py"):
        path.rename(tmp_path / "mine" / path.name)
    code, output = eagleray("submit", f"{tmp_path}/mine/job.yaml", "trl.temperature=0.9", "--no-wait")
    assert code == 0, output
    name = output.split()[1]
    follower = subprocess.Popen([*EAGLERAY, "logs", name, "--follow"], env=environment, text=True, stdout=subprocess.PIPE)
    assert follower.stdout is not None
    seen = next(line for line in follower.stdout if "1/100000" in line)  # the first step's row
    code, output = eagleray("status")
    assert code == 0 and f"{name}  running " in output and output.rstrip().endswith("job.yaml trl.temperature=0.9")
    code, output = eagleray("logs", name)
    assert code == 0 and seen in output
    code, output = eagleray("stop", name)
    assert code == 0 and output == f"job {name}: stopped\n"
    assert f"job {name}: stopped" in finish(follower)[1] and follower.returncode == 1

    for token, told in (("", "Missing authentication token"), ("another", "Invalid authentication token")):
        code, output = eagleray("stop", name, RAY_AUTH_TOKEN=token)
        assert code == 1 and "refuses this token, or none" in output and told in output and "Traceback" not in output


def test_no_cluster_is_one_message(job: Callable[..., Path]) -> None:
    command = [*EAGLERAY, "submit", "configs/grpo/smollm2-lora-cpu.yaml"]
    code, output = run([*command, "--address", "http://127.0.0.1:9"], dict(os.environ))
    assert code == 1
    assert "no Ray cluster answers at http://127.0.0.1:9" in output
    assert "Traceback" not in output
