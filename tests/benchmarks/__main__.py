"""`python -m tests.benchmarks NAME`: runs a figure, or all, writes its JSON and prints its table.

`table` prints the tables of all saved results instead, for the README.
"""

import argparse
import importlib
from pathlib import Path

from actors import device
from tests.benchmarks import results

FIGURES = {
    "grpo_step": "A GRPO step",
    "overhead": "What a step costs beyond bare sampling and bare backpropagation",
    "computed": "What the trainer computes",
    "ahead": "Sampling and training at the same time",
    "two_gpus": "GRPO on two GPUs",
    "workers": "Two Ray Train workers with a sharded model",
    "recovery": "A kill of each process",
    "scale": "The driver's own work, by engines that do nothing",
    "shared": "Four GRPO trials on one engine",
    "sync": "Publish until the last engine has acknowledged",
    "decoding": "Decoding after a sync",
    "kl": "How far the engine is from the trainer",
    "rollout": "Sampling through the actor",
    "training": "Steps of SFT and DPO",
    "preparing": "Preparing rows: a chat file to token ids",
}
NOT_ON_ONE_GPU = ("two_gpus", "workers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("name", choices=[*FIGURES, "all", "table"])
    parser.add_argument("--pairs", type=int, default=5, help="timings in turn, after a warm-up")
    parser.add_argument("--out", type=Path, help="JSON file of one figure; default: in tests/benchmarks/results")
    arguments = parser.parse_args()
    if arguments.name == "table":
        print(results.saved_tables(FIGURES))
        return
    if arguments.name == "all" and arguments.out:
        parser.error("--out takes the result of one figure")
    every = [name for name in FIGURES if device.gpu_count() != 1 or name not in NOT_ON_ONE_GPU]
    for name in every if arguments.name == "all" else [arguments.name]:
        rows = importlib.import_module(f"tests.benchmarks.{name}").run(arguments.pairs)
        path = results.save(name, rows, arguments.out)
        print(results.table(FIGURES[name], path), flush=True)


if __name__ == "__main__":
    main()
