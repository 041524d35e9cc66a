"""The actor that scores by asking a language model: any server that speaks OpenAI's chat completions, over HTTP.

Each completion is put into the judge's prompt and asked about by itself; equal questions are asked once, as long as the
answer is remembered. The last number of an answer within the judge's scale is the reward, from 0 to 1. An answer without
one, or one that was cut, is None: not known, and never a zero.

An async actor: the questions of many groups are under way at once, `concurrency` of them at most. What the server refuses
for the moment (429, 5xx, no connection, no answer in time) the client asks again, waiting longer each time.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from actors.errors import RewardError
from actors.specs import JudgeSpec
from actors.types import Completion, RolloutGroup, Scores

if TYPE_CHECKING:
    from openai import AsyncOpenAI

REMEMBERED = 4096  # questions, with their texts
RETRIES = 1000  # more than fit into limit_s, which ends them
TRIAL_RETRIES = 1  # of the question at the start: a server that is not there should be told of at once
NO_KEY = "none"  # the client wants one, and servers of one's own take any
NUMBER = re.compile(r"(?:(?<![\w.])-)?\d+(?:\.\d+)?")


class JudgeWorker:
    """One judge in a process of its own.

    api_key: beside the spec, which may be printed, and not in the actor's environment, which Ray writes to its logs.
    """

    def __init__(self, spec: JudgeSpec, api_key: str | None) -> None:
        from openai import AsyncOpenAI

        self.spec = spec
        self.client = AsyncOpenAI(base_url=spec.url, api_key=api_key or NO_KEY, timeout=spec.timeout_s, max_retries=RETRIES)
        self.places = asyncio.Semaphore(spec.concurrency)
        self.asked: OrderedDict[str, asyncio.Task[float | None]] = OrderedDict()

    def __repr__(self) -> str:  # what the dashboard and Ray's logs call it
        return f"{self.spec.path}: {self.spec.model} at {self.spec.url}"

    async def ready(self) -> None:
        """Returns once the judge has answered a question. Raises RewardError for one that cannot be asked."""
        from openai import APIConnectionError, AuthenticationError, OpenAIError, PermissionDeniedError

        key, spec = f"ray.judges.{self.spec.name}", self.spec
        try:
            await self._ask(self.client.with_options(max_retries=TRIAL_RETRIES), question(spec.prompt, "Say yes.", "yes"))
        except APIConnectionError as error:
            why = f"{error} {error.__cause__ or ''}".strip()
            text = f"{key}.url: {spec.url} cannot be reached from a node of the cluster ({why}); start it, or correct the url"
            raise RewardError(text) from None
        except (AuthenticationError, PermissionDeniedError) as error:
            text = f"{key}.api_key_env: {spec.url} refuses the key of {spec.api_key_env} ({error}); name a variable with one"
            raise RewardError(text) from None
        except OpenAIError as error:
            text = f"{key}: {spec.url} does not answer {spec.model} ({error}); correct url, which ends before "
            raise RewardError(f"{text}/chat/completions, or model") from None

    async def score(self, prompt: Any, columns: Mapping[str, Any], group: RolloutGroup) -> Scores:
        """Rewards of one group. A question that cannot be asked is a failure in the result, and so is no number at all."""
        try:
            answers = map(text_of, group.completions(conversational=False))
            questions = [question(self.spec.prompt, text_of(prompt), answer) for answer in answers]
            rewards = tuple(await asyncio.gather(*map(self._reward, questions)))
        except TimeoutError:
            return self._failure(f"the judge did not answer within {self.spec.limit_s:g} s, however often it was asked")
        except Exception as error:  # the fault boundary: what a server says may be anything
            return self._failure(f"{type(error).__name__}: {error}")
        if all(reward is None for reward in rewards):
            low, high = self.spec.scale
            return self._failure(f"no answer of the judge holds a number from {low:g} to {high:g}")
        return Scores(self.spec.path, rewards, None)

    def _failure(self, reason: str) -> Scores:
        return Scores(self.spec.path, (), reason)

    async def _reward(self, text: str) -> float | None:
        """Of one question, from memory where it was asked before, also when its answer is still out."""
        if text not in self.asked:
            self.asked[text] = asyncio.create_task(self._ask_in_turn(text))
            if len(self.asked) > REMEMBERED:
                self.asked.popitem(last=False)
        task = self.asked[text]
        self.asked.move_to_end(text)
        try:
            return await asyncio.shield(task)
        except Exception:
            if self.asked.get(text) is task:
                del self.asked[text]
            raise

    async def _ask_in_turn(self, text: str) -> float | None:
        async with self.places, asyncio.timeout(self.spec.limit_s):
            return await self._ask(self.client, text)

    async def _ask(self, client: "AsyncOpenAI", text: str) -> float | None:
        answer = await client.chat.completions.create(
            model=self.spec.model,
            messages=[{"role": "user", "content": text}],
            max_tokens=self.spec.max_tokens,
            temperature=self.spec.temperature,
        )
        choice = answer.choices[0]
        if choice.finish_reason == "length":
            return None  # of a number that was cut, 1 of 10
        return reward_of(choice.message.content or "", *self.spec.scale)


def question(template: str, prompt: str, completion: str) -> str:
    """The template with its placeholders filled, in one pass: braces in what is filled in, and all others, stay."""
    parts = {"{prompt}": prompt, "{completion}": completion}
    return re.sub(r"\{prompt\}|\{completion\}", lambda found: parts[found[0]], template)


def text_of(part: Completion) -> str:
    """A prompt or a completion for a reader: text as it is, and so one message; several with their roles."""
    if isinstance(part, str):
        return part
    if len(part) == 1:
        return str(part[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in part)


def reward_of(answer: str, low: float, high: float) -> float | None:
    """The last number of the answer as a share of the scale; None where there is none, or it is outside.

    In "8/10", "8 of 10.0" and "8 out of 10" that is the 8.
    """
    of_the_scale = rf"(?:(?<=\d)\s*(?:/|of)|\bout of)\s*{re.escape(f'{high:g}')}(?:\.0+)?(?![\d.]*\d)"
    numbers = NUMBER.findall(re.sub(of_the_scale, "", answer))
    if not numbers or not low <= float(numbers[-1]) <= high:
        return None
    return (float(numbers[-1]) - low) / (high - low)
