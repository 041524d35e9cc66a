"""Rows of a chat file to token ids and labels, against `datasets.map` with as many processes.

Ours: the wall time of `prepare`, from the JSONL file to Arrow files, on Ray Data's workers. Theirs: `load_dataset` and `map`
with `apply_chat_template`, a row at a time as TRL's trainers do it: the whole conversation, and the part before the answer,
whose tokens are not trained. Both make the same ids and labels, which is checked. "from nothing" has what a job pays once:
ours starts Ray and its workers, theirs a Python process. Memory is what our driver and workers hold for themselves
(RssAnon), summed, at its peak: the object store is not in it.
"""

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from actors import hub
from actors.dataset_loop import dataset_of
from orchestrator.prepare import prepare
from orchestrator.schema import JobConfig
from tests.benchmarks import common
from tests.benchmarks.common import CORES, MODEL
from tests.benchmarks.conversations import conversations, job, write
from tests.benchmarks.results import Row

ROWS = 20_000
TIMES = 10  # as many rows for the second measurement of memory
CHECKED = 100  # rows that are compared


def run(pairs: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write(folder / "rows.jsonl", conversations(ROWS))
        larger = job(folder, write(folder / "larger.jsonl", conversations(TIMES * ROWS)))
        small = job(folder, file)

        def ours(config: JobConfig = small) -> list[dict[str, Any]]:
            with tempfile.TemporaryDirectory(dir=folder) as out:
                prepared = prepare(config, Path(out), [], print, lambda *_: None, lambda *_: None)
                return list(dataset_of(prepared.train.files).select(range(CHECKED)))

        cold_theirs = common.wall(lambda: subprocess.run([sys.executable, "-m", __name__, str(file)], check=True))()
        started = time.perf_counter()
        with common.session(), peak_mebibytes() as before:
            ours()
            cold_ours = time.perf_counter() - started
        with common.session(), ProcessPoolExecutor(1, get_context("spawn")) as peer:
            if ours() != peer.submit(mapped, str(file)).result():
                raise RuntimeError("the two sides make other rows")
            theirs = common.wall(lambda: peer.submit(mapped, str(file)).result())
            ours_s, theirs_s = common.in_turn(pairs, common.wall(ours), theirs)
        with common.session(), peak_mebibytes() as after:
            ours(larger)
    what = f"datasets.map, {CORES} processes"
    return [
        Row(f"{ROWS:,} rows to ids and labels", what, ours_s, theirs_s, reach=1.0, rows=ROWS),
        Row("the same from nothing", what, (cold_ours,), (cold_theirs,), rows=ROWS),
        Row(f"memory at {TIMES * ROWS:,} rows", f"at {ROWS:,} rows", (after(),), (before(),), "cost", 1.1, unit="MiB"),
    ]


def mapped(file: str) -> list[dict[str, Any]]:
    """What `datasets.map` makes of the file, its first rows; runs in a process of its own."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(MODEL.name))

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=True)["input_ids"]
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        # The last token is the line break behind the end of the turn.
        return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) : -1] + [-100]}

    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset("json", data_files=file, split="train", cache_dir=cache)
        return list(rows.map(encode, num_proc=CORES, remove_columns=rows.column_names).select(range(CHECKED)))


@contextmanager
def peak_mebibytes() -> Iterator[Callable[[], float]]:
    """Yields what tells the peak of the block: anonymous memory of this process and of Ray's workers, summed."""
    peak = 0.0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.1):
            peak = max(peak, sum(map(_anonymous_mebibytes, _ours())))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: peak
    finally:
        done.set()
        thread.join()


def _ours() -> list[psutil.Process]:
    """This process and the workers of the Ray that it started."""
    driver = psutil.Process()
    workers = []
    for child in driver.children(recursive=True):
        with suppress(psutil.Error):
            if child.cmdline()[:1] and child.cmdline()[0].startswith("ray::"):
                workers.append(child)
    return [driver, *workers]


def _anonymous_mebibytes(process: psutil.Process) -> float:
    """Memory that a process holds for itself; 0 when it has just ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024  # the file says kB
    return 0.0


if __name__ == "__main__":
    mapped(sys.argv[1])
