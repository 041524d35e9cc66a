"""Prompts on their way to completions: dealt to engines by load, taken in as they end, their rewards queued behind them.

What is asked for first is sampled first, each group by the policy version that it names and whole on one engine, which has
proven to serve that version. An engine gets no more than its share, by its pace, of what is asked for and not sampled
yet: what waits here goes to whoever is done first. The completions stay in the object store: one object a group,
which rewards and trainer read from there.

Something is dealt only when someone looks, so whoever waits for something else hands this to that wait.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from math import ceil
from statistics import fmean
from typing import Any

from actors.errors import ActorError, SyncError
from actors.specs import SamplingSpec
from actors.types import RolloutHeader
from orchestrator import waits
from orchestrator.data import Row
from orchestrator.policies import Policies
from orchestrator.scoring import Call, Scorer

PACE_MEMORY = 0.5  # weight of what was known of an engine's pace, against that of the group that came last


@dataclass(eq=False)
class Group:
    """One prompt and its completions."""

    row: Row
    number: int  # the step that it was drawn for
    place: int  # among the prompts of that step
    policy_version: int
    sampling: SamplingSpec
    seed: int
    group_ref: Any = None
    header: RolloutHeader | None = None  # None = not sampled yet
    calls: list[Call] = field(default_factory=list)  # one a reward function, once it is sampled
    dealt_at: float = 0.0  # seconds on the driver's clock
    ended_at: float = 0.0

    def sampled(self) -> RolloutHeader:
        assert self.header is not None, "only sampled groups are looked at"
        return self.header


@dataclass(eq=False)
class _Engine:
    actor: Any
    version: int | None = None  # that it has proven to serve
    installing: Any = None  # the ref of a receipt
    out: dict[Any, Group] = field(default_factory=dict)  # by the ref of its header
    pace: float | None = None  # seconds a token of a completion, lately; None = unknown


class Rollouts:
    """All groups of a job that are asked for and not sampled yet."""

    def __init__(self, engines: Sequence[Any], policies: Policies, scorer: Scorer, *, most: int, timeout_s: float) -> None:
        """most: completions that an engine has at once, or one group. timeout_s: without any news."""
        self.engines = [_Engine(actor) for actor in engines]
        self.policies = policies
        self.scorer = scorer
        self.most = most
        self.timeout_s = timeout_s
        self.queue: deque[Group] = deque()

    def send(self, groups: Sequence[Group]) -> None:
        """Asks for groups, to be sampled after those that were asked for before."""
        self.queue.extend(groups)
        self.look()

    def refs(self) -> list[Any]:
        """What there is to wait for."""
        installs = [engine.installing for engine in self.engines if engine.installing]
        return [*installs, *(ref for engine in self.engines for ref in engine.out)]

    def look(self) -> bool:
        """Takes in what has ended and deals what can be dealt; whether anything had ended. Does not wait.

        Raises ActorError for an engine that died or failed, SyncError when a proof fails.
        """
        ready = set(waits.ended(self.refs()))
        for index, engine in enumerate(self.engines):
            if engine.installing in ready:
                engine.version = self.policies.confirm(index, engine.installing)
                engine.installing = None
            for ref in [ref for ref in engine.out if ref in ready]:
                self._take_in(index, ref)
        self._deal()
        return bool(ready)

    def wait(self, enough: Callable[[], bool]) -> None:
        """Looks until there is enough. Raises as `look` does, and ActorError when nothing ends for `timeout_s`."""
        news = time.monotonic()
        while not enough():
            if self.look():
                news = time.monotonic()
            elif time.monotonic() > news + self.timeout_s:
                raise ActorError(waits.NO_ANSWER.format(who=self._late(), timeout_s=self.timeout_s))
            else:
                assert self.refs(), "what is waited for was asked for"
                waits.wait_any(self.refs())

    def _take_in(self, index: int, ref: Any) -> None:
        engine = self.engines[index]
        group = engine.out[ref]  # until it is known to be good, so that a failure is told again to whoever looks next
        header: RolloutHeader = waits.fetch(ref, f"engine {index}, sampling batch {group.number}", self.timeout_s)
        if header.policy_version != group.policy_version:
            raise SyncError(
                f"engine {index} sampled batch {group.number} with policy version {header.policy_version}, "
                f"not with {group.policy_version}"
            )
        del engine.out[ref]
        group.header, group.ended_at = header, time.monotonic()
        group.calls = self.scorer.submit(group.row, group.group_ref, header.failure)
        if not header.failure:  # else its time was the rollout function's
            pace = header.seconds / max(1, *header.completion_tokens)
            engine.pace = pace if engine.pace is None else PACE_MEMORY * engine.pace + (1 - PACE_MEMORY) * pace

    def _deal(self) -> None:
        """To the engine that has the least of its share, one group after the other, until all have theirs."""
        while self.queue:
            version = self.queue[0].policy_version
            self._install(version)
            waiting = next((i for i, group in enumerate(self.queue) if group.policy_version != version), len(self.queue))
            out = sum(group.policy_version == version for engine in self.engines for group in engine.out.values())
            room = dict(enumerate(shares(waiting + out, [engine.pace for engine in self.engines])))
            most = ceil(self.most / self.queue[0].sampling.num_generations)  # groups: held-out prompts have one completion each
            for index, engine in enumerate(self.engines):
                room[index] = min(room[index], most) - len(engine.out)
            able = [index for index, engine in enumerate(self.engines) if engine.version == version]
            if not able:
                return
            emptiest = [(-room[index], index) for index in able]
            heapify(emptiest)
            for _ in range(waiting):
                minus_room, index = emptiest[0]
                if minus_room >= 0:
                    return
                heapreplace(emptiest, (minus_room + 1, index))
                self._give(index, self.queue.popleft())

    def _install(self, version: int) -> None:
        """At every engine that samples nothing: what is installed must not change under a completion."""
        for index, engine in enumerate(self.engines):
            if engine.version != version and not engine.installing and not engine.out:
                engine.version, engine.installing = None, self.policies.install(index, version)

    def _give(self, index: int, group: Group) -> None:
        engine = self.engines[index]
        group.dealt_at = time.monotonic()
        call = engine.actor.sample.options(num_returns=2)
        row = group.row
        asked = (row.prompt, group.sampling, group.seed, group.policy_version, row.columns, self.policies.name)
        ref, group.group_ref = call.remote(*asked)
        engine.out[ref] = group

    def _late(self) -> str:
        for index, engine in enumerate(self.engines):
            if engine.installing:
                return f"engine {index}, installing a policy"
            if engine.out:
                return f"engine {index}, sampling batch {next(iter(engine.out.values())).number}"
        return "an engine"


def shares(count: int, paces: Sequence[float | None]) -> list[int]:
    """How many of `count` groups each engine should have, so that all would end together; at least as many in sum.

    paces: seconds a token; None = unknown, and taken for the mean of the others.
    """
    known = [pace for pace in paces if pace]
    speeds = [1 / (pace or (fmean(known) if known else 1.0)) for pace in paces]
    return [ceil(count * speed / sum(speeds) - 1e-9) for speed in speeds]
