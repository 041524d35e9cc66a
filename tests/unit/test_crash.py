"""The report of a failure: whom it blames, what it takes for the cause, what it keeps; and what is no crash."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ActorError, ConfigError, DataError, EaglerayError, RewardError, SyncError
from orchestrator import cli, crash
from orchestrator.causes import CAUSES, likely
from orchestrator.cluster import Connection
from orchestrator.crash import Evidence, Place, to_blame, write
from orchestrator.dashboard import Actor, Machine
from orchestrator.display import Display
from orchestrator.schema import JobConfig
from orchestrator.watch import watched

KILLED = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed by "
    "the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly due to "
    "SIGSEGV or another unexpected error. If the process was killed by the kernel OOM killer (verifiable by checking for OOM "
    "in dmesg of the OOMing node), consider enabling resource isolation via --enable-resource-isolation to prevent node deaths."
)
ASKED_FOR = "The actor is dead because it was killed by `ray.kill`."


def actor(name: str, state: str = "ALIVE", death: str = "", node: str = "n1") -> Actor:
    return Actor(f"id of {name}", name, "RolloutEngine", state, node, 4711, 0, None, None, death)


PLACE = Place("sums", "grpo", "m", step=5, steps=16, doing="step 5 of 16", warnings=("disk is slow",))


# What libraries say, as it came out of them.
@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (KILLED, "killed"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of", "gpu-memory"),
        ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "gpu-memory"),
        ("RuntimeError: [enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", "host-memory"),
        ("OSError: [Errno 12] Cannot allocate memory", "host-memory"),
        ("OSError: [Errno 28] No space left on device: '/data/out/metrics.jsonl'", "disk-full"),
        ("RuntimeError: unable to write to file </torch_1>: No space left on device (28) in /dev/shm", "shared-memory"),
        ("ERROR: Unexpected bus error encountered in worker. This might be caused by Bus error", "shared-memory"),
        ("PermissionError: [Errno 13] Permission denied: '/data/out/checkpoint-2'", "permission"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("RuntimeError: The server socket has failed to listen. code: -98, name: EADDRINUSE, message: address already", "port"),
        ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error", "nccl"),
        ("[rank0]: Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE)", "collective-timeout"),
        ("RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1", "peer"),
        ("RuntimeError: [gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv", "collective-timeout"),
        ("actors.errors.ConfigError: org/m is no folder, not in the hub's cache, and the hub", "model"),
        ("OSError: org/m is not a local folder and is not a valid model identifier listed on", "model"),
        ("huggingface_hub.errors.GatedRepoError: 401 Client Error. Cannot access gated repo", "gated-model"),
        ("ModuleNotFoundError: No module named 'reasoning_gym'", "module"),
        ("RuntimeError: CUDA error: device-side assert triggered", "gpu-broken"),
        ("actors.errors.SyncError: engine 1, installing policy version 3: it answers like the base model", "sync-proof"),
        ("actors.errors.RewardError: reward r.x failed on 2 calls of step 1: RuntimeError: no idea", "reward"),
        ("actors.errors.RewardError: reward r.x failed on 2 calls of step 1: ended its process. No", "reward-ended"),
        ("actors.errors.RewardError: reward r.x failed on 2 calls of step 1: OutOfMemoryError: Task was", "host-memory"),
        ("actors.errors.SyncError: policy version 3 not installed (OutOfMemoryError: CUDA out of memory", "gpu-memory"),
        ("actors.errors.CheckpointError: /data/out/checkpoint-2: trainer.json does not match its digest", "checkpoint"),
        ("actors.errors.ActorError: engine 0, sampling batch 3 did not answer within 1800 s; its stack is", "silent"),
        ("actors.errors.ActorError: the cluster did not free its bundles within 120 s: engine 0 {'GPU': 1}", "placement"),
        ("Fatal Python error: Segmentation fault", "segfault"),
        ("AssertionError: nobody foresaw this", None),
    ],
)
def test_the_likely_cause(said: str, expected: str | None) -> None:
    found = likely(said)
    assert (found.name if found else None) == expected


def test_the_table_is_whole() -> None:
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)
    assert all(cause.cause and cause.remedy for cause in CAUSES)


def test_the_exception_counts_before_the_log_and_a_kill_least() -> None:
    dead = actor("engine 0", "DEAD", KILLED)
    error = ActorError("engine 0, sampling batch 1 died: " + KILLED)

    def cause(error: Exception, log: str) -> str:
        found = crash.cause_of(error, Evidence(actors=(dead,), blamed=dead, logs={"engine-0.err": log}))
        assert found
        return found.name

    assert cause(error, "loading weights\n") == "killed"
    assert cause(error, "torch.OutOfMemoryError: CUDA out of memory.\n") == "gpu-memory"
    assert cause(SyncError("engine 0: it answers like version 1"), "[Errno 28] No space left on device") == "sync-proof"
    ended = RewardError("reward a.b failed on 2 calls of step 1: ended its process. No completion has a reward")
    assert cause(ended, "") == "reward-ended"
    assert cause(ended, "MemoryError\n") == "host-memory"


@pytest.mark.parametrize(
    ("message", "blamed"),
    [
        ("engine 1, sampling batch 4 died: gone", "engine 1"),
        ("engine 10, installing policy version 2: it answers like the base model", "engine 10"),
        ("the trainer, training failed: ValueError: x\n  File trainer.py, of engine 1", "trainer"),
        ("reward judge.helpful failed on 2 calls of step 1: no answer", "reward judge.helpful"),
        ("training failed: something of Ray", "worker 3"),  # nobody is named, but one died unasked
    ],
)
def test_whom_a_message_blames(message: str, blamed: str) -> None:
    actors = [actor(name) for name in ("trainer", "engine 0", "engine 1", "engine 10", "reward judge.helpful")]
    actors += [actor("worker 2", "DEAD", ASKED_FOR), actor("worker 3", "DEAD", KILLED)]
    found = to_blame(message, actors)
    assert found and found.name == blamed


def test_the_driver_is_to_blame_when_nobody_else_is() -> None:
    assert to_blame("every reward of step 1 is None", [actor("engine 0"), actor("reward a.b", "DEAD", ASKED_FOR)]) is None


def test_a_report_has_what_a_person_asks_for(tmp_path: Path) -> None:
    dead = actor("engine 0", "DEAD", KILLED)
    machines = {"n1": Machine("n1", "node-1", 23 * 2**30, 24 * 2**30, ((70 * 1024, 80 * 1024),))}
    log = "".join(f"line {i}\n" for i in range(100))
    evidence = Evidence((dead, actor("trainer")), machines, dead, {"engine-0.err": log})
    try:
        raise ActorError("engine 0, sampling batch 4 died: gone") from RuntimeError("the first reason")
    except ActorError as error:
        shown = write(tmp_path, error, evidence, PLACE)
    (folder,) = (tmp_path / "crash").iterdir()
    assert "engine 0 (pid 4711) on node-1, step 5 of 16" in shown and f"{folder}/report.md" in shown
    assert "ended from outside" in shown and "dmesg" in shown
    report = (folder / "report.md").read_text()
    for text in (
        "# engine 0 (pid 4711) on node-1 failed in step 5 of 16",
        "| run | sums: grpo of m |",
        "| role | engine (RolloutEngine), DEAD, 0 restarts |",
        "| memory of the node | 23.0 GiB of 24.0 GiB used, just after, GPU 0 70.0 of 80.0 GiB |",
        "not known any more: the process is gone",
        "RuntimeError: the first reason",
        "disk is slow",
        "| trainer | ALIVE | node-1 |",
        "line 70\n",
        "line 99\n",
    ):
        assert text in report, text
    assert "line 69\n" not in report and (folder / "logs" / "engine-0.err").read_text() == log
    facts = json.loads((folder / "report.json").read_text())
    assert (facts["actor"]["name"], facts["step"], facts["cause"]["name"]) == ("engine 0", 5, "killed")
    assert facts["error"]["kind"] == "ActorError" and facts["machine"]["name"] == "node-1"


def test_an_earlier_crash_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crash.time, "strftime", lambda *_: "20260101-000000")
    for text in ("first", "second", "third"):
        write(tmp_path, ActorError(text), Evidence(), PLACE)
    folders = sorted((tmp_path / "crash").iterdir())
    assert [folder.name for folder in folders] == [f"20260101-000000-step-5{end}" for end in ("", "-2", "-3")]
    for folder, text in zip(folders, ("first", "second", "third"), strict=True):
        assert json.loads((folder / "report.json").read_text())["error"]["message"] == text


def test_a_disk_that_takes_no_report_still_lets_the_terminal_tell(tmp_path: Path) -> None:
    (tmp_path / "crash").write_text("a file")
    shown = write(tmp_path, OSError(28, "No space left on device"), Evidence(), PLACE)
    assert "a disk is full" in shown and "could not be written" in shown


def test_text_that_no_file_takes_is_written_without_it(tmp_path: Path) -> None:
    """Such as a file's name that is no UTF-8, as Python has it."""
    logs = {"engine-0.err": "loading \udcff"}
    shown = write(tmp_path, ActorError("no such file: \udcff"), Evidence(logs=logs), PLACE)
    (folder,) = (tmp_path / "crash").iterdir()
    assert f"{folder}/report.md" in shown and (folder / "logs" / "engine-0.err").read_text() == "loading ?"
    assert "no such file: ?" in (folder / "report.md").read_text() and (folder / "report.json").is_file()


@pytest.mark.parametrize("failure", [ActorError("no answer"), OSError("no file"), ValueError("no number")])
def test_a_dashboard_that_cannot_be_asked_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def raises(address: str) -> None:
        raise failure

    monkeypatch.setattr(crash, "Dashboard", raises)
    found = crash.look(Connection("02000000", tmp_path, "http://127.0.0.1:9", ""), ActorError("gone"))
    assert found == Evidence(missing=str(failure))


def config(output_dir: Path) -> JobConfig:
    return JobConfig(rl="grpo", base_model="m", output_dir=str(output_dir))


def connection(tmp_path: Path) -> Connection:
    (tmp_path / "logs").mkdir()
    return Connection("02000000", tmp_path / "logs", None, "")


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("error", [ConfigError("lora_rr: unknown"), DataError("no prompts")])
def test_bad_input_is_no_crash(tmp_path: Path, error: EaglerayError) -> None:
    with pytest.raises(type(error)) as raised, watched(config(tmp_path), Display()):
        raise error
    assert not (tmp_path / "crash").exists() and not hasattr(raised.value, "__notes__")
    assert events(tmp_path)[-1]["how"] == "failed"


def test_a_run_keeps_a_journal_which_its_crash_quotes(tmp_path: Path) -> None:
    """Also a second run in the same folder, which is not told what the first one warned of."""
    display = Display()
    (tmp_path / "events.jsonl").write_text('{"time": 1, "kind": "warning", "text": "long ago"}\n')
    with pytest.raises(RewardError) as raised, watched(config(tmp_path), display) as watch, watch.looking():
        watch.begin(connection(tmp_path))
        watch.planned(16, done=2)
        with display.phase("step 3 of 16"):
            display.step({"step": 3, "reward": 1.0}, 16)
        display.warn("a reward is slow")
        with display.phase("step 4 of 16"):
            raise RewardError("reward a.b failed on 2 calls of step 4: RuntimeError: no idea")
    display.warn("after the run")
    (folder,) = (tmp_path / "crash").iterdir()
    facts = json.loads((folder / "report.json").read_text())
    assert (facts["step"], facts["steps"], facts["doing"]) == (4, 16, "step 4 of 16")
    assert facts["warnings"] == ["a reward is slow"] and facts["cause"]["name"] == "reward"
    assert "no dashboard" in facts["missing"]
    assert "gave nothing that can be learned from" in "".join(raised.value.__notes__)
    told = events(tmp_path)
    assert [event["kind"] for event in told] == ["warning", "start", "plan", "phase", "warning", "phase", "end"]
    assert (told[1]["job_id"], told[1]["method"]) == ("02000000", "grpo")
    links = sorted((tmp_path / "logs").iterdir())
    assert [link.name for link in links] == ["eagleray-02000000-events.jsonl", "eagleray-02000000-metrics.jsonl"]
    assert links[0].read_text() == (tmp_path / "events.jsonl").read_text()


@pytest.mark.parametrize(("error", "how"), [(None, "done"), (KeyboardInterrupt(), "stopped")])
def test_the_journal_says_how_it_ended(tmp_path: Path, error: BaseException | None, how: str) -> None:
    try:
        with watched(config(tmp_path), Display()):
            if error:
                raise error
    except KeyboardInterrupt:
        pass
    assert events(tmp_path)[-1]["how"] == how and not (tmp_path / "crash").exists()


def test_what_nobody_foresaw_is_one_message_and_its_traceback_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: Any) -> None:
        with watched(config(tmp_path), Display()):
            raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli, "_run", run)
    assert cli.main(["run", "job.yaml"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("eagleray: the driver failed: ZeroDivisionError: division by zero\n  where ")
    assert "Traceback" not in shown
    (folder,) = (tmp_path / "crash").iterdir()
    report = (folder / "report.md").read_text()
    assert "Traceback" in report and f'File "{__file__}"' in report


def test_a_disk_that_takes_no_journal_costs_the_run_nothing(tmp_path: Path) -> None:
    with watched(config(tmp_path / "gone"), Display()) as watch:
        watch.planned(4, 0)
        assert watch.place().steps is None
