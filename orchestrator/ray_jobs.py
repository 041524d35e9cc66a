"""Jobs on a cluster through Ray's job API: submit one, list them, read a log, end one.

Ray's own client does the talking, over HTTP to the cluster's dashboard. An address, a token or a job's name that is wrong
is one message each.
"""

import asyncio
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from actors.errors import ActorError, ConfigError
from orchestrator.dashboard import address_of, token
from orchestrator.display import duration

EXCLUDES = [".venv", ".git", "outputs", "model-out", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
COMMAND = "eagleray"  # in a job's metadata: its configuration and overrides, as a person wrote them
ANSWER_TIMEOUT_S = 10  # for the first answer; behind a firewall there is none at all
STOP_TIMEOUT_S = 60  # Ray kills a job that does not end within 3 s of its SIGTERM


def connect(address: str | None, headers: str | None = None) -> Any:
    """Ray's client of the job API at an address; by default at RAY_API_SERVER_ADDRESS, or on this machine.

    headers: a JSON object, sent along with each request, such as for a proxy; by default RAY_JOB_HEADERS.
    Raises ConfigError for headers that are none, ActorError when no cluster answers or it refuses the token.
    """
    import requests

    address = address_of(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client lets it, and RAY_ADDRESS, win over its own argument
    if token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # as `ray start` does; read when Ray is imported
    sent = _headers(headers or os.environ.get("RAY_JOB_HEADERS") or "{}")
    try:
        requests.head(address, headers=sent, timeout=ANSWER_TIMEOUT_S)
    except requests.exceptions.InvalidSchema:
        pass  # the address of another package's clusters, which Ray asks
    except requests.RequestException as error:
        raise ActorError(
            f"no Ray cluster answers at {address} ({_root(error)}); start one with `ray start --head`, or name the "
            "address of its dashboard with --address"
        ) from error
    from ray.job_submission import JobSubmissionClient

    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)  # it would tell of every upload and socket
    try:
        return _ask(JobSubmissionClient, address, headers=sent)
    except ActorError as error:
        raise ActorError(f"{address}: {error}") from error


def submit(client: Any, config_path: str, overrides: Sequence[str], *, wait: bool) -> int:
    """Runs `eagleray run` as a job; with `wait` prints its log until it ends. Returns 0, or 1 if the job did not succeed.

    The current folder travels along, or the configuration's own if that lies elsewhere. Raises ConfigError for a
    configuration that lies in the home folder itself, with all that is a person's.
    """
    path = Path(config_path).resolve()
    folder = _packed(path)
    command = [str(path.relative_to(folder)), *overrides]
    job = _ask(
        client.submit_job,
        entrypoint=shlex.join(["python", "-m", "orchestrator", "run", *command]),
        runtime_env={"working_dir": str(folder), "excludes": EXCLUDES},
        metadata={COMMAND: shlex.join(command)},
    )
    print(f"job {job} at {client.get_address()}, with what lies in {folder}", flush=True)
    if wait:
        return follow(client, job)
    print(f"its log: eagleray logs {job} --follow; to end it: eagleray stop {job}")
    return 0


def _packed(config: Path) -> Path:
    """The folder that travels along."""
    too_much = (Path("/"), Path.home().resolve())
    folder = Path.cwd() if config.is_relative_to(Path.cwd()) and Path.cwd() not in too_much else config.parent
    if folder in too_much:
        raise ConfigError(f"{config} lies in {folder}, all of which would travel along; put it into a folder of its own")
    return folder


def status(client: Any, job: str | None) -> int:
    """Prints a line for each job of the cluster, the newest last, or what is known of one."""
    if job is None:
        rows = [("job", "state", "began", "took", "what")]
        rows += [_row(details) for details in sorted(_ask(client.list_jobs), key=lambda d: d.start_time or 0)]
        widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]] + [0]
        print("\n".join("  ".join(map(str.ljust, row, widths)) for row in rows))
        return 0
    details = _ask(client.get_job_info, job)
    name, state, began, took, what = _row(details)
    message = (details.message or "").partition("\n")[0]
    print(f"job     {name}\nstate   {state}\nbegan   {began}\ntook    {took}\nwhat    {what}\nRay     {message}")
    return 0


def logs(client: Any, job: str, *, follow_it: bool) -> int:
    """Prints a job's log so far; or until the job ends, and then returns as `submit` does."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may end first
    _ask(client.get_job_info, job)
    if follow_it:
        return follow(client, job)
    sys.stdout.write(_ask(client.get_job_logs, job))
    return 0


def stop(client: Any, job: str) -> int:
    """Ends a job and waits until it has ended. Raises ActorError if it does not."""
    if not _ask(client.stop_job, job):
        print(f"job {job} was not running: {_state(client, job).lower()}")
        return 0
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not _state(client, job).is_terminal():
        if time.monotonic() > deadline:
            raise ActorError(f"job {job} still runs {STOP_TIMEOUT_S} s after it was asked to end; see its log")
        time.sleep(0.5)
    print(f"job {job}: {_state(client, job).lower()}")
    return 0


def follow(client: Any, job: str) -> int:
    """Prints a job's log until it ends. Returns 0 if it succeeded, 1 if not, 130 on Ctrl-C, which leaves the job alone."""
    import aiohttp

    async def tail() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    try:
        asyncio.run(tail())
    except KeyboardInterrupt:
        print(f"\nno longer following; the job goes on. To end it: eagleray stop {job}")
        return 130
    except (aiohttp.ClientError, RuntimeError, OSError) as error:
        again = f"the job may go on: eagleray status {job}, and eagleray logs {job} --follow"
        raise ActorError(f"the log of job {job} broke off ({_last_line(error)}); {again}") from error
    state = _state(client, job)
    print(f"job {job}: {state.lower()}")
    return 0 if state == "SUCCEEDED" else 1


def _state(client: Any, job: str) -> Any:
    return _ask(client.get_job_status, job)


def _row(details: Any) -> tuple[str, str, str, str, str]:
    """A job in the words of `status`. Jobs that were started otherwise are known by their command."""
    began = details.start_time and details.start_time / 1000
    ended = details.end_time / 1000 if details.end_time else time.time()
    return (
        details.submission_id or details.job_id,
        details.status.lower(),
        f"{datetime.fromtimestamp(began):%Y-%m-%d %H:%M:%S}" if began else "-",
        duration(max(0.0, ended - began)) if began else "-",
        " ".join(((details.metadata or {}).get(COMMAND) or details.entrypoint).split()),
    )


def _ask(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a method of Ray's client. Raises ActorError for what Ray raises."""
    from ray.exceptions import AuthenticationError

    try:
        return call(*args, **kwargs)
    except AuthenticationError as error:
        raise ActorError(
            f"the cluster refuses this token, or none ({error.message.splitlines()[0]}); put its own, which "
            "`ray get-auth-token` prints there, into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        text = _last_line(error)
        if "does not exist" in text and "status code 404" in str(error):
            text = f"there is no job {args[0]}; `eagleray status` lists them"
        raise ActorError(text) from error


def _headers(text: str) -> dict[str, str]:
    try:
        headers = json.loads(text)
        if isinstance(headers, dict) and all(isinstance(value, str) for value in headers.values()):
            return headers
    except ValueError:
        pass
    raise ConfigError('--headers (or RAY_JOB_HEADERS) is no JSON object of texts; write {"NAME": "VALUE"}')


def _last_line(error: Exception) -> str:
    """Of a server's traceback, what was raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _root(error: BaseException) -> str:
    """Such as: Connection refused."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return getattr(error, "strerror", None) or str(error)
