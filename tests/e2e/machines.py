"""Machines that are namespaces of this one: each has its own address, host name, processes, /tmp and home folder.

A bridge joins them, with no way further, and they share one folder, as machines do that mount the same storage; /opt is this
repository. Only root can make them, and all that runs on them ends with the process that made them.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

HOME = "/home/er"  # of root, on every machine
SHARED = f"{HOME}/eagleray"  # the shared folder
BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]

# The first process of a machine: $0 is its name, $1 the shared folder, $2 this repository.
_BOOT = f"""
mount --make-rprivate / && hostname $0 && mount --bind $1 /mnt && mount --bind $2 /opt
for folder in /home /tmp /dev/shm /run /var/spool; do mount -t tmpfs -o mode=1777 tmpfs $folder || exit 1; done
chmod 755 /home /run && mkdir -p {SHARED} && mount --bind /mnt {SHARED}
sed 's#^root:.*#root:x:0:0:root:{HOME}:/bin/bash#' /etc/passwd > /home/passwd && mount --bind /home/passwd /etc/passwd
echo 127.0.0.1 localhost $0 > /home/hosts && mount --bind /home/hosts /etc/hosts
touch /home/nameservers && mount --bind /home/nameservers /etc/resolv.conf
echo up && while :; do sleep 1000 & wait; done
"""


@dataclass(frozen=True)
class Machine:
    name: str
    address: str
    pid: int  # of its first process, as this machine counts
    isolated: bool = True  # False: on this machine, in the network of the others

    def start(
        self, script: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[str]:
        """Runs a bash script there, with stdout and stderr in one pipe."""
        spaces = ["-n", "-m", "-p", "-u"] if self.isolated else ["-n"]
        own = {"HOME": HOME} if self.isolated else {}
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON", "VLLM_"))}
        return subprocess.Popen(
            ["nsenter", f"--target={self.pid}", *spaces, "bash", "-c", f"cd {HOME} && {script}" if self.isolated else script],
            env={**inherited, "PATH": f"{BIN}:{os.environ['PATH']}", **own, **(environment or {})},
            cwd=cwd,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(
        self, script: str, environment: Mapping[str, str] | None = None, cwd: Path | None = None, timeout_s: float = 240
    ) -> tuple[int, str]:
        """Exit code and output of a bash script there."""
        process = self.start(script, environment, cwd)
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return process.returncode, output


@contextmanager
def network(count: int, shared: Path) -> Iterator[tuple[Machine, list[Machine]]]:
    """A machine that only shares the network, for the person, and so many others named n1, n2, ..."""
    with ExitStack() as stack:

        def namespaces(*command: str) -> subprocess.Popen[str]:
            process = subprocess.Popen(["unshare", *command], stdout=subprocess.PIPE, text=True)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "up\n"
            return process

        switch = namespaces("--net", "bash", "-c", "echo up; exec sleep infinity").pid
        _ip(switch, "link set lo up", "link add lan type bridge", "addr add 10.77.0.254/24 dev lan", "link set lan up")
        machines = []
        for i in range(1, count + 1):
            spaces = ["--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
            process = namespaces(*spaces, "bash", "-c", _BOOT, f"n{i}", str(shared), str(REPOSITORY))
            pid = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            _ip(switch, f"link add n{i} type veth peer name eth0 netns {pid}", f"link set n{i} master lan up")
            _ip(pid, f"addr add 10.77.0.{i}/24 dev eth0", "link set eth0 up", "link set lo up")
            machines.append(Machine(f"n{i}", f"10.77.0.{i}", pid))
        yield Machine("laptop", "10.77.0.254", switch, isolated=False), machines


def _ip(pid: int, *commands: str) -> None:
    for command in commands:
        subprocess.run(["nsenter", f"--target={pid}", "-n", "ip", *command.split()], check=True)


def wait_for(condition: str, machine: Machine, timeout_s: float = 60) -> None:
    """Until a bash command succeeds on a machine."""
    deadline = time.monotonic() + timeout_s
    while machine.run(condition)[0] != 0:
        assert time.monotonic() < deadline, f"{machine.name}: {condition}"
        time.sleep(1)
