"""Jobs on Ray clusters of several machines, each with its own address, processes, /tmp and home folder, made by namespaces.

The clusters are started as cluster/ says, by `ray up` over SSH and by a real Slurm.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator.dashboard import DEFAULT_ADDRESS
from tests.e2e.machines import HOME, SHARED, Machine, network, wait_for

pytestmark = pytest.mark.slow

Command = Callable[..., tuple[int, str]]  # a line of bash to its exit code and output

REPOSITORY = Path(__file__).parents[2]
EAGLERAY = f"{sys.executable} -m orchestrator"
JOINED = """RAY_AUTH_MODE=token python -c '
import ray
ray.init(address="auto", logging_level="ERROR")
assert sum(node["Alive"] for node in ray.nodes()) == 3'
"""
ACTORS = """RAY_AUTH_MODE=token python -c '
import json
import ray
from ray.util.state import list_actors
ray.init(address="auto", logging_level="ERROR")
hosts = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
print(json.dumps([(a.job_id, a.class_name, hosts[a.node_id]) for a in list_actors(limit=1000) if a.node_id]))'
"""


def needs(*commands: str) -> pytest.MarkDecorator:
    missing = [command for command in commands if shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return pytest.mark.skipif(os.geteuid() != 0 or bool(missing), reason=f"needs root, and these commands: {commands}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Path:
    """What all machines mount at ~/eagleray, with the model in it."""
    folder = tmp_path_factory.mktemp("storage") / "shared"
    shutil.copytree(llama, folder / "llama")
    folder.chmod(0o755)
    return folder


@pytest.fixture
def mine(tmp_path: Path, job: Callable[..., Path]) -> Path:
    """The folder of a job whose every actor wants a machine of its own, with rows and reward function beside job.yaml."""
    folder = tmp_path / "mine"
    folder.mkdir()
    config = job(
        base_model=f"{SHARED}/llama", datasets=[{"path": "prompts.jsonl"}], ray__trainer_cpus=2, ray__engine_cpus=2
    )
    for name in (config.name, "prompts.jsonl", "tiny_rewards.py"):
        (tmp_path / name).rename(folder / name)
    return folder


def placed(head: Machine) -> dict[str, set[str]]:
    """On which machines actors of each class have been, of the newest job."""
    code, output = head.run(ACTORS)
    assert code == 0, output
    found: dict[str, set[str]] = {}
    rows = json.loads(output.splitlines()[-1])
    newest = max((job for job, _, _ in rows), key=lambda job: bytes.fromhex(job)[::-1])  # Ray counts with the low byte first
    for job, name, host in rows:
        if job == newest:
            found.setdefault(name, set()).add(host)
    return found


def has_result(output_dir: Path, steps: int) -> bool:
    return (output_dir / "adapter_model.safetensors").is_file() and (
        output_dir / f"checkpoint-{steps}" / "manifest.json"
    ).is_file()


@pytest.fixture(scope="module")
def on_premise(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[tuple[Command, Machine]]:
    """A person's command line, and the head of the cluster that `ray up cluster/ray-up/on-premise.yaml` has made."""
    home = tmp_path_factory.mktemp("person")
    (home / ".ray").mkdir(parents=True)
    key = shared / "key"
    person = {"HOME": str(home), "RAY_TMPDIR": str(home), "PYTHONPATH": str(REPOSITORY)}
    with network(3, shared) as (laptop, machines):

        def command(text: str, **environment: str) -> tuple[int, str]:
            return laptop.run(text, {**person, **environment}, REPOSITORY)

        command(f"ssh-keygen -q -t ed25519 -N '' -f {key}; ray get-auth-token --generate")
        servers = [
            machine.start("mkdir -p /run/sshd && exec /usr/sbin/sshd -D -o UsePAM=no -o AuthorizedKeysFile=/mnt/key.pub")
            for machine in machines
        ]
        config = yaml.safe_load((REPOSITORY / "cluster" / "ray-up" / "on-premise.yaml").read_text())
        config["provider"] |= {"head_ip": machines[0].address, "worker_ips": [m.address for m in machines[1:]]}
        config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
        config["setup_commands"] = [f"ln -sfn {sys.prefix} ~/eagleray-code/.venv"]  # instead of an hour of downloads
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            config[name] = [line.replace("export ", "export PYTHONPATH=~/eagleray-code ") for line in config[name]]
        written = home / "on-premise.yaml"
        written.write_text(yaml.safe_dump(config))
        code, output = command(f"ray up --yes --no-config-cache {written}")
        assert code == 0, output
        tunnel = laptop.start(f"exec ray dashboard {written}", person, REPOSITORY)
        try:
            wait_for(f"wget -qO- {DEFAULT_ADDRESS}", laptop)
            wait_for(JOINED, machines[0], 120)
            yield command, machines[0]
        finally:
            for process in (tunnel, *servers):
                process.kill()
                process.wait()


@needs("ssh-keygen", "sshd", "rsync", "ip", "nsenter")
def test_a_job_spreads_over_the_machines_that_ray_up_has_joined(
    on_premise: tuple[Command, Machine], mine: Path, shared: Path
) -> None:
    command, head = on_premise
    code, output = command(f"{EAGLERAY} submit {mine}/job.yaml output_dir=outputs/spread")
    assert code == 0 and "done: 4 steps" in output, output
    assert has_result(shared / "outputs" / "spread", 4)
    where = placed(head)
    assert len(where["Trainer"] | where["RolloutEngine"]) == 2, where

    code, output = command(f"{EAGLERAY} submit {mine}/job.yaml output_dir=outputs/long max_steps=100000 --no-wait")
    name = output.split()[1]
    try:
        deadline, state = time.monotonic() + 60, "pending"
        while state == "pending" and time.monotonic() < deadline:
            code, output = command(f"{EAGLERAY} status")
            (line,) = [line for line in output.splitlines() if line.endswith("output_dir=outputs/long max_steps=100000")]
            state = line.split()[1]
        assert code == 0 and state == "running", output
    finally:
        code, output = command(f"{EAGLERAY} stop {name} && {EAGLERAY} status {name}")
    assert code == 0 and "state   stopped" in output, output
    code, output = command(f"{EAGLERAY} status", RAY_AUTH_TOKEN="another")
    assert code == 1 and "refuses this token" in output and "Traceback" not in output


@needs("ssh-keygen", "sshd", "rsync", "ip", "nsenter")
def test_ranks_on_several_machines_train_together(
    on_premise: tuple[Command, Machine], mine: Path, shared: Path
) -> None:
    """The host names of these machines stand for the loopback interface, where ranks of others are not to be found."""
    command, head = on_premise
    code, output = command(f"{EAGLERAY} submit {mine}/job.yaml output_dir=outputs/ranks ray_num_workers=2")
    assert code == 0 and has_result(shared / "outputs" / "ranks", 4), output
    assert len(placed(head)["Trainer"]) == 2

    config = yaml.safe_load((mine / "job.yaml").read_text())
    sft = {key: value for key, value in config.items() if key not in ("rl", "trl", "ray")}
    sft |= {"datasets": [{"path": "prompts.jsonl", "type": "completion", "field": "prompt"}], "ray": {"trainer_cpus": 2}}
    sft |= {"ray_num_workers": 2, "output_dir": "outputs/sft", "micro_batch_size": 4}
    (mine / "sft.yaml").write_text(yaml.safe_dump(sft))
    code, output = command(f"{EAGLERAY} submit {mine}/sft.yaml")
    assert code == 0 and has_result(shared / "outputs" / "sft", 4), output
    assert len(placed(head)["RayTrainWorker"]) == 2


def slurm_conf(machines: list[Machine]) -> str:
    nodes = "".join(f"NodeName={m.name} NodeAddr={m.address} CPUs=2\n" for m in machines)
    settings: dict[str, Any] = {
        "ClusterName": "machines",
        "SlurmctldHost": f"{machines[0].name}({machines[0].address})",
        "SlurmUser": "root",
        "ProctrackType": "proctrack/linuxproc",
        "SelectType": "select/cons_tres",
        "StateSaveLocation": "/var/spool/slurmctld",
        "SlurmdSpoolDir": "/var/spool/slurmd",
        "SlurmctldPidFile": "/run/slurmctld.pid",
        "SlurmdPidFile": "/run/slurmd.pid",
        "PartitionName": "all Nodes=ALL Default=YES State=UP",
    }
    lines = [f"{key}={value}\n" for key, value in settings.items()]
    return "".join([*lines[:-1], nodes, lines[-1]])


def start_slurm(machines: list[Machine], shared: Path) -> dict[str, str]:
    """Starts munge and Slurm on all machines, with the controller on the first; returns the environment of its commands."""
    environment = {"SLURM_CONF": f"{SHARED}/slurm.conf"}
    (shared / "slurm.conf").write_text(slurm_conf(machines))
    (shared / "munge.key").write_bytes(os.urandom(1024))
    munged = "munged --force --key-file=/run/munge/key --pid-file=/run/munge/pid --log-file=/run/munge/log"
    for machine in machines:
        daemons = "slurmctld && slurmd" if machine is machines[0] else "slurmd"
        code, output = machine.run(
            "mkdir -p /run/munge /var/spool/slurmd /var/spool/slurmctld && cp /mnt/munge.key /run/munge/key && "
            "chown -R munge: /run/munge && chmod 400 /run/munge/key && "
            f"setpriv --reuid munge --regid munge --clear-groups {munged} --seed-file=/run/munge/seed "
            f"--socket=/run/munge/munge.socket.2 && {daemons}",
            {**environment, "PATH": f"{os.environ['PATH']}:/usr/sbin"},
        )
        assert code == 0, output
    wait_for("SLURM_CONF=/mnt/slurm.conf sinfo --noheader --states=idle | grep -q n", machines[0])
    return environment


@needs("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter")
def test_the_slurm_script_runs_a_job_on_the_nodes_of_its_allocation(mine: Path, shared: Path) -> None:
    shutil.copytree(mine, shared / "mine")
    with network(2, shared) as (_, machines):
        slurm = start_slurm(machines, shared)

        def sbatch(nodes: int) -> tuple[int, str]:
            """Exit code and log of a Slurm job."""
            command = f"sbatch --wait --parsable --nodes={nodes} /opt/cluster/slurm/eagleray.sbatch"
            environment = {**slurm, "VENV": sys.prefix, "PYTHONPATH": "/opt", "HOME": HOME}
            code, output = machines[1].run(f"cd {SHARED}/mine && {command} job.yaml output_dir=outputs/slurm", environment)
            return code, (shared / "mine" / f"eagleray-{output.strip()}.log").read_text()

        code, log = sbatch(nodes=2)
        assert code == 0 and has_result(shared / "outputs" / "slurm", 4), log
        hosts = {line.split(" on ")[1] for line in log.splitlines() if "trainer 0:" in line or "engine 0:" in line}
        assert hosts == {"n1", "n2"}, log
        code, log = sbatch(nodes=1)
        assert code == 1 and "holds an earlier run" in log, log
        for machine in machines:  # nothing is left behind
            assert machine.run("ls /tmp | grep '^ray'; pgrep raylet")[1] == ""
