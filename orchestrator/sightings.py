"""What `eagleray top` sees of a run, from its folder or from a cluster's dashboard; looking writes nothing.

A folder has the run's events and records, and they say where its dashboard is. A dashboard alone has them too, as links in
Ray's folders of logs. A new place to look from is a class with `look() -> Sighting`.
"""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import ActorError, EaglerayError
from orchestrator.dashboard import Actor, Dashboard, Machine
from orchestrator.journal import EVENTS_FILE, linked, parse
from orchestrator.metrics import METRICS_FILE

RECENT_LINES = 500  # of a file behind a dashboard; more would only go through the network again and again


@dataclass(frozen=True)
class Sighting:
    """A run at one moment."""

    start: dict[str, Any]  # the event
    events: Sequence[dict[str, Any]]  # since then
    records: Sequence[dict[str, Any]]  # of metrics.jsonl, oldest first; behind a dashboard the last ones
    actors: Sequence[Actor]
    machines: dict[str, Machine]  # by id
    unseen: str  # why nothing is known of the actors; "" = it is
    at: float  # time.time()

    def told(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind, oldest first."""
        return [event for event in self.events if event["kind"] == kind]

    @property
    def end(self) -> dict[str, Any] | None:
        """The run's own last word; None = it goes on, or was killed before it had one."""
        return next(iter(self.told("end")), None)

    @property
    def train(self) -> list[dict[str, Any]]:
        """The records of steps."""
        return [record for record in self.records if record["kind"] == "train"]


class OfFolder:
    """A run by its output_dir. Raises EaglerayError when there is none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dashboard: Dashboard | None = None
        if not (folder / EVENTS_FILE).is_file():
            raise EaglerayError(
                f"{folder} holds no run to watch ({EVENTS_FILE} is missing); give the output_dir of one, or --address of its "
                "cluster's dashboard, such as http://127.0.0.1:8265"
            )

    def look(self) -> Sighting:
        """Reads the files, and asks the dashboard that they name."""
        events = self._lines(EVENTS_FILE)
        records = self._lines(METRICS_FILE)
        start, since = last_run(events)
        actors: list[Actor] = []
        machines: dict[str, Machine] = {}
        ended = any(event["kind"] == "end" for event in since)
        unseen = "" if start.get("dashboard") else "the run has not connected to Ray, or to a cluster without a dashboard"
        if not unseen and not ended:
            try:
                self.dashboard = self.dashboard or Dashboard(start["dashboard"], with_token=self._is_own())
                actors, machines = self.dashboard.actors(start["job_id"]), self.dashboard.machines()
            except ActorError as error:
                self.dashboard = None
                unseen = str(error)
        return Sighting(start, since, records, actors, machines, unseen, time.time())

    def _is_own(self) -> bool:
        """Whether this user wrote the events: the address in another one's may be anybody's."""
        return (self.folder / EVENTS_FILE).stat().st_uid == os.getuid()

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return parse(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.is_file() else []


class OfCluster:
    """The newest run of a cluster, by the address of its dashboard; running ones first.

    address: as `address_of` takes it. wanted: the end of an output_dir, "" = any. Raises EaglerayError when there is none,
    ActorError when nothing answers.
    """

    def __init__(self, address: str | None, wanted: str = "") -> None:
        self.dashboard = Dashboard(address)
        self.node_id, self.job_id, self.events = self._find(wanted)

    def _find(self, wanted: str) -> tuple[str, str, list[dict[str, Any]]]:
        running = self.dashboard.running_jobs()
        found = []
        for node_id, machine in self.dashboard.machines().items():
            if not machine.alive:
                continue
            for name in self.dashboard.files(node_id, linked("*", "events")):
                job_id = name.split("-")[1]
                try:
                    events = parse(self.dashboard.file(node_id, name).splitlines())
                except ActorError:  # the link is all that is left of a run that was deleted
                    continue
                start, _ = last_run(events)
                if start.get("job_id") == job_id and str(start["output_dir"]).endswith(wanted.rstrip("/")):
                    found.append((job_id in running, start["time"], node_id, job_id, events))
        if not found:
            of = f" whose output_dir ends in {wanted}" if wanted else ""
            place = self.dashboard.address
            raise EaglerayError(f"no run of Eagleray{of} is known at {place}; `eagleray submit` starts one there")
        _, _, node_id, job_id, events = max(found, key=lambda run: run[:2])
        return node_id, job_id, events

    def look(self) -> Sighting:
        """Asks the dashboard for everything. Raises ActorError when it does not answer."""
        tail = parse(self.dashboard.file(self.node_id, linked(self.job_id, "events"), RECENT_LINES).splitlines())
        last = self.events[-RECENT_LINES:]
        self.events += [event for event in tail if event not in last]
        records: list[dict[str, Any]] = []
        with suppress(ActorError):  # before the first record there is no file behind the link
            records = parse(self.dashboard.file(self.node_id, linked(self.job_id, "metrics"), RECENT_LINES).splitlines())
        start, since = last_run(self.events)
        actors, machines = self.dashboard.actors(self.job_id), self.dashboard.machines()
        return Sighting(start, since, records, actors, machines, "", time.time())


def last_run(events: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The last start among events, and what followed; before any start there may be phases of one that has not come so far."""
    starts = [number for number, event in enumerate(events) if event["kind"] == "start"]
    if not starts:
        return {}, list(events)
    return events[starts[-1]], list(events[starts[-1] + 1 :])
