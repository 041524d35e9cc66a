"""Whose group an engine samples next, where several jobs share it.

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
    completions: int
    admitted: asyncio.Future[None]


class Turns:
    """One engine's. To be used in one event loop."""

    def __init__(self, most: int) -> None:
        """most: completions at the engine at once; one group is let in whatever its size."""
        self.most = most
        self.running: Counter[str] = Counter()  # completions by policy
        self.waiting: list[_Waiter] = []  # in the order in which they came

    @asynccontextmanager
    async def group(self, policy: str, completions: int) -> AsyncIterator[None]:
        """The block runs when it is this group's turn."""
        waiter = _Waiter(policy, completions, asyncio.get_running_loop().create_future())
        self.waiting.append(waiter)
        self._admit()
        try:
            await waiter.admitted
            yield
        finally:  # also of one that was cancelled while it waited, or just when it was let in
            if waiter in self.waiting:
                self.waiting.remove(waiter)
            else:
                self.running[policy] -= completions
            self._admit()

    def _admit(self) -> None:
        while self.waiting:
            chosen = min(self.waiting, key=lambda waiter: self.running[waiter.policy])
            total = self.running.total()
            if total and total + chosen.completions > self.most:
                return
            self.waiting.remove(chosen)
            self.running[chosen.policy] += chosen.completions
            if not chosen.admitted.done():  # it may have been cancelled
                chosen.admitted.set_result(None)
