"""Reward calls: one process per function, one group a call, in order, each with a time limit.

Calls are queued when their rollouts are requested and start as the groups appear in the object store. A call that
raises is a failure of its group; one that outlasts its limit or takes its process down is too, and the process is
replaced and the calls behind it are made again. Rewards are never made up.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError

from actors.specs import RewardSpec
from actors.types import Scores
from orchestrator import cluster
from orchestrator.data import Row
from orchestrator.plan import Plan

MAX_LOST_IN_A_ROW = 2  # calls of one batch; then the rest is not tried, since each costs the whole time limit
ENDED = "ended its process"


@dataclass(eq=False)
class Call:
    """One function on one group."""

    row: Row
    group_ref: Any
    ref: Any = None


@dataclass
class _Function:
    spec: RewardSpec
    actor: Any
    pending: deque[Call] = field(default_factory=deque)


class Scorer:
    """The reward functions of one job."""

    def __init__(self, plan: Plan, specs: Sequence[RewardSpec], timeout_s: float) -> None:
        self.plan = plan
        self.timeout_s = timeout_s
        self.functions = [_Function(spec, cluster.start_reward(plan, spec)) for spec in specs]

    def wait_ready(self) -> None:
        """Returns once every function is imported. Raises RewardError for one that cannot be."""
        for function in self.functions:
            self._wait_ready(function)

    def submit(self, rows: Sequence[Row], group_refs: Sequence[Any]) -> list[list[Call]]:
        """Queues the calls of one batch: [functions][groups]. They run in the order of submission."""
        return [
            [self._queue(function, Call(row, ref)) for row, ref in zip(rows, group_refs, strict=True)]
            for function in self.functions
        ]

    def collect(self, calls: Sequence[Sequence[Call]]) -> list[list[Scores]]:
        """The scores of a batch, [groups][functions]; its groups must have been sampled, since time runs from now."""
        by_function = [self._collect(f, c) for f, c in zip(self.functions, calls, strict=True)]
        return [list(scores) for scores in zip(*by_function, strict=True)]

    def _collect(self, function: _Function, calls: Sequence[Call]) -> list[Scores]:
        scores: list[Scores] = []
        lost = 0
        for call in calls:
            if lost == MAX_LOST_IN_A_ROW:
                function.pending.remove(call)
                scores.append(self._failure(function, f"not called, after {lost} calls in a row were lost"))
                continue
            score, is_lost = self._result(function, call)
            lost = lost + 1 if is_lost else 0
            scores.append(score)
        if lost == MAX_LOST_IN_A_ROW:
            # The calls that were given up are still queued in the process.
            self._restart(function)
            for waiting in function.pending:
                self._call(function, waiting)
        return scores

    def _result(self, function: _Function, call: Call) -> tuple[Scores, bool]:
        """A call's scores, and whether it took its process with it. Calls before it have ended, so it runs now."""
        outcome = self._outcome(call)
        restarted = outcome == ENDED
        if restarted:
            # A call behind it may have ended the process before this answer was out: it is made again, alone.
            self._restart(function)
            self._call(function, call)
            outcome = self._outcome(call)
        function.pending.remove(call)
        if isinstance(outcome, str):
            self._restart(function)
            restarted = True
        if restarted:
            for waiting in function.pending:
                self._call(function, waiting)
        return (self._failure(function, outcome), True) if isinstance(outcome, str) else (outcome, False)

    def _outcome(self, call: Call) -> Scores | str:
        """What a call gave, or why it gave nothing."""
        if not cluster.wait(call.ref, self.timeout_s):
            return f"did not return within ray.reward_timeout_s = {self.timeout_s:g} s"
        try:
            scores: Scores = ray.get(call.ref)
            return scores
        except RayActorError:
            return ENDED

    def _restart(self, function: _Function) -> None:
        cluster.stop(function.actor)
        function.actor = cluster.start_reward(self.plan, function.spec)
        self._wait_ready(function)

    def _wait_ready(self, function: _Function) -> None:
        cluster.fetch(function.actor.ready.remote(), f"reward {function.spec.path}", cluster.PLACEMENT_TIMEOUT_S)

    def _queue(self, function: _Function, call: Call) -> Call:
        self._call(function, call)
        function.pending.append(call)
        return call

    def _call(self, function: _Function, call: Call) -> None:
        call.ref = function.actor.score.remote(call.row.prompt, call.row.columns, call.group_ref)

    def _failure(self, function: _Function, reason: str) -> Scores:
        return Scores(function.spec.path, (), reason)
