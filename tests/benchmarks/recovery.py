"""A kill of each kind of process of a GRPO job: seconds until the job's message, and until the same command trains again.

A reward's process is replaced while the job goes on. Without an engine, a trainer rank or the driver the job ends, the first
two with one message, and the same command with `auto_resume_from_checkpoints` goes on from the newest checkpoint; all of its
start is in that time. The job is the demo's recipe on a cluster that it starts and ends itself; on two GPUs its trainer has
two ranks. Each process is killed once, whatever the number of pairs.
"""

import os
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from actors import device
from actors.errors import EaglerayError
from orchestrator import metrics
from tests.benchmarks.results import Row
from tests.e2e.conftest import finish, start

LIMIT_S = 400
POLL_S = 0.02
OVERRIDES = ["micro_batch_size=8", "gradient_accumulation_steps=2", "max_steps=1000", "save_steps=2", "test_datasets=[]"]
OVERRIDES += ["auto_resume_from_checkpoints=true"]
ACTORS = ("RolloutEngine", "Trainer", "RewardWorker", "SampleWriter")
GPUS: dict[int, list[str]] = {
    0: [],
    1: ["vllm.enforce_eager=true", "ray.engine_gpus=0.4", "resources_per_worker={GPU: 0.5}"],
    2: ["vllm.enforce_eager=true", "ray.engine_gpus=0.4", "resources_per_worker={GPU: 0.6}", "ray_num_workers=2"],
}


def run(pairs: int) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="er", dir="/tmp") as folder:
        job = _Job(Path(folder) / "out")
        rows = [Row("the first start: until the first step", "", (job.start(),))]
        try:
            reward_s, step_s = job.kill_reward()
            rows.append(Row("reward killed: until the next step", "a step", (reward_s,), (step_s,), "cost"))
            for what, process in (("engine", "RolloutEngine"), ("trainer rank", "Trainer")):
                rows.append(Row(f"{what} killed: until the message", "", (job.kill_actor(process),)))
                rows.append(Row(f"{what} killed: the same command, until its first step", "", (job.start(),)))
            rows.append(Row("driver killed: until its actors have ended", "", (job.kill_driver(),)))
            rows.append(Row("driver killed: the same command, until its first step", "", (job.start(),)))
        finally:
            job.stop()
    return rows


class _Job:
    """One output_dir, and the command that trains there."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Runs the command, until it has done a step and another that a checkpoint keeps; seconds until the first."""
        began, clock = time.time(), time.monotonic()
        gpus = GPUS[min(2, device.gpu_count())]
        self.process = start("run", "configs/grpo/smollm2-lora-cpu.yaml", f"output_dir={self.out}", *OVERRIDES, *gpus)
        self._wait_for(lambda: self._steps(since=began), "a step")
        seconds = time.monotonic() - clock
        steps = self._steps(since=began)
        self._wait_for(lambda: (self.out / f"checkpoint-{steps[0]['step'] // 2 * 2 + 2}").exists(), "a checkpoint")
        return seconds

    def kill_reward(self) -> tuple[float, float]:
        """Seconds from the kill until the next step is done, and of a step before it."""
        step_s = median(record["step_s"] for record in self._steps()[1:])
        killed = time.time()
        self._actors("RewardWorker")[-1].kill()
        self._wait_for(lambda: self._steps(since=killed), "a step after a reward's end")
        return float(self._steps(since=killed)[0]["time"]) - killed, step_s

    def kill_actor(self, name: str) -> float:
        """Seconds from the kill until the command has ended; it must say why."""
        assert self.process is not None
        self._actors(name)[-1].kill()
        killed = time.monotonic()
        code, output = finish(self.process, LIMIT_S)
        seconds = time.monotonic() - killed
        message = output[output.rfind("eagleray: ") :].strip()
        if code != 1 or "died" not in message or "Traceback" in output:
            raise RuntimeError(f"exit code {code} after the end of {name}:\n{output}")
        print(f"{seconds:.1f} s: {message}", flush=True)
        return seconds

    def kill_driver(self) -> float:
        """Seconds from the kill until no actor is left; agents of the Ray that it started stay a minute longer."""
        assert self.process is not None
        actors = self._actors(*ACTORS)
        self.process.kill()
        self.process.wait()
        killed = time.monotonic()
        _, alive = psutil.wait_procs(actors, timeout=LIMIT_S)
        if alive:
            raise RuntimeError(f"left after the driver's end: {alive}")
        return time.monotonic() - killed

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGINT)
            finish(self.process, LIMIT_S)

    def _actors(self, *names: str) -> list[psutil.Process]:
        """The job's processes of these kinds, as they were started: rank 0 is not the last of several."""
        assert self.process is not None
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error, IndexError):
                if child.cmdline()[0].partition(".")[0].removeprefix("ray::") in names:
                    found.append(child)
        return sorted(found, key=lambda process: process.pid)

    def _steps(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Records of steps that were written after a time."""
        with suppress(EaglerayError):
            records = metrics.read(self.out / metrics.METRICS_FILE)
            return [record for record in records if record["kind"] == "train" and record["time"] > since]
        return []

    def _wait_for(self, condition: Any, what: str) -> None:
        assert self.process is not None
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the job did not come to {what}:\n{finish(self.process, 1)[1]}")
            time.sleep(POLL_S)
