"""Requests to one vLLM engine that are decoded side by side, each awaited by itself.

vLLM's own `LLM.generate` returns when the last of its requests has ended, and takes no others meanwhile. Here an engine is
stepped for as long as anybody waits, and who asks later joins the batch.
"""

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from actors.specs import SamplingSpec
from actors.types import RolloutGroup

CONTEXT_TOKENS = 6  # of a prompt, on which the text that follows may hang
COMING_S = 0.002  # calls that were made together come less than this apart while no step holds Python's lock


class Decoder:
    """Steps an engine in the event loop of its callers: nothing else of theirs runs during a step."""

    def __init__(self, engine: Any, most: int) -> None:
        """engine: vLLM's LLMEngine. most: completions that it decodes at once."""
        self.engine = engine
        self.most = most
        self.names = itertools.count()
        self.waiting: dict[str, asyncio.Future[Any]] = {}
        self.stepping: asyncio.Task[None] | None = None
        self.coming = False

    def expect_more(self) -> None:
        """A call has come that may be one of many: an engine that has fewer completions than it decodes at once waits with its
        next step until no more come.

        Ray's threads bring a call in several moves, each of which needs Python's lock. A step holds it for most of its time, so
        of calls that were made together one would come a step, and a batch would decode half empty while it fills.
        """
        self.coming = True

    async def output(self, token_ids: Sequence[int], params: Any, lora_request: Any = None) -> Any:
        """vLLM's RequestOutput of one prompt, when all its completions have ended. Raises what vLLM raises.

        Nothing more is decoded for a caller that is cancelled.
        """
        name = str(next(self.names))
        self.engine.add_request(name, {"prompt_token_ids": list(token_ids)}, params, lora_request=lora_request)
        self.waiting[name] = asyncio.get_running_loop().create_future()
        if self.stepping is None or self.stepping.done():
            self.stepping = asyncio.create_task(self._step())
        try:
            return await self.waiting[name]
        except asyncio.CancelledError:
            if self.waiting.pop(name, None):
                self.engine.abort_request([name])
            raise

    async def _step(self) -> None:
        try:
            while self.waiting:
                await asyncio.sleep(0)  # those who were answered go on, and new requests come in
                while self.coming:
                    self.coming = False
                    if self.engine.get_num_unfinished_requests() < self.most:
                        await asyncio.sleep(COMING_S)
                for output in self.engine.step():
                    future = self.waiting.pop(output.request_id, None) if output.finished else None
                    if future is not None and not future.done():
                        future.set_result(output)
        except Exception as error:  # whatever it is, nobody may wait for ever
            waiting, self.waiting = self.waiting, {}
            with suppress(Exception):  # an engine that is not whole any more fails at the next step too
                self.engine.abort_request(list(waiting))  # or one that cannot be decoded would fail every later step
            for future in waiting.values():
                if not future.done():
                    future.set_exception(error)


def sampling_params(sampling: SamplingSpec, seed: int) -> Any:
    """vLLM's parameters of one group; completion i draws with `seed` + i.

    vLLM makes text of each token as it comes only where the text may end a completion: it takes twice as long as all else that
    is done with a small model's token once it is drawn. `group_of` makes the other texts, once.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=sampling.num_generations,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=seed,
        logprobs=0,  # of the sampled token alone
        flat_logprobs=True,  # in a few lists, not in two objects a token, over which Python's garbage collector goes for long
        detokenize=bool(sampling.extra.get("stop")),
        output_kind=RequestOutputKind.FINAL_ONLY,
        **sampling.extra,  # type: ignore[arg-type]
    )


def group_of(output: Any, version: int, tokenizer: Any, params: Any) -> RolloutGroup:
    """Of vLLM's RequestOutput, sampled with a policy version and these parameters. Texts end before the token that ended them,
    unless the parameters include it.
    """
    tokens = [list(completion.token_ids) for completion in output.outputs]
    if params.detokenize:
        texts = [completion.text for completion in output.outputs]
    else:
        whole = [params.include_stop_str_in_output or completion.finish_reason != "stop" for completion in output.outputs]
        said = [ids if all_of_it else ids[:-1] for ids, all_of_it in zip(tokens, whole, strict=True)]
        texts = _texts(tokenizer, output.prompt_token_ids[-CONTEXT_TOKENS:], said)
    return RolloutGroup(
        policy_version=version,
        prompt_ids=np.array(output.prompt_token_ids, dtype=np.int32),
        completion_ids=tuple(np.array(ids, dtype=np.int32) for ids in tokens),
        logprobs=tuple(np.array(sampled_logprobs(completion), dtype=np.float32) for completion in output.outputs),
        truncated=tuple(completion.finish_reason == "length" for completion in output.outputs),
        texts=tuple(texts),
    )


def sampled_logprobs(completion: Any) -> list[float]:
    """log p of each token of vLLM's CompletionOutput, which was sampled with `sampling_params`. [T]

    Raises RuntimeError when they are of other tokens than the completion's.
    """
    held = completion.logprobs
    if held.token_ids != list(completion.token_ids):
        said, sampled = len(held.token_ids), len(completion.token_ids)
        raise RuntimeError(f"vLLM gave log-probabilities of {said} tokens that are not the {sampled} of its completion")
    logprobs: list[float] = held.logprobs
    return logprobs


def _texts(tokenizer: Any, before: Sequence[int], completions: Sequence[Sequence[int]]) -> list[str]:
    """As vLLM makes them: what the tokens add to the text before them, which for some tokenizers begins with a space, without a
    last character that was cut.
    """
    rows = [list(before), *([*before, *tokens] for tokens in completions)]
    prefix, *texts = (str(tokenizer.decode(row, skip_special_tokens=True)) for row in rows)
    return [text[len(prefix) :].rstrip("\ufffd") for text in texts]
