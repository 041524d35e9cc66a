"""What the sandbox starts, as a program of its own: it locks itself in, and runs what it was given in a child.

    python -I cage.py ORDER RESULT

ORDER and RESULT are open files, by number; sandbox.py says what is in them. Only the standard library is imported, since
each run pays for it. The first process stays outside the limits: it waits for the child, and ends all that the child
started, also what has left its session, since orphans come back to it.
"""

import ctypes
import glob
import json
import os
import resource
import signal
import sys
import time
import types
from math import ceil
from typing import Any

MAX_PROCESSES = 64  # threads too, where the kernel counts them
MAX_OPEN_FILES = 64
POLL_S = 0.005
STOPPED = 124  # exit code of a run that was ended: out of time, or too many processes

# of Linux's headers
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


def main() -> int:
    order_file, result_file = (int(number) for number in sys.argv[1:])
    with open(order_file, encoding="utf-8") as file:
        order = json.load(file)
    if order["namespaces"]:
        hide_the_machine(order["folder"], order["file_bytes"])
    os.chdir(order["folder"])
    checked(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    child = os.fork()
    if child == 0:
        lock(order)
        run(order, result_file)
        return 0
    code = exit_code(child, order["time_s"])
    end_descendants()
    return code


def hide_the_machine(folder: str, size: int) -> None:
    """In fresh namespaces: no processes but our own, every file read-only, and an empty folder of bounded size."""
    checked(libc.mount(b"proc", b"/proc", b"proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None))
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")  # in a namespace of its own the child would have capabilities again
    read_only = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY, 0, 0, 0)
    checked(libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, read_only, ctypes.sizeof(read_only)))
    options = f"size={size},mode=700".encode()
    checked(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options))


def lock(order: dict[str, Any]) -> None:
    """Limits and no rights, for this process and all that it starts."""
    os.setsid()
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # so that it does not outlive who watches over it
    bounds = [
        (resource.RLIMIT_CPU, ceil(order["time_s"])),
        (resource.RLIMIT_AS, order["memory_bytes"]),
        (resource.RLIMIT_FSIZE, order["file_bytes"]),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ]
    if order["namespaces"]:  # elsewhere the kernel would count all processes of the user
        bounds.append((resource.RLIMIT_NPROC, MAX_PROCESSES))
    for what, bound in bounds:
        resource.setrlimit(what, (bound, bound))
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if order["namespaces"]:
        checked(libc.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()))


def run(order: dict[str, Any], result_file: int) -> None:
    """The program, then the checks, in one module; each check that ends well leaves the token in the result."""
    module = types.ModuleType("program" if order["checks"] else "__main__")
    sys.modules[module.__name__] = module
    sys.argv[:] = ["program.py"]
    exec(compile(order["program"], "program.py", "exec"), module.__dict__)
    for check in order["checks"]:
        try:
            exec(compile(check, "check.py", "exec"), module.__dict__)
        except (Exception, SystemExit):
            continue
        os.write(result_file, order["token"].encode())


def exit_code(child: int, time_s: float) -> int:
    """The child's, or STOPPED; returns when the child has ended or must be ended."""
    deadline = time.monotonic() + time_s
    while time.monotonic() < deadline and len(descendants()) <= MAX_PROCESSES:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        if pid == 0:
            time.sleep(POLL_S)
    return STOPPED


def end_descendants() -> None:
    """Kills until none is left: whoever loses its parent becomes a child of this process."""
    while found := descendants():
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            return


def descendants() -> list[int]:
    """Of this process, zombies too."""
    found, parents = [], [os.getpid()]
    while parents:
        for path in glob.glob(f"/proc/{parents.pop()}/task/*/children"):
            try:
                with open(path) as file:
                    children = [int(pid) for pid in file.read().split()]
            except (FileNotFoundError, ProcessLookupError):
                continue
            found += children
            parents += children
    return found


def checked(result: int) -> None:
    """Raises OSError for a call of the C library that failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    sys.exit(main())
