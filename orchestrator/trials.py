"""A trial as Ray Tune sees it: an actor without CPUs that starts the trial's process, reads its metrics and stops it.

The process is a job (trial_process.py), which reserves what it needs itself. The actor lies on the node of the sweep's driver,
and the process ends with it.
"""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.result import DONE, RESULT_DUPLICATE

from actors import storage
from actors.errors import CheckpointError, EaglerayError
from orchestrator.checkpoints import set_newer_aside
from orchestrator.journal import Journal, parse, read_events, steps_of
from orchestrator.metrics import METRICS_FILE
from orchestrator.space import expanded
from orchestrator.sweep_results import LOG_FILE, TRIAL_FILE, TRIALS, last_lines
from orchestrator.trial_process import MODULE, Order, policy_name

POLL_S = 0.3  # how often it looks for new metrics
GRACE_S = 60.0  # in which a process that is asked to stop must have ended
WORST = 1e30  # what Tune is told of a metric that is not finite, which it could not compare
STOPPING = ".stopping"  # in the sweep's folder: it is being stopped, and no trial is to start or to go on
PLACES = ".places"  # in the sweep's folder
LOG_LINES = 12  # of a failed trial's log that its message has
LAST = {RESULT_DUPLICATE: True}  # Tune's word for: what I reported last was the last


@dataclass(frozen=True)
class Setting:
    """What all trials of a sweep have from its driver."""

    sweep: str  # its folder
    metric: str
    mode: str
    path: str  # the file of the base job, as a person named it
    folders: tuple[str, ...]  # where files and functions that it names are looked for
    here: str  # the current folder
    changes: Mapping[str, Any]  # to each job, so that trials share GPUs
    engines: Mapping[str, Any] | None  # that all trials share, for JSON; None = each has its own
    places: int  # trials at a time
    environment: Mapping[str, str]  # of the driver, with the address of the cluster; an actor's own lacks its GPUs


class Tail:
    """The records of a job as they come. `old`: the file of an earlier run, of which nothing is new any more."""

    def __init__(self, path: Path, old: int | None = None) -> None:
        self.path, self.old = path, old
        self.file: int | None = None  # inode: a resumed job replaces the file
        self.offset = 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Those since the last call; a line that is half written comes the next time."""
        try:
            with self.path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode == self.old:
                    return
                self.old = None  # its number is given to another file some day
                if inode != self.file:
                    self.file, self.offset = inode, 0
                file.seek(self.offset)
                lines = file.read()
        except FileNotFoundError:
            return
        whole = lines[: lines.rfind(b"\n") + 1]
        self.offset += len(whole)
        yield from parse(whole.decode("utf-8", "replace").splitlines())


class Trial(tune.Trainable):  # type: ignore[misc]  # Ray's annotations are not read
    """Reports each record that has the sweep's metric, with what was last seen of the others; `step` is the time."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """Nothing, on the node of whoever asks, which is the sweep's driver."""
        node = f"node:{ray.util.get_node_ip_address()}"
        return tune.PlacementGroupFactory([{"CPU": 0, node: 0.001}])

    def setup(self, config: dict[str, Any], setting: Setting) -> None:
        self.setting = setting
        self.sweep = Path(setting.sweep)
        self.number = number_of(self.trial_id)
        self.folder = trial_folder(self.sweep, self.number)
        self.params = expanded(config)
        self.resume_from: str | None = None
        self.places = (self.sweep / PLACES).open("ab")  # a byte each, locked by the trial that has it
        self.told = 0  # events of runs before the one of this process
        self.process: subprocess.Popen[bytes] | None = None
        self.ending = threading.Lock()  # held while it is asked to end
        self.tail: Tail | None = None
        self.reported = -1  # the last step
        self.steps: int | None = None  # that the job will have
        self.seen: dict[str, float] = {}
        self.found: list[dict[str, float]] = []  # to report, oldest first

    def step(self) -> dict[str, Any]:
        """Waits for the next record with the metric. Raises EaglerayError when the process has failed."""
        while not self.found:
            if self._is_stopping():
                self.cleanup()
                return LAST  # which nobody takes any more: see Interruption in sweep_search.py
            if self.tail is None:
                if not self._has_place():
                    time.sleep(POLL_S)
                    continue
                self._begin()
            code = 0 if self.process is None else self.process.poll()  # before the last records are read
            self._read()
            if code is not None and not self.found:
                return self._end(code)
            if not self.found:
                time.sleep(POLL_S)
        record = self.found.pop(0)
        return record if record["step"] < self._steps() else self._last(record)

    def _has_place(self) -> bool:
        """Takes one of the sweep's places, until its process has ended: Tune starts all trials that it goes on with at once."""
        for place in range(self.setting.places):
            with suppress(BlockingIOError, PermissionError):  # another one has it
                fcntl.lockf(self.places, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
                return True
        return False

    def cleanup(self) -> None:
        """Asks the process to stop, as Ctrl-C would; it keeps its checkpoints. Tune calls it at every trial's end."""
        if self.process is not None:
            self._stop(self.process)
        self.places.close()
        if self.process is not None and self.setting.engines is not None:  # a job that was killed still has its place
            from orchestrator.shared_engines import SharedEngines  # here: it loads torch

            SharedEngines.from_record(self.setting.engines).of(policy_name(self.number)).close()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Stops the process with the sweep, whose Tune then asks for no step any more, and waits for it."""
        while process.poll() is None:
            if self._is_stopping():
                self._stop(process)
            else:
                time.sleep(POLL_S)

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        """Once: a job takes a second SIGTERM for a wish to end at once."""
        with self.ending:
            if process.poll() is not None:
                return
            process.terminate()
            try:
                process.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                self._tell("stopped", f"it did not end within {GRACE_S:g} s and was killed")

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Copies the job's newest checkpoint, once that is as new as what was reported."""
        copied = False
        while not copied:
            ended = self.process is None or self.process.poll() is not None or self._is_stopping()
            newest = storage.newest_checkpoint(self.folder)
            if newest is not None and (ended or _step_of(newest) >= self.reported):
                copied = _copied(newest, Path(checkpoint_dir) / newest.name)
            elif ended:
                raise EaglerayError(f"trial {self.number} has saved no checkpoint to be copied; set save_steps in the base")
            else:
                time.sleep(POLL_S)

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Makes a copied checkpoint the newest of this trial; what the trial had learnt after its step is set aside."""
        if self._is_done():
            return
        source = next(Path(checkpoint_dir).glob("checkpoint-*"))
        step = _step_of(source)
        target = storage.checkpoint_path(self.folder, step)
        set_newer_aside(target, step - 1, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target)
        self.resume_from = str(target)
        self.reported = step

    def _begin(self) -> None:
        """Starts the process, unless its job was done before the sweep's driver was killed."""
        metrics = self.folder / METRICS_FILE
        if self._is_done():
            self.tail = Tail(metrics)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.write_json(self.folder / TRIAL_FILE, {"number": self.number, "params": self.params})
        self.tail = Tail(metrics, old=metrics.stat().st_ino if metrics.exists() else None)
        self.told = len(read_events(self.folder))
        order = Order(
            sweep=str(self.sweep),
            folder=str(self.folder),
            number=self.number,
            params=self.params,
            path=self.setting.path,
            folders=self.setting.folders,
            resume_from=self.resume_from,
            changes=self.setting.changes,
            engines=self.setting.engines,
            parent=os.getpid(),
        )
        with (self.folder / LOG_FILE).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", MODULE, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.setting.here,
                env=dict(self.setting.environment),
                start_new_session=True,  # Ctrl-C in the terminal of the sweep is the sweep's to act on
            )
        assert self.process.stdin is not None
        self.process.stdin.write(order.json().encode())
        self.process.stdin.close()
        threading.Thread(target=self._listen, args=(self.process,), name="stops with the sweep", daemon=True).start()

    def _read(self) -> None:
        assert self.tail is not None
        for record in self.tail.new():
            values = {k: math.nan if v is None else v for k, v in record.items() if k not in ("time", "kind")}
            self.seen.update(values)
            if self.setting.metric in values and record["step"] > self.reported:
                self.reported = record["step"]
                self.found.append({**self.seen, self.setting.metric: self._comparable(values[self.setting.metric])})

    def _comparable(self, value: float) -> float:
        return value if math.isfinite(value) else WORST if self.setting.mode == "min" else -WORST

    def _end(self, code: int) -> dict[str, Any]:
        """What Tune is told at the end. Raises EaglerayError for a trial that failed, and leaves its word in the journal."""
        if code == 0 and self.reported >= 0:
            return LAST
        if code == 0:
            missing = f"the job has ended without ever measuring {self.setting.metric}; {_remedy(self.setting.metric)}"
            self._tell("failed", missing)
            raise EaglerayError(f"trial {self.number}: {missing}")
        if all(event["kind"] != "end" for event in read_events(self.folder)[self.told :]):
            killed = f"its process was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else ""
            said = last_lines(self.folder, 1).removeprefix("eagleray: ")
            self._tell("failed", killed or said or f"its process ended with exit code {code}")
        raise EaglerayError(f"trial {self.number} failed; the end of {LOG_FILE}:\n{last_lines(self.folder, LOG_LINES)}")

    def _last(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of the last step, told when the job has saved its result, so that no scheduler ends it before."""
        while self.process is not None and (code := self.process.poll()) != 0:
            if self._is_stopping():
                self.cleanup()
                return LAST
            if code is not None:
                return self._end(code)
            time.sleep(POLL_S)
        return {**record, DONE: True}

    def _steps(self) -> float:
        """How many the job will have, once that is known."""
        if self.steps is None:
            self.steps = steps_of(read_events(self.folder))
        return math.inf if self.steps is None else self.steps

    def _tell(self, how: str, text: str) -> None:
        """The end that the process itself could not tell."""
        Journal(self.folder).tell("end", how=how, text=text)

    def _is_done(self) -> bool:
        """With these parameters: a driver that was killed may have known nothing of it."""
        return self._last_event().get("how") == "done" and _params_of(self.folder) == self.params

    def _last_event(self) -> dict[str, Any]:
        return next(reversed(read_events(self.folder)), {})

    def _is_stopping(self) -> bool:
        return (self.sweep / STOPPING).exists()


def number_of(trial_id: Any) -> int:
    """Of a trial, from what Tune calls it."""
    return int(str(trial_id).rpartition("_")[2])


def trial_folder(sweep: Path, number: int) -> Path:
    """The output_dir of a trial."""
    return sweep / TRIALS / f"{number:04d}"


def _params_of(trial: Path) -> Any:
    return json.loads((trial / TRIAL_FILE).read_text(encoding="utf-8"))["params"]


def _copied(checkpoint: Path, target: Path) -> bool:
    """False where the job removes it meanwhile, for a newer one. Raises CheckpointError where it is damaged."""
    try:
        shutil.copytree(checkpoint, target)
        storage.verify(target)
    except (shutil.Error, FileNotFoundError, CheckpointError):
        shutil.rmtree(target, ignore_errors=True)
        if storage.newest_checkpoint(checkpoint.parent) == checkpoint:
            raise
        return False
    return True


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _remedy(metric: str) -> str:
    if metric.startswith("eval/"):
        return "set val_set_size or test_datasets, and eval_steps, in the base; or choose another metric"
    return "choose one that its metrics.jsonl has"
