"""Completions of several turns: a person's function plays them, and asks the model for its turns on the way.

The function is `async def play(conversation, **columns) -> dict | None`, named in `trl.rollout_func`. It is called once a
completion, with the dataset's columns as far as it names them or takes `**kwargs`; what it returns goes to the reward
functions. All completions of an engine are played on one event loop, on which the engine decodes too: a call that blocks,
such as a tool's that is not async, belongs into `asyncio.to_thread`.

What the model wrote is kept as it was sampled, token by token. Between two of its turns stands what the chat template makes
of the messages that others said there: context, and nothing to learn.
"""

import asyncio
import copy
import inspect
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from typing import Any

import numpy as np

from actors.chat import prompt_token_ids, token_ids_between
from actors.decoder import sampled_logprobs
from actors.errors import ConfigError
from actors.functions import load_function, named_by
from actors.specs import RolloutFunctionSpec, SamplingSpec
from actors.types import RolloutGroup

KEY = "trl.rollout_func"
CLEAN_UP_S = 5.0  # in which a function that is ended early may close what it opened

Message = Mapping[str, Any]


class ConversationCut(Exception):
    """There is no room for another turn of the model: the completion ends with its last one, and counts as truncated.

    A function need not catch it; one that does can still return something.
    """


@dataclass(frozen=True)
class Speaker:
    """The policy version that answers in a conversation."""

    tokenizer: Any
    chat_template_kwargs: Mapping[str, object]
    sampling: SamplingSpec  # of each turn; its max_tokens are for all turns and what is said between them
    params: Callable[[SamplingSpec, int], Any]  # and a seed to vLLM's SamplingParams
    output: Callable[[Sequence[int], Any], Awaitable[Any]]  # token ids and those to vLLM's RequestOutput


class Conversation:
    """One completion as it comes to be: what a rollout function gets."""

    def __init__(self, speaker: Speaker, prompt: Sequence[Message], seeds: Iterator[int]) -> None:
        """seeds: of the model's turns, one each."""
        self.truncated = False  # whether the model's last turn was cut, or there was no room for another
        self._speaker = speaker
        self._messages = [dict(message) for message in prompt]
        self._prompt_messages = len(prompt)
        self._prompt_ids = prompt_token_ids(speaker.tokenizer, prompt, speaker.chat_template_kwargs)
        self._seeds = seeds
        self._ids: list[int] = []  # prompt included
        self._written: list[bool] = []
        self._logprobs: list[float] = []
        self._read = len(prompt)  # messages that are in the prompt or in _ids
        self._end = ""  # the token that the model ended its last turn with
        self._waits_since: float | None = None  # for its function, by the loop's clock; None = it need not
        self._over = False
        self._broken: Exception | None = None  # what the engine raised

    @property
    def messages(self) -> tuple[Message, ...]:
        """All up to now, those of the prompt first. `say` and `answer` add to them."""
        return tuple(map(dict, self._messages))

    @property
    def left(self) -> int:
        """Tokens that the model's next turn may have, of trl.max_completion_length."""
        return max(0, self._room(self._said()))

    def say(self, role: str, content: Any, **more: Any) -> None:
        """Adds a message that the model did not write: a tool's result, a user's reply. more: other fields of it."""
        self._messages.append({"role": role, "content": content, **more})

    async def answer(self, stop: str | Sequence[str] | None = None, max_tokens: int | None = None) -> str:
        """The model's next turn, which is added to the messages.

        stop: strings that end it too, beside those of trl.generation_kwargs, and are part of it then. max_tokens: of this
        turn; one that is cut there may go on. Raises ConversationCut when there is no room for a turn; what was said since
        the last one is taken back then, since the model did not read it.
        """
        if self._over:
            await asyncio.get_running_loop().create_future()  # nothing more comes, also for who catches all that is raised
        if self._waits_since is None:
            raise RuntimeError("conversation.answer() came while the model writes a turn of it")
        said = self._said()
        sampling = self._speaker.sampling
        if self._room(said) < max(1, int(sampling.extra.get("min_tokens", 0))):  # type: ignore[call-overload]
            del self._messages[self._read :]
            self.truncated = True
            await asyncio.sleep(0)  # others go on, also when a function asks again and again in vain
            raise ConversationCut(f"{sampling.max_tokens} tokens, trl.max_completion_length, have no room for another turn")
        most = min(self._room(said), max_tokens or sampling.max_tokens)
        extra = {**sampling.extra, "stop": [*_listed(sampling.extra.get("stop")), *_listed(stop)]}
        own = replace(sampling, num_generations=1, max_tokens=most, extra=extra)
        params = self._speaker.params(own, next(self._seeds))
        self._waits_since = None
        try:
            output = await self._speaker.output([*self._ids, *said], params)
            (turn,) = output.outputs
            logprobs = sampled_logprobs(turn)
        except asyncio.CancelledError:  # the function's own time limit, say: it may go on
            self._waits_since = asyncio.get_running_loop().time()
            raise
        except Exception as error:
            self._broken = error
            raise
        self._add(said, [0.0] * len(said), written=False)
        ids = list(turn.token_ids)
        self._add(ids, logprobs, written=True)
        self.truncated = turn.finish_reason == "length"
        by_token = turn.finish_reason == "stop" and not isinstance(turn.stop_reason, str)
        self._end = self._speaker.tokenizer.decode(ids[-1:]) if by_token else ""
        text = str(self._speaker.tokenizer.decode(ids, skip_special_tokens=True))
        self._messages.append({"role": "assistant", "content": text})
        self._read = len(self._messages)
        self._waits_since = asyncio.get_running_loop().time()
        return text

    def _said(self) -> list[int]:
        """Tokens between the model's last turn and its next one; before the first one the prompt's too."""
        tokenizer, kwargs = self._speaker.tokenizer, self._speaker.chat_template_kwargs
        if not self._ids:
            return prompt_token_ids(tokenizer, self._messages, kwargs)
        return token_ids_between(tokenizer, self._messages, self._read, self._end, kwargs)

    def _room(self, said: Sequence[int]) -> int:
        return len(self._prompt_ids) + self._speaker.sampling.max_tokens - len(self._ids) - len(said)

    def _add(self, ids: Sequence[int], logprobs: Sequence[float], *, written: bool) -> None:
        self._ids += ids
        self._logprobs += logprobs
        self._written += [written] * len(ids)


class RolloutFunction:
    """A person's function, imported."""

    def __init__(self, spec: RolloutFunctionSpec) -> None:
        """Raises ConfigError for one that is not there or cannot be called here."""
        self.spec = spec
        self.function = load_function(KEY, spec.path, spec.search_paths)
        parameters = inspect.signature(self.function).parameters
        if not inspect.iscoroutinefunction(self.function) or not parameters or "trainer" in parameters:
            name = spec.path.rpartition(".")[2]
            raise ConfigError(
                f"{KEY}: {spec.path} is no `async def {name}(conversation, **columns)`, which plays one completion; TRL's "
                f"{name}(prompts, trainer) cannot run in an engine's process, where there is no trainer: write "
                "`await conversation.answer()` where it generates, and conversation.say(role, content) for what is not "
                "the model's"
            )
        self.first = next(iter(parameters))

    async def group(
        self, speaker: Speaker, prompt: Sequence[Message], columns: Mapping[str, Any], seed: int, version: int
    ) -> tuple[RolloutGroup, str | None]:
        """The completions of one prompt, and why they are not whole, if the function failed. Raises what the engine raises.

        Turn t of completion i draws with `seed` + t G + i, so the first turns are those of completions of one turn.
        """
        size = speaker.sampling.num_generations
        conversations = [Conversation(speaker, prompt, count(seed + i, size)) for i in range(size)]
        returned, failure = await self._play(conversations, columns)
        return _group(conversations, returned, version), failure

    async def _play(
        self, conversations: Sequence[Conversation], columns: Mapping[str, Any]
    ) -> tuple[dict[str, list[Any]], str | None]:
        """What the function returned, by name, and why it failed. Once it has failed, all of the group end."""
        arguments = named_by(self.function, {name: value for name, value in columns.items() if name != self.first})
        tasks = [asyncio.create_task(self._played(conversation, arguments)) for conversation in conversations]
        playing = asyncio.gather(*tasks)
        late = asyncio.create_task(self._late(conversations))
        first: list[asyncio.Future[Any]] = [playing, late]
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            error = playing.exception() if playing.done() else late.exception()
        finally:  # also where the group is cancelled, whose policy may be gone in a moment
            for task in (late, *tasks):
                task.cancel()
            for conversation in conversations:
                conversation._over = True  # for a function that does not let itself be cancelled
            await asyncio.wait(tasks, timeout=CLEAN_UP_S)
        if broken := next((c._broken for c in conversations if c._broken), None):
            raise broken
        if error:
            return {}, f"{type(error).__name__}: {error}"
        found = playing.result()
        return {name: [one.get(name) for one in found] for name in dict.fromkeys(n for one in found for n in one)}, None

    async def _played(self, conversation: Conversation, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        conversation._waits_since = asyncio.get_running_loop().time()
        try:
            returned = await self.function(conversation, **copy.deepcopy(arguments))  # each may change its own
        except ConversationCut:
            return {}
        except SystemExit as error:  # would end the event loop
            raise RuntimeError(f"SystemExit: {error}") from error
        finally:
            conversation._waits_since = None
        if not isinstance(returned, Mapping | None):
            raise TypeError(f"it returned a {type(returned).__name__}, not a dict or None")
        return returned or {}

    async def _late(self, conversations: Sequence[Conversation]) -> None:
        """Raises TimeoutError when the model waited too long for a function."""
        loop = asyncio.get_running_loop()
        while True:
            waits = [c._waits_since for c in conversations if c._waits_since is not None]
            wait_s = min(waits, default=loop.time()) + self.spec.timeout_s - loop.time()
            if wait_s <= 0:
                limit = f"ray.reward_timeout_s = {self.spec.timeout_s:g} s"
                raise TimeoutError(f"it took longer than {limit} between two turns of the model")
            await asyncio.sleep(wait_s)


def _listed(stop: Any) -> list[str]:
    return [stop] if isinstance(stop, str) else list(stop or ())


def _group(conversations: Sequence[Conversation], columns: Mapping[str, Sequence[Any]], version: int) -> RolloutGroup:
    """What all begin with before the model's first turn is the prompt, which is computed once for them."""
    starts = [c._ids[: c._written.index(True)] if c._ids else c._prompt_ids for c in conversations]
    prompt = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*starts, strict=False))]
    assert prompt, "a chat template begins alike whatever is said"
    cut = slice(len(prompt), None)
    return RolloutGroup(
        policy_version=version,
        prompt_ids=np.array(prompt, dtype=np.int32),
        completion_ids=tuple(np.array(c._ids[cut], dtype=np.int32) for c in conversations),
        logprobs=tuple(np.array(c._logprobs[cut], dtype=np.float32) for c in conversations),
        truncated=tuple(c.truncated for c in conversations),
        texts=tuple(str(c._speaker.tokenizer.decode(c._ids[cut], skip_special_tokens=True)) for c in conversations),
        written=tuple(np.array(c._written[cut], dtype=np.bool_) for c in conversations),
        messages=tuple(c.messages[c._prompt_messages :] for c in conversations),
        columns=columns,
    )
