"""What Ray's dashboard says of a job: its actors, its nodes, their logs.

Over HTTP, with Ray's token: looking joins no cluster and asks nothing of an actor, so it disturbs no job, and it works from
another machine and when an actor is gone. `sightings.py` and `crash.py` look through here.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from actors.errors import ActorError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # where Ray's dashboard listens on a machine of its own
# The first word of every actor's name, in the order in which people look for them. Ray Train's workers are `worker RANK`.
ROLES = ("trainer", "worker", "engine", "reward", "samples", "reports", "quarantine")
STARTED_AGAIN = ", start "  # and a number: in the name of an actor that takes another one's place
# What Ray says of an actor that its driver ended, or that ended with its driver.
ASKED_FOR = ("ray.kill", "INTENDED", "owner has died", "references to the actor were removed", "placement group")
TIMEOUT_S = 10.0
MAX_ACTORS = 10_000  # the most that Ray tells of at once
TRAIN_WORKER = "RayTrainWorker"  # the class of Ray Train's workers, which have no name


@dataclass(frozen=True)
class Machine:
    """A node, with what it says of itself every few seconds."""

    node_id: str
    name: str
    memory_used: int  # bytes, of the machine or of its container
    memory_total: int  # bytes
    gpu_memory: tuple[tuple[int, int], ...]  # MiB used and in all, a GPU each
    alive: bool = True


@dataclass(frozen=True)
class Actor:
    """One actor of a job as it is now; `restarts` counts those before it that had its name."""

    actor_id: str
    name: str  # such as: engine 0
    class_name: str
    state: str  # Ray's: PENDING_CREATION, ALIVE, RESTARTING, DEAD ...
    node_id: str
    pid: int
    restarts: int
    memory: int | None = None  # bytes resident; None where Ray does not know it, as of a dead one
    gpu_memory: int | None = None  # MiB
    death: str = ""  # why it is dead, or the one that it took the place of, in Ray's words

    @property
    def killed(self) -> bool:
        """Whether it died without anybody's having asked for it."""
        return self.state == "DEAD" and _unasked(self.death)


class Dashboard:
    """The dashboard at an address as `address_of` has it. Every method raises ActorError when it does not answer, or otherwise
    than Ray's does.
    """

    def __init__(self, address: str | None, *, with_token: bool = True) -> None:
        """Raises ActorError when there is a token that cannot be read."""
        self.address = address_of(address)
        self._session = requests.Session()
        if with_token and (found := token()):
            self._session.headers["Authorization"] = f"Bearer {found}"

    def actors(self, job_id: str) -> list[Actor]:
        """The job's actors that have a role, the newest of each name, in order of name."""
        with self._understood():
            listed = self._listed("actors", job_id)
            processes = self._json("/logical/actors")["data"]["actors"]
            rows = [row for row in listed if row["class_name"] == TRAIN_WORKER]
            ranks = self._train_ranks(job_id) if rows else {}
            for row in rows:
                rank = ranks.get(row["actor_id"])
                row["name"] = f"worker {rank}" if rank is not None else f"worker of pid {row['pid']}"
            return named([row for row in listed if (row["name"] or "").split(" ")[0] in ROLES], processes)

    def machines(self) -> dict[str, Machine]:
        """The cluster's nodes, by id."""
        with self._understood():
            rows = self._json("/nodes", view="summary")["data"]["summary"]
            return {machine.node_id: machine for machine in map(_machine, rows)}

    def log(self, actor_id: str, suffix: str, lines: int) -> str:
        """The last lines of what an actor's process wrote, also of a dead one. suffix: out | err."""
        return self._text(actor_id=actor_id, suffix=suffix, lines=lines)

    def files(self, node_id: str, pattern: str) -> list[str]:
        """Names in a node's folder of logs."""
        with self._understood():
            groups = self._json("/api/v0/logs", node_id=node_id, glob=pattern)["data"]["result"]
            return sorted({name for names in groups.values() for name in names})

    def file(self, node_id: str, name: str, lines: int = -1) -> str:
        """The last lines of a file in a node's folder of logs; -1: all."""
        return self._text(node_id=node_id, filename=name, lines=lines)

    def running_jobs(self) -> list[str]:
        """Ids of the drivers that are connected, oldest first."""
        with self._understood():
            found = self._json("/api/v0/jobs", detail="true", limit=MAX_ACTORS)["data"]["result"]["result"]
            return sorted(row["job_id"] for row in found if row["job_id"] and row["status"] == "RUNNING")

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Around what takes an answer apart."""
        try:
            yield
        except (LookupError, TypeError, AttributeError) as error:
            raise ActorError(
                f"what answers at {self.address} is no dashboard of this version of Ray ({type(error).__name__}: {error})"
            ) from error

    def _listed(self, resource: str, job_id: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._json(
            f"/api/v0/{resource}",
            detail="true",
            limit=MAX_ACTORS,
            filter_keys="job_id",
            filter_predicates="=",
            filter_values=job_id,
        )["data"]["result"]["result"]
        return rows

    def _train_ranks(self, job_id: str) -> dict[str, int]:
        """Ranks of Ray Train's workers by actor id; nothing where Ray Train does not say."""
        try:
            runs = self._json("/api/train/v2/runs/v1")["train_runs"]
        except (ActorError, KeyError):
            return {}
        attempts = [attempt for run in runs if run["job_id"] == job_id for attempt in run["attempts"]]
        return {worker["actor_id"]: worker["world_rank"] for attempt in attempts for worker in attempt["workers"]}

    def _json(self, path: str, **params: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._get(path, params).json()
            return answer
        except requests.JSONDecodeError as error:
            raise ActorError(f"what answers at {self.address} is no dashboard of Ray") from error

    def _text(self, **params: Any) -> str:
        response = self._get("/api/v0/logs/file", {"format": "text", **params})
        response.encoding = "utf-8"  # and what is no text, such as a progress bar cut in half, is replaced
        return response.text

    def _get(self, path: str, params: Mapping[str, Any]) -> requests.Response:
        try:
            response = self._session.get(self.address + path, params=params, timeout=TIMEOUT_S)
        except requests.RequestException as error:
            reason = type(error).__name__  # its text is the stack of three libraries
            raise ActorError(f"Ray's dashboard at {self.address} does not answer ({reason})") from error
        if response.status_code in (401, 403):
            raise ActorError(
                f"Ray's dashboard at {self.address} refuses this token, or none; put what `ray get-auth-token` prints there "
                "into RAY_AUTH_TOKEN or ~/.ray/auth_token"
            )
        if not response.ok:
            reason = (response.text.strip() or response.reason).splitlines()[-1]
            raise ActorError(f"Ray's dashboard at {self.address} has no answer to {path} ({reason})")
        return response


def named(rows: Sequence[Mapping[str, Any]], processes: Mapping[str, Mapping[str, Any]]) -> list[Actor]:
    """The newest actor of each name. rows: of the state API; processes: by actor id, of the page Actors."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: _started(row, processes)):
        by_name.setdefault(row["name"].split(STARTED_AGAIN)[0], []).append(row)
    found = []
    for name in sorted(by_name, key=lambda name: (ROLES.index(name.split(" ")[0]), len(name), name)):
        *before, row = by_name[name]
        deaths = [death for one in (row, *reversed(before)) if (death := _death(one))]
        process = processes.get(row["actor_id"]) or {}
        found.append(
            Actor(
                actor_id=row["actor_id"],
                name=name,
                class_name=row["class_name"],
                state=row["state"],
                node_id=row["node_id"] or "",
                pid=row["pid"] or 0,
                restarts=len(before) + int(row["num_restarts"] or 0),
                memory=((process.get("processStats") or {}).get("memoryInfo") or {}).get("rss"),
                gpu_memory=_gpu_memory(process, row["pid"]),
                death=next(filter(_unasked, deaths), deaths[0] if deaths else ""),
            )
        )
    return found


def _started(row: Mapping[str, Any], processes: Mapping[str, Mapping[str, Any]]) -> tuple[int, int]:
    """Orders the actors of one name: by the number of their start, and those that Ray Train started by time."""
    again = row["name"].split(STARTED_AGAIN)[1:]
    return int(again[0]) if again else 1, int((processes.get(row["actor_id"]) or {}).get("startTime") or 0)


def _death(row: Mapping[str, Any]) -> str:
    """In Ray's words; "" of what is alive."""
    why = row["death_cause"] or {}
    context = next((part for part in why.values() if isinstance(part, dict) and "error_message" in part), {})
    return str(context.get("error_message") or "")


def _unasked(death: str) -> bool:
    return not any(words in death for words in ASKED_FOR)


def _gpu_memory(process: Mapping[str, Any], pid: int | None) -> int | None:
    used = [
        int(one["gpuMemoryUsage"])
        for gpu in process.get("gpus") or []
        for one in gpu.get("processesPids") or []
        if one["pid"] == pid
    ]
    return sum(used) if used else None


def _machine(row: Mapping[str, Any]) -> Machine:
    raylet = row["raylet"]
    total, available = (row.get("mem") or [0, 0])[:2]
    gpus = tuple((int(gpu["memoryUsed"]), int(gpu["memoryTotal"])) for gpu in row.get("gpus") or [])
    name = row.get("hostname") or raylet.get("nodeManagerHostname") or raylet["nodeManagerAddress"]
    return Machine(raylet["nodeId"], name, int(total - available), int(total), gpus, raylet.get("state") == "ALIVE")


def address_of(named: str | None) -> str:
    """A dashboard's address, whole; of the one at RAY_API_SERVER_ADDRESS, or on this machine, where none is named."""
    address = named or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return (address if "://" in address else f"http://{address}").rstrip("/")


def token() -> str:
    """The cluster's token, from where Ray itself looks for it; "" where there is none. Raises ActorError for a damaged file."""
    if named := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return named
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        return file.read_text(encoding="utf-8").strip() if file.is_file() else ""
    except (OSError, ValueError) as error:
        raise ActorError(f"Ray's token in {file} cannot be read ({error}); set RAY_AUTH_TOKEN, or mend the file") from error
