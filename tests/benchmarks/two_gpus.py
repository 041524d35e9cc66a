"""GRPO with the trainer on one GPU and the engines on another, against colocation on one and against TRL with vLLM's server.

Ours, apart: a step whose halves follow one another (`max_staleness: 0`), and one that samples a batch ahead (1). Colocated:
one engine on the trainer's GPU, which sleeps while the trainer computes. TRL: its GRPOTrainer on the first GPU and
`trl vllm-serve` on the second one, as its manual has it. All take turns, in processes that stay; model, prompts, lengths,
LoRA, precision and cut of the batch are those of grpo_step.py. A GPU's idle share is the time that no kernel ran on it, as
NVML says it for the last moments, asked 20 times a second during each step. Without GPUs all share the CPU, TRL generates
with transformers, and there are no idle shares.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import requests
import torch

from actors import device, hub
from actors.engine import RolloutEngine
from actors.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.common import MODEL, STEP
from tests.benchmarks.grpo_step import CUTS, TRL_MEMORY, start_trl
from tests.benchmarks.results import Row
from tests.benchmarks.step import COLOCATE, SEPARATE, Loop

ASK_S = 0.05
SERVER_TIMEOUT_S = 240
TRL = f"trl.GRPOTrainer, {CUTS[0][0]} x {CUTS[0][1]}" + ", and vLLM's server" * device.has_gpu()
COLOCATED = "colocated, one GPU"


def run(pairs: int) -> list[Row]:
    phases: list[tuple[float, ...]] = []
    with common.session(), trl_server() as (keys, wait_until_up), ThreadPoolExecutor() as pool:

        def apart() -> Loop:
            wait_until_up()
            return Loop(STEP, RolloutEngine, Trainer, placement=SEPARATE)

        starting = pool.submit(apart)  # its engines start on the second GPU, all else meanwhile on the first one
        colocated = Loop(STEP, RolloutEngine, Trainer, engines=1, placement=COLOCATE)
        trl = start_trl(CUTS[0], 1 + pairs, **keys)
        loop = starting.result()

        def step() -> None:
            sampled = common.wall(lambda: (loop.sample(), loop.finish_sampling()))()
            phases.append((sampled, common.wall(loop.train)(), common.wall(loop.sync)()))

        gpus = Idleness()
        sides = [gpus.during(side) for side in (common.wall(step), common.wall(loop.ahead), common.wall(colocated.step), trl)]
        in_turn, ahead, one_gpu, theirs = common.in_turn(pairs, *sides)
    sampling, training, syncing = zip(*phases[1:], strict=True)
    longer = tuple(max(halves) for halves in zip(sampling, training, strict=True))
    return [
        Row("a step, sampling and training in turn", TRL, in_turn, theirs),
        Row("a step, one batch ahead", TRL, ahead, theirs),
        Row("a step, sampling and training in turn", COLOCATED, in_turn, one_gpu),
        Row("a step, one batch ahead", COLOCATED, ahead, one_gpu),
        Row("a step, one batch ahead", "the longer half alone", ahead, longer, "cost", reach=1.1),
        Row("sampling", "training", sampling, training, "cost"),
        Row("sync", "", syncing),
        *gpus.rows(("in turn", "one batch ahead", COLOCATED, TRL)),
    ]


class Idleness:
    """Idle shares of the first and the last GPU, of each step of each side."""

    def __init__(self) -> None:
        self.shares: list[list[tuple[float, ...]]] = []  # [sides][steps][GPUs], %

    def during(self, side: Callable[[], float]) -> Callable[[], float]:
        """The same side, watched."""
        found: list[tuple[float, ...]] = []
        self.shares.append(found)

        def watched() -> float:
            busy: list[tuple[int, ...]] = []
            done = threading.Event()
            thread = threading.Thread(target=_ask, args=(busy, done))
            thread.start()
            try:
                return side()
            finally:
                done.set()
                thread.join()
                found.append(tuple(100 - fmean(of_gpu) for of_gpu in zip(*busy, strict=True)))

        return watched

    def rows(self, names: tuple[str, ...]) -> list[Row]:
        """A row for each side and GPU; none where there is no GPU."""
        return [
            Row(f"idle, GPU {number}: {name}", "", of_gpu, unit="%")
            for name, steps in zip(names, self.shares, strict=True)
            for number, of_gpu in enumerate(zip(*steps[1:], strict=True))
        ]


def _ask(busy: list[tuple[int, ...]], done: threading.Event) -> None:
    while not done.wait(ASK_S):
        busy.append(tuple(torch.cuda.utilization(gpu) for gpu in range(device.gpu_count())))


@contextmanager
def trl_server() -> Iterator[tuple[dict[str, Any], Callable[[], None]]]:
    """TRL's server on the last GPU: the keys of GRPOConfig that find it, and a wait until it is up. Without GPUs, neither."""
    if not device.has_gpu():
        yield {}, lambda: None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trl.cli.main", "vllm-serve", "--model", hub.resolve(MODEL.name), "--dtype", MODEL.dtype]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--gpu_memory_utilization", str(TRL_MEMORY), "--max_model_len", str(64 + STEP.tokens)]
    environment = {**os.environ, **common.HERE, **common.on_gpu(device.gpu_count() - 1)}
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as file:
            process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

        def wait_until_up() -> None:
            deadline = time.monotonic() + SERVER_TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                with suppress(requests.RequestException):
                    if requests.get(f"{url}/health", timeout=5).ok:
                        return
                time.sleep(1)
            raise RuntimeError(f"TRL's server is not up:\n{log.read_text()[-3000:]}")

        try:
            yield {"vllm_mode": "server", "vllm_server_base_url": url}, wait_until_up
        finally:
            process.terminate()
            process.wait(60)
