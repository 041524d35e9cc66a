"""Reward calls: one process per function, reward model or judge, one group a call, in order, each with a time limit.

Calls are queued as their groups are sampled. A call that
raises is a failure of its group; one that outlasts its limit or takes its process down is too, and the process is
replaced and the calls behind it are made again. Rewards are never made up.
"""

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from actors.specs import JudgeSpec, RewardModelSpec, RewardSpec
from actors.types import Scores
from orchestrator import cluster, waits
from orchestrator.data import Row
from orchestrator.plan import Plan

MAX_LOST_IN_A_ROW = 2  # calls of one batch; then the rest is not tried, since each costs the whole time limit
Spec = RewardSpec | RewardModelSpec | JudgeSpec
ENDED = "ended its process"


@dataclass(eq=False)
class Call:
    """One function on one group."""

    row: Row
    group_ref: Any
    ref: Any = None
    scores: Scores | None = None  # None until it has ended

    def settled(self) -> Scores:
        assert self.scores is not None, "collect settles every call of its batch"
        return self.scores


@dataclass
class _Function:
    spec: Spec
    actor: Any
    pending: deque[Call] = field(default_factory=deque)


class Scorer:
    """The reward functions, reward models and judges of one job.

    group: the placement group of the plan, which holds the bundles of reward models on GPUs. after: as of cluster.start_reward.
    """

    def __init__(
        self, plan: Plan, group: Any, specs: Sequence[Spec], timeout_s: float, after: Sequence[Any] = ()
    ) -> None:
        self.plan = plan
        self.group = group
        self.timeout_s = timeout_s
        self.functions = [_Function(spec, cluster.start_reward(plan, group, spec, after)) for spec in specs]

    def wait_ready(self) -> list[str]:
        """Returns once all are imported, loaded or have answered, with what a person must know of them.

        Raises RewardError or ConfigError for one that cannot be.
        """
        return [note for function in self.functions if (note := self._wait_ready(function))]

    def submit(self, row: Row, group_ref: Any, failure: str | None = None) -> list[Call]:
        """Queues the calls for one group that has been sampled: one a function. They run in the order of submission.

        failure: why the group was not sampled to its end; no function is asked about it then.
        """
        if failure:
            return [Call(row, group_ref, scores=self._failure(function, failure)) for function in self.functions]
        return [self._queue(function, Call(row, group_ref)) for function in self.functions]

    def collect(
        self, calls: Sequence[Sequence[Call]], meanwhile: waits.Meanwhile | None = None
    ) -> list[list[Scores]]:
        """The scores of groups, [groups][functions], from their calls; a function's clock runs from now, call by call."""
        for number, function in enumerate(self.functions):
            self._settle(function, [of_group[number] for of_group in calls], meanwhile)
        return [[call.settled() for call in of_group] for of_group in calls]

    def _settle(self, function: _Function, calls: Sequence[Call], meanwhile: waits.Meanwhile | None) -> None:
        """Gives scores to these calls, and to all that were queued before the last of them."""
        lost = 0
        while any(call.scores is None for call in calls):
            call = function.pending[0]  # all before it have ended, so it runs now
            if lost == MAX_LOST_IN_A_ROW:
                call.scores = self._failure(function, f"not called, after {lost} calls in a row were lost")
            else:
                call.scores, is_lost = self._result(function, call, meanwhile)
                lost = lost + 1 if is_lost else 0
            function.pending.popleft()
        if lost == MAX_LOST_IN_A_ROW:
            # The calls that were given up are still queued in the process.
            self._restart(function)

    def _result(self, function: _Function, call: Call, meanwhile: waits.Meanwhile | None) -> tuple[Scores, bool]:
        """A call's scores, and whether it took its process with it."""
        outcome = self._outcome(call, meanwhile)
        if outcome == ENDED:
            # A call behind it may have ended the process before this answer was out: it is made again, alone.
            self._restart(function, alone=call)
            outcome = self._outcome(call, None)  # nothing is queued until it is known
            if not isinstance(outcome, str):
                for waiting in itertools.islice(function.pending, 1, None):
                    self._call(function, waiting)
        if isinstance(outcome, str):
            self._restart(function, without=call)
            return self._failure(function, outcome), True
        return outcome, False

    def _outcome(self, call: Call, meanwhile: waits.Meanwhile | None) -> Scores | str:
        """What a call gave, or why it gave nothing."""
        if not waits.wait(call.ref, self.timeout_s, meanwhile):
            return f"did not return within ray.reward_timeout_s = {self.timeout_s:g} s"
        try:
            scores: Scores = ray.get(call.ref)
            return scores
        except RayActorError:
            return ENDED
        except RayError as error:
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[-1 if isinstance(error, RayTaskError) else 0]}"

    def _restart(self, function: _Function, *, alone: Call | None = None, without: Call | None = None) -> None:
        """A new process; the pending calls are made again: all, `alone` one of them, or all `without` one."""
        cluster.stop(function.actor)
        function.actor = cluster.start_reward(self.plan, self.group, function.spec)
        self._wait_ready(function)
        for call in [alone] if alone else function.pending:
            if call is not without:
                self._call(function, call)

    def _wait_ready(self, function: _Function) -> str | None:
        imported = isinstance(function.spec, RewardSpec)
        limit_s = cluster.PLACEMENT_TIMEOUT_S if imported else cluster.START_TIMEOUT_S
        note: str | None = waits.fetch(function.actor.ready.remote(), f"reward {function.spec.path}", limit_s)
        return note

    def _queue(self, function: _Function, call: Call) -> Call:
        self._call(function, call)
        function.pending.append(call)
        return call

    def _call(self, function: _Function, call: Call) -> None:
        call.ref = function.actor.score.remote(call.row.prompt, call.row.columns, call.group_ref)

    def _failure(self, function: _Function, reason: str) -> Scores:
        return Scores(function.spec.path, (), reason)
