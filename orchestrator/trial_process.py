"""The process of one trial: a job as `eagleray run` runs it, in the sweep's folder, with the trial's parameters.

    python -m orchestrator.trial_process FOLDER < ORDER

FOLDER is the trial's, and stands there so that whoever looks for the processes of a sweep finds them; ORDER is JSON. It ends
with the process that started it.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from actors.cage import PR_SET_PDEATHSIG, checked, libc
from orchestrator.cli import ended, exit_code, quieten
from orchestrator.config import load, overrides_of
from orchestrator.display import Display
from orchestrator.schema import JobConfig

MODULE = "orchestrator.trial_process"
BASE_FILE = "base.yaml"  # of a sweep


@dataclass(frozen=True)
class Order:
    """What a trial is to be."""

    sweep: str  # the folder of the sweep
    folder: str  # its own
    number: int
    params: Mapping[str, Any]  # by dotted keys of the job
    path: str  # the file of the base job, as a person named it
    folders: tuple[str, ...]  # where files and functions that it names are looked for
    resume_from: str | None  # a checkpoint in its folder; None = its newest, if it has one
    changes: Mapping[str, Any]  # to the base job, so that trials share GPUs
    engines: Mapping[str, Any] | None  # that the trials share; None = it has its own
    parent: int  # pid of whoever waits for it

    def json(self) -> str:
        """For stdin."""
        return json.dumps(asdict(self))

    def config(self) -> JobConfig:
        """The whole job. Raises ConfigError where its parameters do not go together."""
        own = {"output_dir": self.folder, "auto_resume_from_checkpoints": True, "resume_from_checkpoint": self.resume_from}
        if self.engines:
            own["ray.sync"] = "adapter"  # each trial's policy has LoRA slots on them
        config = load(Path(self.sweep) / BASE_FILE, overrides_of({**self.changes, **self.params, **own}))
        config.ray_run_name = f"{config.ray_run_name or Path(self.sweep).name}-{self.number:04d}"
        # Messages name the file that a person wrote, whose lines are not those of base.yaml.
        config.source = replace(config.source, path=self.path, lines={}, elsewhere=tuple(self.folders))
        return config


def processes(sweep: Path) -> Iterator[psutil.Process]:
    """Those of a sweep's trials that live on this machine."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if MODULE in words and Path(words[-1]).is_relative_to(sweep):
            yield process


def run(order: Order) -> None:
    """Raises as a job does."""
    from orchestrator.run import run as run_job
    from orchestrator.shared_engines import SharedEngines

    shared = SharedEngines.from_record(order.engines).of(policy_name(order.number)) if order.engines else None
    run_job(order.config(), Display(), shared)


def policy_name(number: int) -> str:
    """What a trial's policy is called on shared engines."""
    return f"trial {number}"


def main() -> int:
    order = Order(**json.load(sys.stdin))
    checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != order.parent:  # it ended before
        return 1
    quieten()
    return exit_code(lambda: ended(lambda: run(order)))


if __name__ == "__main__":
    sys.exit(main())
