"""Groups of several jobs take fair turns at an engine."""

import asyncio

import pytest

from actors.turns import Turns


class Bench:
    """Groups that run until they are told to end, and the order in which they began."""

    def __init__(self, most: int) -> None:
        self.turns = Turns(most)
        self.began: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, name: str, completions: int) -> None:
        """name: the policy's first, such as a1."""
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._run(name, completions))
        await settled()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.tasks[name]
        await settled()

    async def _run(self, name: str, completions: int) -> None:
        async with self.turns.group(name[0], completions):
            self.began.append(name)
            await self.ends[name].wait()


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_next_group_is_of_who_has_least() -> None:
    async def run() -> None:
        bench = Bench(most=8)
        for name in ("a1", "a2", "a3", "a4"):
            await bench.start(name, 4)
        for name in ("b1", "b2"):
            await bench.start(name, 4)
        assert bench.began == ["a1", "a2"], "there is room for eight"
        await bench.end("a1")
        assert bench.began[2:] == ["b1"], "a has one at the engine and b none, though a3 came first"
        await bench.end("a2")
        assert bench.began[3:] == ["a3"]
        await bench.end("b1")
        assert bench.began[4:] == ["b2"]
        await bench.end("b2")
        await bench.end("a3")
        assert bench.began[5:] == ["a4"]

    asyncio.run(run())


def test_a_group_above_the_limit_runs_by_itself() -> None:
    async def run() -> None:
        bench = Bench(most=8)
        await bench.start("a1", 64)
        await bench.start("b1", 1)
        assert bench.began == ["a1"]
        await bench.end("a1")
        assert bench.began == ["a1", "b1"]

    asyncio.run(run())


@pytest.mark.parametrize("when", ["waiting", "running"])
def test_one_that_is_cancelled_leaves_its_place(when: str) -> None:
    async def run() -> None:
        bench = Bench(most=8)
        if when == "waiting":
            await bench.start("a1", 8)
        await bench.start("b1", 8)
        await bench.start("c1", 8)
        bench.tasks["b1"].cancel()
        await settled()
        if when == "waiting":
            assert bench.began == ["a1"]
            await bench.end("a1")
        assert bench.began[-1] == "c1" and "b1" not in bench.began[1:]
        await bench.end("c1")
        assert not bench.turns.waiting and not bench.turns.running.total()

    asyncio.run(run())


def test_one_that_is_cancelled_just_when_it_is_let_in_leaves_its_place() -> None:
    async def run() -> None:
        turns = Turns(most=1)

        async def hold() -> None:
            async with turns.group("a", 1):
                await asyncio.sleep(0)

        first, second = asyncio.create_task(hold()), asyncio.create_task(hold())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.wait_for(hold(), 1.0)
        assert not turns.running.total()

    asyncio.run(run())
