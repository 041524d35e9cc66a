"""How the driver waits for actors: every wait has a limit, hears Ctrl-C, and turns what Ray raises into a message for a person,
which begins with the actor's name.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors import errors
from actors.errors import ActorError, EaglerayError
from orchestrator.causes import GUESSES

AFTER_FAILURE_S = 5  # in which the other ranks of a trainer may say what happened
NO_ANSWER = "{who} did not answer within {timeout_s:g} s; its stack is in the dashboard under Actors"
POLL_S = 0.5  # how often a wait looks for Ctrl-C

_signals: list[int] = []  # received and not yet acted on


class Interrupted(BaseException):
    """The job was asked to end: Ctrl-C, or SIGTERM."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM make the next wait raise Interrupted; a second one ends the process.

    An exception raised by the handler itself could surface inside Ray's own code, which turns it into another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def remember(signum: int, frame: Any) -> None:
        _signals.append(signum)
        signal.signal(signum, signal.SIG_DFL)

    _signals.clear()
    before = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Meanwhile(Protocol):
    """Work that goes on while the driver waits for something else."""

    def refs(self) -> list[Any]:
        """What it waits for."""

    def look(self) -> bool:
        """Acts on those that have ended."""


def wait(ref: Any, timeout_s: float, meanwhile: Meanwhile | None = None) -> bool:
    """Whether the value behind a ref is there within the limit. Raises Interrupted, and as `meanwhile` does."""
    deadline = time.monotonic() + timeout_s
    while not ended([ref]):
        if time.monotonic() > deadline:
            return False
        wait_any([ref, *(meanwhile.refs() if meanwhile else [])], max(0.0, deadline - time.monotonic()))
        if meanwhile:
            meanwhile.look()
    return True


def ended(refs: Sequence[Any]) -> list[Any]:
    """Those of the refs behind which there is a value, or a failure, now."""
    return list(ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0]) if refs else []


def wait_any(refs: Sequence[Any], timeout_s: float = POLL_S) -> None:
    """Returns when one of the refs has a value, and after POLL_S at the latest. Raises Interrupted."""
    if _signals:
        raise Interrupted(_signals.pop())
    ray.wait(list(refs), num_returns=1, timeout=min(POLL_S, timeout_s), fetch_local=False)


def pause(seconds: float) -> None:
    """Sleeps, unless the job is asked to end: raises Interrupted then."""
    if _signals:
        raise Interrupted(_signals.pop())
    time.sleep(seconds)


def told(error: BaseException) -> str:
    """What an exception of Ray's says, for a person: its last line, and the end of its traceback."""
    text = str(error) or type(error).__name__
    return f"{_last_line(text)}\n{_tail(text)}"


def fetch(ref: Any, who: str, timeout_s: float) -> Any:
    """The value behind a ref. Raises EaglerayError: an actor's own as it was, ActorError for all else that can happen.

    Raises Interrupted when the job is asked to end meanwhile.
    """
    if not wait(ref, timeout_s):
        raise ActorError(NO_ANSWER.format(who=who, timeout_s=timeout_s))
    try:
        return ray.get(ref)
    except RayError as error:
        if own := _own(error):
            raise own from error
        if isinstance(error, RayTaskError):
            text = f"{who} failed: {type(error.cause).__name__}: {error.cause}\n{_tail(str(error))}"
        elif isinstance(error, RayActorError):
            text = f"{who} died: {GUESSES.sub('', _last_line(str(error))).strip()}"
        else:
            text = f"{who} is lost: {type(error).__name__}: {_last_line(str(error))}"
        raise ActorError(text) from error


def ask_ranks(trainers: Sequence[Any], method: str, *args: Any, doing: str, timeout_s: float) -> Any:
    """Calls a method of every rank, each with the same arguments; returns rank 0's answer. Raises as `fetch` does."""
    return fetch_ranks([getattr(trainer, method).remote(*args) for trainer in trainers], doing, timeout_s)


def fetch_ranks(refs: Sequence[Any], doing: str, timeout_s: float, meanwhile: Meanwhile | None = None) -> Any:
    """Rank 0's answer, when every rank has one. Raises as `fetch` and `meanwhile` do.

    One rank's end makes the others fail in their collectives, so after the first failure the others get a moment, and
    what a rank said for people, or that one died, is told rather than that one lost its peer.
    """
    deadline = time.monotonic() + timeout_s
    waiting = {ref: rank_name(rank, len(refs)) for rank, ref in enumerate(refs)}
    failures: list[EaglerayError] = []
    while waiting:
        wait_any([*waiting, *(meanwhile.refs() if meanwhile else [])])
        if meanwhile:
            meanwhile.look()
        done = ended(list(waiting))
        late = time.monotonic() > deadline
        for ref in list(waiting) if late else done:
            who = f"{'the ' if len(refs) == 1 else ''}{waiting.pop(ref)}, {doing}"
            if ref not in done:
                failures.append(ActorError(NO_ANSWER.format(who=who, timeout_s=timeout_s)))
                continue
            try:
                fetch(ref, who, timeout_s)
            except EaglerayError as error:
                failures.append(error)
                deadline = min(deadline, time.monotonic() + AFTER_FAILURE_S)
    if failures:
        own = (error for error in failures if type(error) is not ActorError)
        died = (error for error in failures if " died: " in str(error))
        raise next(own, None) or next(died, failures[0])
    return ray.get(refs[0])


def rank_name(rank: int, world: int) -> str:
    return f"trainer {rank}" if world > 1 else "trainer"


def fetch_each(refs: Any, who: str, timeout_s: float) -> Iterator[Any]:
    """The values that a generator in a task yields, as they come; timeout_s is for each. Raises as `fetch` does."""
    while True:
        if not wait(refs, timeout_s):
            raise ActorError(f"{who} did not answer within {timeout_s:g} s; its stack is in the dashboard under Jobs")
        try:
            ref = next(refs)
        except StopIteration:
            return
        yield fetch(ref, who, timeout_s)


def _own(error: RayError) -> EaglerayError | None:
    """The message for a person behind what Ray raised, if the actor raised one, in a method or in its constructor."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, EaglerayError):
        return error.cause
    # Of a constructor's exception Ray keeps the traceback's text alone; ours come last in it.
    found = list(re.finditer(r"^actors\.errors\.(\w+): ", str(error), re.MULTILINE))
    if isinstance(error, RayActorError) and found:
        own: EaglerayError = getattr(errors, found[-1][1])(str(error)[found[-1].end() :].strip())
        return own
    return None


def _last_line(text: str) -> str:
    """Where a traceback says what happened: its last exception, which may take a few lines."""
    lines = text.strip().splitlines()
    begins = [number for number, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    said = lines[begins[-1] :] if begins else lines[-1:]
    return " ".join(line.strip() for line in said[:4])


def _tail(text: str, count: int = 8) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines()[-count:])
