"""When a step of the engine begins: with all calls that were made together. The engine is a list of what it decodes. And what
is made of its answers.
"""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.logprobs import FlatLogprobs, append_logprobs_for_next_position

from actors import decoder
from actors.decoder import Decoder, sampled_logprobs

TOKENS = 5
CALLS = 8


class Counting:
    """Ends each request after TOKENS steps."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.decoded: list[int] = []  # requests, by step

    def add_request(self, name: str, *_: Any, **__: Any) -> None:
        self.left[name] = TOKENS

    def get_num_unfinished_requests(self) -> int:
        return len(self.left)

    def step(self) -> list[Any]:
        self.decoded.append(len(self.left))
        self.left = {name: left - 1 for name, left in self.left.items()}
        ended = [name for name, left in self.left.items() if not left]
        for name in ended:
            del self.left[name]
        return [SimpleNamespace(request_id=name, finished=True) for name in ended]


async def called(own: Decoder, after: float) -> None:
    await asyncio.sleep(after)
    own.expect_more()
    await own.output([1], None)


def test_calls_that_were_made_together_are_decoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "COMING_S", 0.2)
    engine = Counting()

    async def together() -> None:
        own = Decoder(engine, most=100)
        await asyncio.gather(*(called(own, after=0.01 * index) for index in range(CALLS)))
        early = asyncio.create_task(called(own, 0))  # and who comes while it is decoded joins it, together
        while len(engine.decoded) < TOKENS + 2:
            await asyncio.sleep(0)
        await asyncio.gather(early, *(called(own, after=0.01 * index) for index in range(CALLS)))

    asyncio.run(together())
    joined = len(engine.decoded) - 2 * TOKENS
    assert engine.decoded == [CALLS] * TOKENS + [1] * joined + [1 + CALLS] * (TOKENS - joined) + [CALLS] * joined
    assert 2 <= joined < TOKENS


def test_what_is_asked_from_inside_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a conversation's next turn is."""
    monkeypatch.setattr(decoder, "COMING_S", 3600.0)
    engine = Counting()
    asyncio.run(asyncio.wait_for(Decoder(engine, most=100).output([1], None), timeout=60))
    assert engine.decoded == [1] * TOKENS


def test_a_step_that_has_no_room_for_more_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "COMING_S", 3600.0)
    engine = Counting()

    async def together() -> None:
        own = Decoder(engine, most=CALLS)
        await asyncio.gather(*(called(own, after=0) for _ in range(CALLS)))

    asyncio.run(asyncio.wait_for(together(), timeout=60))
    assert engine.decoded == [CALLS] * TOKENS


@pytest.mark.parametrize("token_ids", [[3, 4], [3, 4, 5, 5], [3, 5, 4]])
def test_log_probabilities_of_other_tokens_than_the_completions_are_refused(token_ids: list[int]) -> None:
    def completion(of: list[int]) -> Any:
        logprobs = FlatLogprobs()
        for token in of:
            append_logprobs_for_next_position(logprobs, [token], [-0.1 * token], (None,), 1, 0)
        return SimpleNamespace(token_ids=(3, 4, 5), logprobs=logprobs)

    assert sampled_logprobs(completion([3, 4, 5])) == pytest.approx([-0.3, -0.4, -0.5])
    with pytest.raises(RuntimeError, match=f"of {len(token_ids)} tokens that are not the 3 of its completion"):
        sampled_logprobs(completion(token_ids))
