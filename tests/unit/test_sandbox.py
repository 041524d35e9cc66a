"""Programs that misbehave, in both ways that a sandbox can be made: what they do ends with them, and counts as no success."""

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from actors import sandbox
from actors.cage import MAX_PROCESSES, STOPPED
from actors.rewards import RewardWorker
from actors.sandbox import Ended
from actors.specs import RewardSpec, SandboxSpec

LIMITS = SandboxSpec(time_s=2.0, memory_mib=256, file_mib=1)
Run = Callable[..., Ended]


@pytest.fixture(params=["with namespaces", "without"])
def run(request: pytest.FixtureRequest) -> Run:
    namespaces = request.param == "with namespaces"
    if namespaces and not sandbox.has_namespaces():
        pytest.skip("this user may not make namespaces")

    def run(program: str, checks: tuple[str, ...] = (), stdin: str = "", limits: SandboxSpec = LIMITS) -> Ended:
        return sandbox._run(program, limits, checks, stdin, namespaces=namespaces)

    return run


def test_a_program_reads_and_prints(run: Run) -> None:
    assert run("print(int(input()) * 2)\nprint('ü')", stdin="21\n") == Ended(0, "42\nü\n", 0)
    assert run("import sys; sys.exit(3)").exit_code == 3
    assert run("raise ValueError").exit_code == 1
    assert run("def f(:").exit_code == 1
    assert run("import os; os.kill(os.getpid(), 9)").exit_code == 128 + 9


def test_each_check_counts_by_itself(run: Run) -> None:
    checks = ("assert f(1) == 2", "assert f(1) == 3", "f(None)", "import sys; sys.exit()", "x = (", "assert f(4) == 5")
    assert run("def f(x): return x + 1", checks).passed == 2
    assert run("def f(x): return x + 1\nif __name__ == '__main__': input()", checks[:1]).passed == 1
    dataclass = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int"
    assert run(dataclass, ("assert A(1).x == 1",)).passed == 1


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit",
        "print('passed ' * 100)\nimport os\nos._exit(0)",
        "import os\ndef f(x): os._exit(0)",
        "import atexit, os; atexit.register(os._exit, 0); raise ValueError",
        "import os\nfor n in range(3, 30):\n    try: os.write(n, b'1' * 100)\n    except OSError: pass\nos._exit(0)",
    ],
)
def test_a_program_that_just_exits_passes_nothing(run: Run, program: str) -> None:
    assert run(program, ("assert f(1) == 2",)).passed == 0


def test_an_endless_loop_is_ended_and_keeps_what_it_had_passed(run: Run) -> None:
    started = time.monotonic()
    ended = run("def f(x):\n  while x: pass\n  return 0", ("assert f(0) == 0", "f(1)", "assert f(0) == 0"))
    assert ended.passed == 1 and ended.exit_code != 0
    assert run("import time; time.sleep(60)").exit_code == STOPPED
    assert time.monotonic() - started < 2 * (LIMITS.time_s + 3)


def test_a_fork_bomb_is_over_within_its_time(run: Run) -> None:
    """Bounded, should the sandbox fail: twice as many processes as may be, that live for some seconds."""
    program = f"""
import os, time
for _ in range({2 * MAX_PROCESSES}):
    try:
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
    except OSError:
        break
    time.sleep(0.01)
else:
    print("all of them", flush=True)
time.sleep(60)
"""
    started = time.monotonic()
    assert run(program, limits=SandboxSpec(time_s=20.0)) == Ended(STOPPED, "", 0)
    assert time.monotonic() - started < 10


def test_memory_is_bounded(run: Run) -> None:
    assert run("x = bytearray(400 * 2**20); print(len(x))") == Ended(1, "", 0)
    assert run("x = bytearray(100 * 2**20); print(len(x))").exit_code == 0


def test_files_and_output_are_bounded(run: Run) -> None:
    assert run("open('big', 'wb').write(bytes(2 * 2**20))").exit_code == 1
    assert run("open('small', 'wb').write(bytes(2**19))").exit_code == 0
    assert run("f = [open(str(n), 'w') for n in range(100)]").exit_code == 1
    endless = run("while True: print('y' * 1000)")
    assert endless.exit_code != 0 and len(endless.output) <= 2**20


def test_it_has_an_empty_folder_and_none_of_our_variables(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_JOB", "hush")
    ended = run("import os; print(dict(os.environ), os.listdir('.'), os.getcwd())")
    assert "{'OMP_NUM_THREADS': '1'" in ended.output and "hush" not in ended.output
    assert " [] " in ended.output
    assert not Path(ended.output.split()[-1]).exists()


def test_what_it_left_behind_is_gone(run: Run, tmp_path: Path) -> None:
    """A grandchild in a session of its own, whose parent has ended; its name tells it from all other processes."""
    name = f"orphan-{os.getpid()}-{time.monotonic_ns()}"
    program = f"""
import os, subprocess, sys, time
if os.fork() == 0:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", {name!r}], start_new_session=True)
    os._exit(0)
time.sleep(0.5)
print("started")
"""
    started = time.monotonic()
    assert run(program).output == "started\n"
    assert time.monotonic() - started < 10
    assert not [process for process in psutil.process_iter(["cmdline"]) if name in (process.info["cmdline"] or [])]


def test_one_who_watches_and_hangs_is_ended_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"left-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setattr(sandbox, "START_S", -29.0)
    limits = SandboxSpec(time_s=30.0)
    program = f"import os, sys, time; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(30)', {name!r}])"
    assert run(program, limits=limits).exit_code == -signal.SIGKILL
    time.sleep(0.2)
    assert not [process for process in psutil.process_iter(["cmdline"]) if name in (process.info["cmdline"] or [])]


def test_with_namespaces_there_is_no_network_no_other_process_and_no_way_to_write(tmp_path: Path) -> None:
    if not sandbox.has_namespaces():
        pytest.skip("this user may not make namespaces")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"""
import os, socket
def tried(what):
    try:
        what()
        return "done"
    except OSError:
        return "refused"
print(tried(lambda: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 1)))
print(tried(lambda: open({str(tmp_path / "written")!r}, "w")))
print(tried(lambda: os.kill({os.getpid()}, 0)))
print(tried(lambda: open("/proc/{os.getpid()}/environ").read()))
print(tried(lambda: open("here", "w")))
print(open("/proc/self/status").read().split("CapPrm:")[1].split()[0])
print(os.system("unshare --user true 2> /dev/null") != 0, os.system("mount -o remount,rw / 2> /dev/null") != 0)
"""
        assert sandbox.run(program, LIMITS).output.split("\n")[:-1] == ["refused"] * 4 + ["done", "0" * 16, "True True"]
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_unshare_a_person_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "UNSHARE", ("no-such-program",))
    sandbox.has_namespaces.cache_clear()
    try:
        assert sandbox.run("", LIMITS, ["assert True"]).passed == 1
        assert RewardWorker(RewardSpec("actors.verifiers.passes_tests", ())).ready() == sandbox.WITHOUT_NAMESPACES
        assert RewardWorker(RewardSpec("actors.verifiers.reasoning_gym", ())).ready() is None
    finally:
        sandbox.has_namespaces.cache_clear()
