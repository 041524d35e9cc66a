"""How a trial's actor reads its job, records as they come from a file that a resumed job replaces, and how it ends it."""

import io
import json
import math
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors import storage
from actors.errors import ActorError, CheckpointError, EaglerayError
from orchestrator import sweep_search
from orchestrator.journal import Journal, parse
from orchestrator.shared_engines import SharedEngines
from orchestrator.trials import LAST, STOPPING, Setting, Tail, Trial


def line(step: int) -> str:
    return json.dumps({"time": 0.0, "kind": "train", "step": step}) + "\n"


def steps(tail: Tail) -> list[int]:
    return [record["step"] for record in tail.new()]


def test_records_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps(tail) == [], "there is no file yet"
    path.write_text(line(1) + line(2)[:10])
    assert steps(tail) == [1]
    with path.open("a") as file:
        file.write(line(2)[10:] + line(3))
    assert steps(tail) == [2, 3]
    assert steps(tail) == []


def test_of_an_earlier_run_only_what_the_resumed_one_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3))
    tail = Tail(path, old=path.stat().st_ino)
    assert steps(tail) == [], "the job has not resumed yet, and may drop some of them"
    (tmp_path / "new").write_text(line(1) + line(2))
    (tmp_path / "new").replace(path)
    assert steps(tail) == [1, 2]
    (tmp_path / "new").write_text(line(1))  # workers that were started again take steps back
    (tmp_path / "new").replace(path)
    assert steps(tail) == [1]


class Process:
    """What a trial's actor knows of its job's process."""

    def __init__(self, code: int | None = None, *, obeys: bool = True, takes_s: float = 0.0) -> None:
        self.code, self.obeys, self.takes_s = code, obeys, takes_s
        self.said: list[str] = []

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.said.append("terminate")

    def wait(self, timeout: float | None = None) -> None:
        time.sleep(self.takes_s)
        if self.code is None and not self.obeys:
            raise subprocess.TimeoutExpired("job", timeout or 0)
        self.code = 143 if self.code is None else self.code
        self.said.append("ended")

    def kill(self) -> None:
        self.code = -9
        self.said.append("kill")


def made(sweep: Path, process: Process | None = None, **setting: Any) -> Any:
    """A trial without Tune, whose job may have begun."""
    sweep.mkdir(exist_ok=True)
    trial: Any = object.__new__(Trial)
    trial._trial_info = SimpleNamespace(trial_id="sweep_00003")
    given: dict[str, Any] = {"sweep": str(sweep), "metric": "eval/loss", "mode": "min", "path": "base.yaml", "folders": ()}
    given |= {"here": str(sweep), "environment": {}, "changes": {}, "engines": None, "places": 1}
    trial.setup({"learning_rate": 0.1}, Setting(**{**given, **setting}))
    trial.folder.mkdir(parents=True, exist_ok=True)
    trial.process = process
    return trial


def last(trial: Any) -> dict[str, Any]:
    *_, event = parse((trial.folder / "events.jsonl").read_text().splitlines())
    return {key: value for key, value in event.items() if key != "time"}


def test_a_job_that_does_not_stop_is_killed_and_that_is_told(tmp_path: Path) -> None:
    trial = made(tmp_path, Process())
    trial.cleanup()
    assert trial.process.said == ["terminate", "ended"] and not (trial.folder / "events.jsonl").exists()
    trial.process = Process(obeys=False)
    trial.cleanup()
    assert trial.process.said == ["terminate", "kill", "ended"]
    assert last(trial) == {"kind": "end", "how": "stopped", "text": "it did not end within 60 s and was killed"}


def test_a_sweep_that_stops_asks_each_job_once_whatever_tune_does(tmp_path: Path) -> None:
    """Tune waits then, and asks for no step; a second SIGTERM would end the job at once."""
    trial = made(tmp_path, process := Process(takes_s=0.5))
    listening = threading.Thread(target=trial._listen, args=(process,))
    listening.start()
    (tmp_path / STOPPING).touch()
    while not process.said:
        time.sleep(0.01)
    assert trial.step() == LAST and process.code == 143, "it waits for the end"
    listening.join(10)
    assert process.said == ["terminate", "ended"] and not listening.is_alive()


def test_a_trial_that_fails_says_so_unless_its_job_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that went on and was killed before its journal had a word of that: the last one was of an earlier run."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: SimpleNamespace(stdin=io.BytesIO(), poll=lambda: -9))
    trial = made(tmp_path)
    journal = Journal(trial.folder)
    journal.tell("end", how="stopped", text="")
    trial._begin()
    with pytest.raises(EaglerayError, match="trial 3 failed"):
        trial._end(-9)
    assert last(trial) == {"kind": "end", "how": "failed", "text": "its process was killed by signal 9 (SIGKILL)"}
    trial._begin()
    journal.tell("end", how="failed", text="out of memory")
    with pytest.raises(EaglerayError, match="trial 3 failed"):
        trial._end(1)
    assert last(trial)["text"] == "out of memory"


def test_its_place_on_shared_engines_is_free_once_its_job_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process()
    monkeypatch.setattr(SharedEngines, "close", lambda engines: process.said.append(f"close {engines.policy}"))
    trial = made(tmp_path, process, engines={"namespace": "here", "names": ["engine 0"], "policy": ""})
    trial.cleanup()
    assert process.said == ["terminate", "ended", "close trial 3"]


def test_tune_frees_only_the_places_of_trials_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others it tells while their jobs still sample."""
    closed: list[str] = []
    monkeypatch.setattr(SharedEngines, "close", lambda engines: closed.append(engines.policy))
    monkeypatch.setattr(sweep_search, "_live", [sweep_search.Live(Path("sweep"), 1, SharedEngines("here", ("engine 0",)))])
    departure, trial = sweep_search.Departure(), SimpleNamespace(trial_id="sweep_00003")
    departure.on_trial_complete(1, [trial], trial)
    assert closed == []
    monkeypatch.setattr(SharedEngines, "actors", lambda engines: ())
    departure.on_trial_error(1, [trial], trial)
    assert closed == ["trial 3"]


def test_a_sweep_ends_with_its_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all trials that are still to come would fail one after another."""
    monkeypatch.setattr(sweep_search, "_live", [sweep_search.Live(tmp_path, 1, SharedEngines("here", ("engine 0",)))])
    monkeypatch.setattr(sweep_search.trial_process, "processes", lambda folder: [])
    monkeypatch.setattr(SharedEngines, "close", lambda engines: None)
    failures = iter([(), ActorError("there is no engine 0 any more")])

    def actors(engines: SharedEngines) -> Any:
        if isinstance(found := next(failures), ActorError):
            raise found
        return found

    monkeypatch.setattr(SharedEngines, "actors", actors)
    trial = SimpleNamespace(trial_id="sweep_00003")
    sweep_search.Departure().on_trial_error(1, [trial], trial)
    sweep_search.Interruption().on_step_begin(2, [trial])
    sweep_search.Departure().on_trial_error(2, [trial], trial)
    with pytest.raises(ActorError, match="there is no engine 0 any more"):
        sweep_search.Interruption().on_step_begin(3, [trial])
    assert (tmp_path / STOPPING).exists()


def test_tune_goes_on_after_its_last_step_when_the_jobs_have_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would give their actors 5 s, and a job that was stopped as the last one more to save what it has."""
    left = [[SimpleNamespace(pid=1)], [SimpleNamespace(pid=1)], []]
    monkeypatch.setattr(sweep_search.trial_process, "processes", lambda folder: left.pop(0))
    monkeypatch.setattr(sweep_search, "_live", [sweep_search.Live(tmp_path, 2)])
    monkeypatch.setattr(sweep_search, "POLL_S", 0.0)
    ended, runs = SimpleNamespace(is_finished=lambda: True), SimpleNamespace(is_finished=lambda: False)
    sweep_search.Interruption().on_step_end(1, [ended, runs])
    assert len(left) == 3, "it does not keep a sweep that goes on"
    sweep_search.Interruption().on_step_end(1, [ended, ended])
    assert not left


HOLDER = "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.lockf(file, fcntl.LOCK_EX, 1, 0); print(flush=True); input()"


def test_a_trial_begins_once_there_is_a_place(tmp_path: Path) -> None:
    """As on a cluster that is smaller than the one where the sweep began. Another trial is another process."""
    waiting, second = made(tmp_path), made(tmp_path, places=2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".places")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert not waiting._has_place() and second._has_place()
        other.communicate(b"\n")
    assert waiting._has_place()
    waiting.cleanup()
    second.cleanup()


def test_a_sweep_that_goes_on_runs_as_many_trials_as_there_is_room_for_now(monkeypatch: pytest.MonkeyPatch) -> None:
    live = sweep_search.Live(Path("sweep"), 3)
    monkeypatch.setattr(sweep_search, "_live", [live])
    draws = sweep_search.Draws()
    draws.set_state({**draws.get_state(), "max_concurrent": 1})
    draws._trial_generator = [SimpleNamespace(trial_id=f"sweep_{n}") for n in range(6)]
    assert [draws.next_trial() is not None for _ in range(5)] == [True] * 3 + [False] * 2
    live.places = 2
    draws.on_trial_complete("sweep_0")
    assert draws.next_trial() is None
    draws.on_trial_complete("sweep_1")
    assert draws.next_trial() is not None


def saved(trial: Any, step: int) -> Path:
    path = storage.checkpoint_path(trial.folder, step)
    with storage.new_folder(path) as folder:
        (folder / "weights").write_text(f"of step {step}")
        (folder / "optimizer").write_text("momenta")
    return path


def test_a_checkpoint_that_the_job_removes_meanwhile_is_not_copied_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = made(tmp_path, Process())
    removed = saved(trial, 2)
    copytree = shutil.copytree

    def copied(source: Path, target: Path) -> None:
        if source == removed:
            saved(trial, 4)
            (source / "optimizer").unlink()  # as rmtree does, a file at a time
            monkeypatch.setattr(shutil, "copytree", copytree)
        copytree(source, target)

    monkeypatch.setattr(shutil, "copytree", copied)
    (tmp_path / "copy").mkdir()
    trial.save_checkpoint(str(tmp_path / "copy"))
    (copy,) = (tmp_path / "copy").iterdir()
    storage.verify(copy)
    assert (copy / "weights").read_text() == "of step 4"


def test_a_damaged_checkpoint_is_not_copied(tmp_path: Path) -> None:
    trial = made(tmp_path, Process())
    (saved(trial, 2) / "weights").write_text("else")
    with pytest.raises(CheckpointError, match="weights is not what was written"):
        trial.save_checkpoint(str(tmp_path / "copy"))


def test_how_many_steps_there_will_be_is_looked_up_once(tmp_path: Path) -> None:
    trial = made(tmp_path)
    assert trial._steps() == math.inf
    Journal(trial.folder).tell("plan", steps=8)
    assert trial._steps() == 8
    (trial.folder / "events.jsonl").unlink()
    assert trial._steps() == 8


def test_a_job_that_ends_well_has_measured(tmp_path: Path) -> None:
    trial = made(tmp_path)
    with pytest.raises(EaglerayError, match="without ever measuring eval/loss; set val_set_size or test_datasets"):
        trial._end(0)
    assert last(trial)["how"] == "failed" and "without ever measuring eval/loss" in last(trial)["text"]
    trial.reported = 4
    assert trial._end(0) == LAST


def test_why_a_trial_failed_is_the_last_line_of_its_log_where_its_job_says_nothing(tmp_path: Path) -> None:
    trial = made(tmp_path)
    (trial.folder / "trial.log").write_text("loading\neagleray: there is no file rows.jsonl\n\n")
    with pytest.raises(EaglerayError, match="the end of trial.log:\nloading\neagleray: there is no file"):
        trial._end(1)
    assert last(trial) == {"kind": "end", "how": "failed", "text": "there is no file rows.jsonl"}


def test_the_last_step_is_told_once_the_job_has_saved_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that hears of it ends the trial."""
    codes = [None, None, 0]
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    trial = made(tmp_path, SimpleNamespace(poll=lambda: codes.pop(0)))
    assert trial._last({"step": 8, "eval/loss": 0.5}) == {"step": 8, "eval/loss": 0.5, "done": True}
    assert len(slept) == 2
    trial.process = Process(-9)
    with pytest.raises(EaglerayError, match="trial 3 failed"):
        trial._last({"step": 8, "eval/loss": 0.5})
    trial.process = Process()
    (tmp_path / STOPPING).touch()
    assert trial._last({"step": 8, "eval/loss": 0.5}) == LAST and trial.process.code == 143


def test_a_trial_that_was_done_is_not_repeated_unless_it_is_another_one_now(tmp_path: Path) -> None:
    """Its parameters are others where a population changed them, which a driver that was killed may not have known."""
    trial = made(tmp_path)
    assert not trial._is_done()
    (trial.folder / "trial.json").write_text('{"number": 3, "params": {"learning_rate": 0.1}}')
    Journal(trial.folder).tell("end", how="stopped", text="")
    assert not trial._is_done()
    Journal(trial.folder).tell("end", how="done", text="")
    assert trial._is_done()
    (trial.folder / "metrics.jsonl").write_text(line(1) + '{"kind": "eval", "step": 2, "eval/loss": 0.5}\n')
    assert trial.step() == {"step": 2, "eval/loss": 0.5} and trial.step() == LAST and trial.process is None
    trial.params = {"learning_rate": 0.2}
    assert not trial._is_done()


def test_a_trial_goes_on_from_a_copied_checkpoint(tmp_path: Path) -> None:
    """What it had learnt itself after that step is set aside, whole."""
    better, worse = made(tmp_path / "better"), made(tmp_path / "worse")
    saved(better, 4)
    own = [saved(worse, step) for step in (2, 4, 6)]
    (own[1] / "weights").write_text("its own")
    (tmp_path / "copy").mkdir()
    better.save_checkpoint(str(tmp_path / "copy"))
    worse.load_checkpoint(str(tmp_path / "copy"))
    assert worse.resume_from == str(own[1]) and worse.reported == 4
    storage.verify(own[1])
    assert storage.steps_saved(worse.folder) == [4, 2]
    aside = {path.name: (path / "weights").read_text() for path in worse.folder.glob("aside-*")}
    assert aside == {"aside-1-checkpoint-4": "its own", "aside-1-checkpoint-6": "of step 6"}


def test_a_trial_without_a_checkpoint_cannot_be_copied(tmp_path: Path) -> None:
    with pytest.raises(EaglerayError, match="trial 3 has saved no checkpoint to be copied; set save_steps in the base"):
        made(tmp_path).save_checkpoint(str(tmp_path / "copy"))


def test_a_copy_is_as_new_as_what_was_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = made(tmp_path, Process())
    saved(trial, 2)
    trial.reported = 4
    monkeypatch.setattr(time, "sleep", lambda seconds: saved(trial, 4))
    (tmp_path / "copy").mkdir()
    trial.save_checkpoint(str(tmp_path / "copy"))
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["checkpoint-4"]
