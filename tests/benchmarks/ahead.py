"""A step that samples one batch ahead (`max_staleness: 1`), against the longer of its two halves alone.

Ours: engines sample the next batch while the trainer scores, learns from the last one and publishes; the step ends when
the engines have installed what was published. Halves: sampling alone, and training with its publish alone, in the same
processes. On a CPU both sides have half of the cores; on a GPU they share it, unless there are two.
"""

import ray

from actors.engine import RolloutEngine
from actors.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.common import STEP, THREADS
from tests.benchmarks.results import Row
from tests.benchmarks.step import Loop


def run(pairs: int) -> list[Row]:
    with common.session():
        loop = Loop(STEP, RolloutEngine, Trainer, threads=max(1, THREADS // 2))
        halves: list[tuple[float, float]] = []

        def ahead() -> None:
            groups = loop.groups
            loop.sample()
            loop.train_on(groups)
            loop.sync()

        def sampling() -> None:
            loop.sample()
            ray.wait(loop.groups, num_returns=len(loop.groups), fetch_local=False)

        def longer_half() -> float:
            sampled = common.wall(sampling)()
            trained = common.wall(loop.train)()
            halves.append((sampled, trained))
            loop.sync()
            return max(sampled, trained)

        sampling()
        ours, theirs = common.in_turn(pairs, common.wall(ahead), longer_half)
    sampled, trained = (tuple(half[side] for half in halves[1:]) for side in (0, 1))
    return [
        Row("a step, one batch ahead", "the longer half alone", ours, theirs, "cost", reach=1.1),
        Row("sampling alone", "training alone", sampled, trained, "cost"),
    ]
