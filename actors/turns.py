"""Who may use an engine now: groups of several jobs side by side, dealt fairly, and whoever must have it alone.

vLLM decodes in the order in which requests came, so one job's long queue would hold all others. Here the next group is one of
the job that has the fewest completions at the engine, and of its own the one that came first.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(eq=False)
class _Waiter:
    policy: str
    completions: int | None  # None = it must have the engine alone
    admitted: asyncio.Future[None]


class Turns:
    """One engine's. To be used in one event loop."""

    def __init__(self, most: int) -> None:
        """most: completions at the engine at once; one group is let in whatever its size."""
        self.most = most
        self.running: Counter[str] = Counter()  # completions by policy
        self.taken = False  # by somebody alone
        self.waiting: list[_Waiter] = []  # in the order in which they came

    @asynccontextmanager
    async def group(self, policy: str, completions: int) -> AsyncIterator[None]:
        """The block runs when it is this group's turn."""
        async with self._turn(policy, completions):
            yield

    @asynccontextmanager
    async def alone(self, policy: str) -> AsyncIterator[None]:
        """The block runs when nothing else does; groups that come later wait for it."""
        async with self._turn(policy, None):
            yield

    @asynccontextmanager
    async def _turn(self, policy: str, completions: int | None) -> AsyncIterator[None]:
        waiter = _Waiter(policy, completions, asyncio.get_running_loop().create_future())
        self.waiting.append(waiter)
        self._admit()
        try:
            await waiter.admitted
            yield
        finally:  # also of one that was cancelled while it waited, or just when it was let in
            if waiter in self.waiting:
                self.waiting.remove(waiter)
            elif completions is None:
                self.taken = False
            else:
                self.running[policy] -= completions
            self._admit()

    def _admit(self) -> None:
        while self.waiting and not self.taken:
            total = self.running.total()
            chosen = next((waiter for waiter in self.waiting if waiter.completions is None), None)
            if chosen is None:
                chosen = min(self.waiting, key=lambda waiter: self.running[waiter.policy])
            if total and (chosen.completions is None or total + chosen.completions > self.most):
                return
            self.waiting.remove(chosen)
            if chosen.completions is None:
                self.taken = True
            else:
                self.running[chosen.policy] += chosen.completions
            if not chosen.admitted.done():  # it may have been cancelled
                chosen.admitted.set_result(None)
