"""Four GRPO jobs that differ in their learning rate: as trials that share an engine, and one after another with an engine each.

The recipe is the demo's, for a few steps. Both are sweeps, so both pay for the starts of their trials; without the start is
from the first record of a trial to the last one. The cluster says that it has room for all, since a trainer of this size leaves
most of a CPU, or of a GPU, to the others.
"""

import tempfile
import time
from pathlib import Path

import ray

from actors import device
from orchestrator import metrics
from orchestrator.api import load, sweep
from tests.benchmarks.results import Row

RECIPE = "configs/grpo/smollm2-lora-cpu.yaml"
RATES = [1e-4, 2e-4, 3e-4, 4e-4]
STEPS = {False: 6, True: 30}  # by whether there is a GPU
GPU = {
    "vllm.enforce_eager": True,
    "ray.engine_gpus": 0.4,
    "resources_per_worker": {"GPU": 0.14},
    "vllm.gpu_memory_utilization": 0.9,
}


def run(pairs: int) -> list[Row]:
    """One of each: they take minutes. pairs: unused."""
    gpu = device.gpu_count() > 0
    with tempfile.TemporaryDirectory(prefix="er", dir="/tmp") as folder:
        ray.init(address="local", num_cpus=len(RATES) + 2, log_to_driver=False, _temp_dir=f"{folder}/ray")
        shared_s, shared_steps_s = _swept(Path(folder) / "shared", gpu, at_once=len(RATES))
        apart_s, apart_steps_s = _swept(Path(folder) / "apart", gpu, at_once=1)
        ray.shutdown()
    apart = "the same trials, one after another"
    reach = 2.5 if gpu else None
    return [
        Row(f"{len(RATES)} GRPO trials on a shared engine", apart, (shared_s,), (apart_s,), reach=reach),
        Row("the same, without the start of the first one", apart, (shared_steps_s,), (apart_steps_s,)),
    ]


def _swept(folder: Path, gpu: bool, *, at_once: int) -> tuple[float, float]:
    """Seconds of a sweep, and of those from its first step to its last."""
    small = {"max_steps": STEPS[gpu], "test_datasets": [], "save_steps": 1000, "use_tensorboard": False}
    config = load(RECIPE, **small, **(GPU if gpu else {}))
    began = time.monotonic()
    result = sweep(
        config,
        {"learning_rate": RATES},
        metric="reward",
        mode="max",
        max_concurrent=at_once,
        share_engines=at_once > 1,
        output_dir=folder,
    )
    seconds = time.monotonic() - began
    records = [record for trial in result.trials for record in metrics.read(trial.folder / metrics.METRICS_FILE)]
    assert len(records) == len(RATES) * STEPS[gpu], "a trial has failed"
    first = min(record["time"] - record["step_s"] for record in records)
    steps_s = max(record["time"] for record in records) - first
    print(f"{at_once} at a time: {seconds:.1f} s, without the first start {steps_s:.1f} s", flush=True)  # if it is cut off
    return seconds, steps_s
