"""The report of a failure: OUTPUT_DIR/crash/TIME-step-N/, with report.md for people, report.json, and the ends of logs.

`look` asks Ray's dashboard while the cluster is still there, `write` makes the folder. Neither raises: whatever they cannot
find out is said in the report. What a person has got wrong in the configuration or the data is no crash.
"""

import json
import re
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from actors.errors import ActorError, ConfigError, DataError
from orchestrator.causes import Cause, likely
from orchestrator.cluster import Connection
from orchestrator.dashboard import Actor, Dashboard, Machine
from orchestrator.display import gib

NO_CRASH = (ConfigError, DataError)
LOG_LINES = 200  # of a log that is kept
SHOWN_LINES = 30  # of them in report.md
MAX_LOGS = 8  # actors whose logs are kept; of a cluster that is lost all would be


@dataclass(frozen=True)
class Evidence:
    """What Ray said at the time of the failure."""

    actors: tuple[Actor, ...] = ()
    machines: dict[str, Machine] = field(default_factory=dict)  # by node id
    blamed: Actor | None = None  # None = the driver itself
    logs: dict[str, str] = field(default_factory=dict)  # the end of each, by file name such as engine-0.err
    missing: str = ""  # why there is no more

    @property
    def machine(self) -> Machine | None:
        """The node of the actor that failed."""
        return self.machines.get(self.blamed.node_id) if self.blamed else None


@dataclass(frozen=True)
class Place:
    """Where in the run it happened."""

    run: str
    method: str
    model: str
    step: int  # that was not finished
    steps: int | None  # in all; None where the run had not got so far
    doing: str  # the last thing that it waited for
    warnings: tuple[str, ...]  # the last ones


def look(here: Connection, error: BaseException) -> Evidence:
    """Asks the dashboard who failed and what its log says."""
    if here.dashboard is None:
        return Evidence(missing="the cluster has no dashboard, so nothing is known of its actors")
    try:
        dashboard = Dashboard(here.dashboard)
        actors, machines = dashboard.actors(here.job_id), dashboard.machines()
    except (ActorError, OSError, ValueError) as failure:  # the run has failed already
        return Evidence(missing=str(failure))
    blamed = to_blame(str(error), actors)
    logs = {}
    missing = ""
    for actor in sorted((a for a in actors if a is blamed or a.killed), key=lambda a: a is not blamed)[:MAX_LOGS]:
        file = re.sub(r"[^A-Za-z0-9.]+", "-", actor.name)
        for suffix in ("out", "err"):
            try:
                logs[f"{file}.{suffix}"] = dashboard.log(actor.actor_id, suffix, LOG_LINES)
            except ActorError as failure:  # as of an actor that never started
                missing = str(failure)
    return Evidence(tuple(actors), machines, blamed, logs, missing)


def to_blame(message: str, actors: Sequence[Actor]) -> Actor | None:
    """The actor that the first line of a message names first, else one that died unasked; None = the driver itself."""
    line = message.partition("\n")[0]
    found = [(match.start(), -len(a.name), a) for a in actors if (match := re.search(rf"\b{re.escape(a.name)}(?!\w)", line))]
    if found:
        return min(found, key=lambda entry: entry[:2])[2]
    return next((actor for actor in actors if actor.killed), None)


def cause_of(error: BaseException, evidence: Evidence) -> Cause | None:
    """What probably lies behind it: by the exception, by Ray's word on the death, by the log."""
    death = evidence.blamed.death if evidence.blamed else ""
    return likely("".join(traceback.format_exception(error)), death, "\n".join(evidence.logs.values()))


def write(output_dir: Path, error: BaseException, evidence: Evidence, place: Place) -> str:
    """Makes the folder, unless the disk does not take it; returns what the terminal shows of it."""
    cause = cause_of(error, evidence)
    try:
        folder = _new_folder(output_dir / "crash", place)
        (folder / "logs").mkdir()
        for name, text in evidence.logs.items():
            (folder / "logs" / name).write_text(text, encoding="utf-8", errors="replace")
        report = _report(error, evidence, place, cause)
        (folder / "report.md").write_text(report, encoding="utf-8", errors="replace")
        facts = _facts(error, evidence, place, cause)
        (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as failure:
        return _short(evidence, place, cause, f"could not be written: {failure}")
    return _short(evidence, place, cause, f"{folder}/report.md")


def _new_folder(parent: Path, place: Place) -> Path:
    """A folder of this crash alone: an earlier one is never written to."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-step-{place.step}"
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise FileExistsError(f"{parent}/{name}")


def _where(evidence: Evidence) -> str:
    actor = evidence.blamed
    if actor is None:
        return "the driver" if not evidence.missing else "not known"
    machine = evidence.machine
    return f"{actor.name} (pid {actor.pid}) on {machine.name if machine else actor.node_id or 'no node yet'}"


def _when(place: Place) -> str:
    return f"step {place.step}" + (f" of {place.steps}" if place.steps else "")


def _short(evidence: Evidence, place: Place, cause: Cause | None, report: str) -> str:
    lines = {
        "where": f"{_where(evidence)}, {_when(place)}",
        "likely": cause.cause if cause else "none of the causes that are known: the report has the exception and the log",
        "remedy": cause.remedy if cause else "",
        "report": report,
    }
    return "\n".join(f"  {name:<7} {text}" for name, text in lines.items() if text)


def _facts(error: BaseException, evidence: Evidence, place: Place, cause: Cause | None) -> dict[str, Any]:
    return {
        "time": round(time.time(), 3),
        **asdict(place),
        "error": {"kind": type(error).__name__, "message": str(error), "traceback": traceback.format_exception(error)},
        "cause": {"name": cause.name, "cause": cause.cause, "remedy": cause.remedy} if cause else None,
        "actor": asdict(evidence.blamed) if evidence.blamed else None,
        "machine": asdict(evidence.machine) if evidence.machine else None,
        "actors": [asdict(actor) for actor in evidence.actors],
        "machines": [asdict(machine) for machine in evidence.machines.values()],
        "logs": sorted(evidence.logs),
        "missing": evidence.missing,
    }


def _report(error: BaseException, evidence: Evidence, place: Place, cause: Cause | None) -> str:
    actor, machine = evidence.blamed, evidence.machine
    facts = {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "run": f"{place.run}: {place.method} of {place.model}",
        "step": _when(place) if place.doing in ("", _when(place)) else f"{_when(place)}; {place.doing}",
        "actor": _where(evidence),
        "role": f"{actor.name.split(' ')[0]} ({actor.class_name}), {actor.state}, {actor.restarts} restarts" if actor else "",
        "memory of the process": _memory_of_process(actor) if actor else "",
        "memory of the node": _memory(machine) if machine else "",
        "Ray says": actor.death if actor else "",
        "not known": evidence.missing,
    }
    parts = [f"# {_where(evidence)} failed in {_when(place)}\n"]
    parts += ["| | |\n|---|---|", *(f"| {name} | {_cell(text)} |" for name, text in facts.items() if text), ""]
    parts += ["## Likely cause\n", cause.cause if cause else "None of those that are known.", ""]
    parts += [f"What helps: {cause.remedy}\n"] if cause else []
    parts += ["## What was said\n", _fenced("".join(traceback.format_exception(error)))]
    if place.warnings:
        parts += ["## The last warnings\n", *(f"- {_cell(text)}" for text in place.warnings), ""]
    if evidence.actors:
        parts += ["## Actors\n", _table(evidence), ""]
    for name, text in evidence.logs.items():
        shown = text.rstrip().splitlines()[-SHOWN_LINES:]
        parts += [f"## The end of logs/{name}\n", _fenced("\n".join(shown) or "(nothing)")]
    return "\n".join(parts)


def _table(evidence: Evidence) -> str:
    lines = ["| actor | state | node | pid | memory | restarts |", "|---|---|---|---|---|---|"]
    for actor in evidence.actors:
        machine = evidence.machines.get(actor.node_id)
        memory = gib(actor.memory) if actor.memory else "-"
        lines.append(
            f"| {actor.name} | {actor.state} | {machine.name if machine else '-'} | {actor.pid} | {memory} | {actor.restarts} |"
        )
    return "\n".join(lines)


def _memory_of_process(actor: Actor) -> str:
    if actor.memory is None:
        return "not known any more: the process is gone" if actor.state == "DEAD" else "not known"
    gpu = f", and {gib(actor.gpu_memory * 2**20)} of a GPU" if actor.gpu_memory else ""
    return f"{gib(actor.memory)}{gpu}{', the last time that it was looked at' if actor.state == 'DEAD' else ''}"


def _memory(machine: Machine) -> str:
    gpus = [f"GPU {i} {used / 1024:.1f} of {total / 1024:.1f} GiB" for i, (used, total) in enumerate(machine.gpu_memory)]
    return ", ".join([f"{gib(machine.memory_used)} of {gib(machine.memory_total)} used, just after", *gpus])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _fenced(text: str) -> str:
    return f"````\n{text.rstrip()}\n````\n"
