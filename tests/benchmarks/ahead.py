"""A step that samples one batch ahead (`max_staleness: 1`), against the longer of its two halves alone.

Ours: engines sample the next batch while the trainer scores, learns from the last one and publishes; the step ends when
the engines have installed what was published. Halves: sampling alone, and training alone, in the same processes. On a CPU
both sides have half of the cores; trainer and engines have a GPU each where there are two, and share one otherwise.
"""

from actors import device
from actors.engine import RolloutEngine
from actors.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.common import STEP, THREADS
from tests.benchmarks.results import Row
from tests.benchmarks.step import SEPARATE, Loop


def run(pairs: int) -> list[Row]:
    with common.session():
        threads = THREADS if device.has_gpu() else max(1, THREADS // 2)
        loop = Loop(STEP, RolloutEngine, Trainer, threads=threads, placement=SEPARATE)
        halves: list[tuple[float, float]] = []

        def sampling() -> None:
            loop.sample()
            loop.finish_sampling()

        def longer_half() -> float:
            sampled = common.wall(sampling)()
            trained = common.wall(loop.train)()
            halves.append((sampled, trained))
            loop.sync()
            return max(sampled, trained)

        sampling()
        ours, theirs = common.in_turn(pairs, common.wall(loop.ahead), longer_half)
    sampled, trained = (tuple(half[side] for half in halves[1:]) for side in (0, 1))
    return [
        Row("a step, one batch ahead", "the longer half alone", ours, theirs, "cost", reach=1.1),
        Row("sampling alone", "training alone", sampled, trained, "cost"),
    ]
