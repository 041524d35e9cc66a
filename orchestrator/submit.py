"""The same job through Ray's job API: pack the current folder, start it on the cluster, follow its log, return its code."""

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from actors.errors import ActorError, ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"  # where Ray's dashboard listens on a machine of its own
EXCLUDES = [".venv", ".git", "outputs", "model-out", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]


def submit(config_path: str, overrides: Sequence[str], address: str | None) -> int:
    """Runs `eagleray run` as a Ray job and prints its log until it ends; returns 0 if it succeeded, 1 if not.

    Raises ActorError when the cluster does not answer, ConfigError for a file outside the current folder, since only
    that folder travels.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    path = Path(config_path)
    if not path.resolve().is_relative_to(Path.cwd()):
        raise ConfigError(
            f"{config_path} is outside the current folder, which is what a job takes along; go to its folder"
        )
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    try:
        client = JobSubmissionClient(address)
        relative = str(path.resolve().relative_to(Path.cwd()))
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "orchestrator", "run", relative, *overrides]),
            runtime_env={"working_dir": ".", "excludes": EXCLUDES},
        )
    except (ConnectionError, RuntimeError) as error:
        raise ActorError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or name it with --address"
        ) from error
    print(f"job {job} at {address}", flush=True)

    async def follow() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(follow())
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on. To end it: ray job stop --address {address} {job}")
        return 130
    status = client.get_job_status(job)
    print(f"job {job}: {status.value.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1
