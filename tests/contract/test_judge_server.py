"""The judge asks a real server: vLLM's own, with the small model."""

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import hub
from actors.judge import JudgeWorker
from actors.specs import JudgeSpec
from tests.tiny import SMOLLM2, random_group

pytestmark = pytest.mark.slow
START_S = 400


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tmp_path_factory.mktemp("server")) / "log"
    # Not `vllm serve`, which asks for the version of a package named vllm, and on a CPU it has another name.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", hub.resolve(SMOLLM2.name)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "small", "--max-model-len", "256"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and server.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(f"the server did not start:\n{log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def test_vllm_judges(url: str) -> None:
    prompt = "Write the number 7 and nothing else. {completion}"
    spec = JudgeSpec("judge.small", "small", url, "small", prompt, None, 16, 0.0, 60.0, 200.0, 4, (0.0, 10.0))

    async def ask() -> tuple[float | None, ...]:
        worker = JudgeWorker(spec, None)
        await worker.ready()
        scores = await worker.score("", {}, random_group(3, [2, 3, 4], seed=0))
        assert scores.failure is None, scores.failure
        return scores.rewards

    assert asyncio.run(ask()) == (0.7, 0.7, 0.7)
