"""A run under watch: its journal while it goes, and the report when it fails."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from actors.errors import EaglerayError
from orchestrator import crash
from orchestrator.cluster import Connection
from orchestrator.crash import Evidence, Place
from orchestrator.display import Display
from orchestrator.journal import Journal, parse
from orchestrator.schema import JobConfig

WARNINGS_IN_REPORT = 10


class Watch:
    """The journal of one run, and what Ray said when it failed."""

    def __init__(self, config: JobConfig, display: Display) -> None:
        self.display = display
        self.output_dir = Path(config.output_dir)
        self.run = config.ray_run_name or self.output_dir.name
        self.method = config.rl or "sft"
        self.model = config.base_model
        self.began = round(time.time(), 3)
        self.journal = Journal(self.output_dir)
        self.here: Connection | None = None
        self.evidence: Evidence | None = None

    def begin(self, here: Connection) -> None:
        """The run is connected to a cluster."""
        self.here = here
        self.journal.start(here, run=self.run, method=self.method, model=self.model)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Around what holds the actors: when it fails, the cluster is asked before they are let go."""
        try:
            yield
        except Exception as error:
            if self.evidence is None and self.here is not None and not isinstance(error, crash.NO_CRASH):
                self.evidence = crash.look(self.here, error)
            raise

    def planned(self, steps: int, done: int) -> None:
        """How many optimizer steps the run will have, and how many it had before it was resumed."""
        self.display.steps_done = done
        self.journal.tell("plan", steps=steps)

    def place(self) -> Place:
        """How far the run has come."""
        events = self._events()

        def told(kind: str, what: str) -> list[Any]:
            return [event[what] for event in events if event["kind"] == kind]

        steps, phases = told("plan", "steps"), told("phase", "text")
        step = self.display.steps_done + 1
        return Place(
            self.run,
            self.method,
            self.model,
            step=min(step, steps[-1]) if steps else step,
            steps=steps[-1] if steps else None,
            doing=phases[-1] if phases else "",
            warnings=tuple(told("warning", "text")[-WARNINGS_IN_REPORT:]),
        )

    def _events(self) -> list[dict[str, Any]]:
        """Since this run began; none where the disk did not take them."""
        try:
            lines = self.journal.path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        return [event for event in parse(lines) if event["time"] >= self.began]


@contextmanager
def watched(config: JobConfig, display: Display) -> Iterator[Watch]:
    """Keeps the journal of a run in its output_dir, which exists; a failure other than bad input leaves a report there.

    The short form of the report is a note on the exception. Raises EaglerayError also for what nobody foresaw, whose
    traceback is in the report.
    """
    watch = Watch(config, display)
    tell = watch.journal.tell
    display.listener = lambda kind, text: tell(kind, text=text)
    how, said = "stopped", ""
    try:
        yield watch
        how = "done"
    except Exception as error:
        how, said = "failed", str(error).partition("\n")[0]
        if isinstance(error, crash.NO_CRASH):
            raise
        evidence = watch.evidence or Evidence(missing="there was no cluster to ask")
        note = crash.write(watch.output_dir, error, evidence, watch.place())
        if isinstance(error, EaglerayError):
            error.add_note(note)
            raise
        unforeseen = EaglerayError(f"the driver failed: {type(error).__name__}: {error}")
        unforeseen.add_note(note)
        raise unforeseen from error
    finally:
        tell("end", how=how, text=said)
        display.listener = lambda kind, text: None
