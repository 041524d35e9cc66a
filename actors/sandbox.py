"""Runs a program that nobody has read, as a reward of code does, in processes with limits of their own.

A run has limits on wall and CPU time, memory of each process, size of files, open files and processes; an empty folder,
an environment without our variables, `python -I`, no core dumps. It is over when the program ends or its time is up, and
then all that it started is killed. cage.py does that from inside.

Where Linux gives user namespaces to this user, a run also has no network, sees no other process, and can write nowhere
but to its folder. Where it does not, the job says so when it starts: then a program can write and reach what this
user can, read this process's environment, end the process that watches over it, and fork faster than it is killed.

In neither case is a program kept from reading the files of this user, from Unix sockets in the file system, or from
whatever a flaw of the kernel allows; and memory is bounded for each process, not for all. Nor from cheating on purpose:
checks run in the program's own process, so a program that seeks them out can pass them. One that just exits cannot.
"""

import functools
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO

from actors.specs import SandboxSpec

CAGE = str(Path(__file__).with_name("cage.py"))
UNSHARE = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy's threads each take memory
WITHOUT_NAMESPACES = (
    "code rewards: this user may not make namespaces (unshare --user), so programs run with the network and files of this "
    "user; allow them, or run the job where nothing else matters"
)
START_S = 10.0  # beside time_s, for Python to start on a busy machine
MIB = 2**20


@dataclass(frozen=True)
class Ended:
    """What a run left."""

    exit_code: int  # of the program; cage.STOPPED when it was ended for its time or its processes
    output: str  # of stdout, as long as a file may be
    passed: int  # checks that ended without an exception


def run(program: str, limits: SandboxSpec, checks: Sequence[str] = (), stdin: str = "") -> Ended:
    """Runs Python source, and then each of `checks` in the same module, whether the one before passed or not.

    With checks the program is imported, so to speak: `__name__` is not `__main__`.
    """
    return _run(program, limits, checks, stdin, namespaces=has_namespaces())


@functools.cache
def has_namespaces() -> bool:
    """Whether runs can be kept from network, processes and files."""
    return _run("", SandboxSpec(), ["pass"], "", namespaces=True).passed == 1


def _run(program: str, limits: SandboxSpec, checks: Sequence[str], stdin: str, *, namespaces: bool) -> Ended:
    token = secrets.token_hex(8)
    with (
        TemporaryDirectory(prefix="eagleray-", ignore_cleanup_errors=True) as folder,
        TemporaryFile() as order,
        TemporaryFile() as given,
        TemporaryFile() as output,
        TemporaryFile() as result,
    ):
        what = {
            "program": program,
            "checks": list(checks),
            "token": token,
            "folder": folder,
            "namespaces": namespaces,
            "time_s": limits.time_s,
            "memory_bytes": limits.memory_mib * MIB,
            "file_bytes": limits.file_mib * MIB,
        }
        _fill(order, json.dumps(what))
        _fill(given, stdin)
        files = (order.fileno(), result.fileno())
        try:
            process = subprocess.Popen(
                [*(UNSHARE if namespaces else ()), sys.executable, "-I", CAGE, *map(str, files)],
                stdin=given,
                stdout=output,
                stderr=subprocess.DEVNULL,
                pass_fds=files,
                cwd="/",
                env=ENVIRONMENT,
                start_new_session=True,
            )
        except FileNotFoundError:  # there is no unshare
            return Ended(127, "", 0)
        try:
            code = process.wait(limits.time_s + START_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        return Ended(code, _text(output), _text(result).count(token))


def _fill(file: IO[bytes], text: str) -> None:
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")
