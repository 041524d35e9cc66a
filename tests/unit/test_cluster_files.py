"""What lies in cluster/ is what Ray, KubeRay, Docker and Slurm take, and fits together. Running it is for tests/e2e."""

import copy
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
CLUSTER = REPOSITORY / "cluster"
RAY_UP = sorted(CLUSTER.glob("ray-up/*.yaml"))
KUBERAY = sorted(CLUSTER.glob("kuberay/ray*.yaml"))
STORAGE = CLUSTER / "kuberay" / "storage.yaml"
DOCKERFILE = (CLUSTER / "docker" / "Dockerfile").read_text()
SBATCH = CLUSTER / "slurm" / "eagleray.sbatch"


def pinned(package: str) -> str:
    return re.findall(rf"^{package}==(.+)$", (REPOSITORY / "requirements" / "cpu.txt").read_text(), re.MULTILINE)[0]


def crds() -> dict[str, Any]:
    """The schema of each kind, in which a field that it does not name is an error."""
    documents = yaml.safe_load_all((Path(__file__).parent / "fixtures" / "kuberay-crds.yaml").read_text())
    schemas = {crd["spec"]["names"]["kind"]: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for crd in documents}
    schemas["RayJob"]["properties"]["spec"]["properties"]["rayClusterSpec"] = schemas["RayCluster"]["properties"]["spec"]

    def closed(schema: Any) -> Any:
        if isinstance(schema, list):
            return [closed(item) for item in schema]
        if not isinstance(schema, dict):
            return schema
        inner = {key: closed(value) for key, value in schema.items()}
        return {**inner, "additionalProperties": False} if "properties" in schema and "type" in schema else inner

    return {kind: closed(schema) for kind, schema in schemas.items()}


def custom_resource(path: Path) -> Any:
    """The one in a file: with the volume in it, deleting a job would delete all results."""
    [resource] = yaml.safe_load_all(path.read_text())
    return resource


def pods(resource: Any) -> list[Any]:
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def test_there_is_a_file_for_each_way() -> None:
    assert [path.stem for path in RAY_UP] == ["aws", "gcp", "on-premise"]
    assert [path.stem for path in KUBERAY] == ["raycluster-cpu", "raycluster-gpu", "rayjob-cpu", "rayjob-gpu"]


@pytest.mark.parametrize("path", [*RAY_UP, *KUBERAY, STORAGE], ids=lambda path: path.stem)
def test_the_command_at_the_top_names_the_file(path: Path) -> None:
    command = path.read_text().split("\n")[2].removeprefix("#").strip()
    assert command in (f"ray up {path.relative_to(REPOSITORY)}", f"kubectl apply -f {path.relative_to(REPOSITORY)}")


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.stem)
def test_ray_up_takes_the_file(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    starts = [config["head_start_ray_commands"][-1], config["worker_start_ray_commands"][-1]]
    assert all("RAY_AUTH_MODE=token" in start and "dashboard-host" not in start for start in starts)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for node in config.get("available_node_types", {}).values():
        assert node.get("min_workers", 0) == node.get("max_workers", 0)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_takes_the_file(path: Path) -> None:
    resource = custom_resource(path)
    jsonschema.Draft202012Validator(crds()[resource["kind"]]).validate(resource)
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    assert spec["rayVersion"] == pinned("ray")
    assert spec["authOptions"] == {"mode": "token"}


def test_the_volume_is_one_that_many_nodes_mount() -> None:
    claim = custom_resource(STORAGE)
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert all(str(STORAGE.relative_to(REPOSITORY)) in path.read_text() for path in KUBERAY)


def test_a_field_that_kuberay_lacks_is_found() -> None:
    resource = custom_resource(KUBERAY[0])
    resource["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.Draft202012Validator(crds()["RayCluster"]).validate(resource)


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_pods_run_as_the_user_of_the_image_on_the_shared_volume(path: Path) -> None:
    [user] = re.findall(r"useradd .*--uid (\d+) .* (\w+) &&", DOCKERFILE)
    claim = custom_resource(STORAGE)["metadata"]["name"]
    for pod in pods(custom_resource(path)):
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": int(user[0]), "fsGroup": int(user[0])}
        volumes = {volume["name"] for volume in pod["volumes"]}
        assert [v["persistentVolumeClaim"] for v in pod["volumes"] if v["name"] == "eagleray"] == [{"claimName": claim}]
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts) == {f"/home/{user[1]}/eagleray", "/dev/shm"} and set(mounts.values()) == volumes
            assert container["image"] == f"eagleray:{path.stem.partition('-')[2]}"
            has_gpu = "gpu" in path.stem and "worker" in container["name"]
            assert ("nvidia.com/gpu" in container["resources"]["limits"]) == has_gpu


@pytest.mark.parametrize("path", [path for path in KUBERAY if "job" in path.stem], ids=lambda path: path.stem)
def test_the_job_of_a_rayjob_is_in_the_image_and_writes_to_the_volume(path: Path) -> None:
    words = shlex.split(custom_resource(path)["spec"]["entrypoint"])
    assert words[:4] == ["python", "-m", "orchestrator", "run"]
    assert (REPOSITORY / Path(words[4]).relative_to("/opt/eagleray")).is_file()
    assert words[5].startswith("output_dir=/home/ray/eagleray/")


def test_images_are_built_as_make_does_and_do_not_run_as_root() -> None:
    lines = DOCKERFILE.replace("\\\n", " ").splitlines()
    steps = [line.partition(" ") for line in lines if line and not line.startswith(("#", " "))]
    names = [name for name, _, _ in steps]
    assert {name for name in names} <= {"ARG", "FROM", "RUN", "USER", "WORKDIR", "COPY", "ENV", "CMD"}
    assert [text for name, _, text in steps if name == "USER"] == ["ray"]
    setup = next(i for i, (_, _, text) in enumerate(steps) if text.startswith("make setup KIND=${KIND}"))
    assert names.index("USER") < names.index("COPY") < setup
    assert [text for name, _, text in steps if name == "FROM"][-1] == "base-${KIND}"
    for kind in ("cpu", "gpu"):
        assert (REPOSITORY / "requirements" / f"{kind}.txt").is_file() and f"AS base-{kind}\n" in DOCKERFILE
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "outputs"} <= set(ignored) and not {"requirements", "configs", "Makefile"} & set(ignored)


def test_no_cluster_is_started_without_a_token() -> None:
    """Ray refuses to start in this mode without one."""
    environment = [line for line in DOCKERFILE.splitlines() if line.startswith("ENV ")]
    assert any("RAY_AUTH_MODE=token" in line.split() for line in environment)
    for readme in (REPOSITORY / "README.md", CLUSTER / "README.md"):
        before, _, _ = readme.read_text().partition("`ray start --head`")
        assert "`ray get-auth-token --generate`" in before, readme


def slurm_node(folder: Path, node: int) -> subprocess.CompletedProcess[str]:
    """Runs the script where commands of Slurm, Ray and Eagleray write down how they were called. srun runs on one node."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text(f'PATH="{folder}/bin:$PATH"\n')
    (folder / "bin").mkdir()
    commands = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=$NODE SLURM_CPUS_ON_NODE=8 exec "$@"',
        "scontrol": 'echo "NodeName=$3 NodeAddr=127.0.0.7 Port=1"',
        "ray": 'echo "ray $*" >> calls; [ "$1" = start ] && exec sleep 600; echo the-token',
        "python": "until grep -q 'ray start' calls; do sleep 0.05; done",
        "eagleray": 'echo "eagleray $*" >> calls; [ "$RAY_AUTH_TOKEN$RAY_AUTH_MODE" = the-tokentoken ] && exit 7',
    }
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "2", "SLURMD_NODENAME": "n1", "NODE": str(node)}
    environment = {**{k: v for k, v in os.environ.items() if k not in ("VENV", "RAY_AUTH_TOKEN")}, **slurm}
    command = ["bash", str(SBATCH), "job.yaml", "trl.beta=0.04"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("node", (0, 1))
def test_the_slurm_script_starts_head_and_workers_and_submits(tmp_path: Path, node: int) -> None:
    """With stubs in place of Slurm and Ray."""
    ended = slurm_node(tmp_path, node)
    assert ended.returncode == 7, ended.stderr  # of the job
    token, start, submit = (tmp_path / "calls").read_text().splitlines()
    assert token == "ray get-auth-token --generate"
    assert submit == "eagleray submit job.yaml trl.beta=0.04 --address http://127.0.0.1:8265"
    head = "--head --port=6379" if node == 0 else "--address=127.0.0.7:6379"
    rest = "--temp-dir=/tmp/ray-42 --block --disable-usage-stats --node-ip-address=127.0.0.7 --num-cpus=8"
    assert start == f"ray start {head} {rest}"


@pytest.mark.parametrize(
    "path",
    sorted(p for p in CLUSTER.rglob("*") if p.is_file() and not {"pictures", "grafana"} & set(p.parts)),
    ids=lambda p: p.name,
)
def test_no_secret_and_no_server_is_written_down(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"\b[\w-]+\.(io|com|org|net|dev)/", text.replace("ray.io/v1", "").replace("nvidia.com/gpu", ""))
    assert not re.search(r"\b[0-9a-f]{32,}\b|BEGIN .*KEY|AKIA[0-9A-Z]{12}", text)
