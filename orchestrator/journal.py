"""What a run tells of itself besides its metrics: OUTPUT_DIR/events.jsonl, a line of JSON an event.

    {"time": ..., "kind": "start", "job_id": "02000000", "dashboard": "http://...", "run": ..., "method": ..., ...}
    {"time": ..., "kind": "plan", "steps": 16}                   optimizer steps in all
    {"time": ..., "kind": "phase", "text": "step 3 of 16"}       what the run waits for
    {"time": ..., "kind": "warning", "text": ...}
    {"time": ..., "kind": "end", "how": "done" | "stopped" | "failed", "text": ...}

Nothing in it is ever overwritten: a resumed run adds its own start. Ray's folder of logs gets links to it and to
metrics.jsonl, so that the dashboard shows both and `eagleray top` finds them from another machine.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.metrics import METRICS_FILE

if TYPE_CHECKING:
    from orchestrator.cluster import Connection  # at run time it would load torch

EVENTS_FILE = "events.jsonl"
LINKS = {"events": EVENTS_FILE, "metrics": METRICS_FILE}  # eagleray-JOB_ID-events.jsonl


class Journal:
    """Writes the events of one run. A disk that does not take them costs the events, never the run."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.path = output_dir / EVENTS_FILE

    def start(self, here: "Connection", *, run: str, method: str, model: str) -> None:
        """The run is connected to a cluster."""
        self.tell(
            "start",
            job_id=here.job_id,
            dashboard=here.dashboard,
            host=socket.gethostname(),
            pid=os.getpid(),
            run=run,
            method=method,
            model=model,
            output_dir=str(self.output_dir),
        )
        for what, name in LINKS.items():
            with suppress(OSError):  # Ray's folder may be another user's
                (here.logs / linked(here.job_id, what)).symlink_to(self.output_dir / name)

    def tell(self, kind: str, **fields: Any) -> None:
        """Adds one event; it is on disk when this returns. kind: start | plan | phase | warning | end."""
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}) + "\n"
        with suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(line)


def linked(job_id: str, what: str) -> str:
    """The name in Ray's folder of logs. what: events | metrics."""
    return f"eagleray-{job_id}-{what}.jsonl"


def read_events(output_dir: Path) -> list[dict[str, Any]]:
    """Those of a run so far, oldest first; none where it has told none yet."""
    try:
        return parse((output_dir / EVENTS_FILE).read_text(encoding="utf-8", errors="replace").splitlines())
    except FileNotFoundError:
        return []


def steps_of(events: Sequence[Mapping[str, Any]]) -> int | None:
    """Optimizer steps in all, as a run planned them last; None = it has not yet."""
    return next((event["steps"] for event in reversed(events) if event["kind"] == "plan"), None)


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Lines of JSON as dicts; one that is half written, by a process that was killed or is just writing, is left out."""
    found = []
    for line in lines:
        with suppress(ValueError):
            value = json.loads(line)
            if isinstance(value, dict) and "kind" in value:
                found.append(value)
    return found
