"""`eagleray chat`: questions to what a run left, on the engine that jobs sample with. Answers are greedy.

Answers alone go to stdout, so that they can be piped; all else goes to stderr.
"""

import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.errors import EaglerayError
from actors.specs import SamplingSpec
from actors.types import RolloutGroup
from orchestrator import cluster, waits
from orchestrator.answering import Engines, endings, sampling_plan, tokenizer_of
from orchestrator.data import Prompt, Row
from orchestrator.display import Display
from orchestrator.results import Weights, find, loadable

MAX_TOKENS = 1024  # of an answer, unless the job trained longer ones
PROMPT = "> "


def chat(folder: Path, question: str | None, *, base: bool) -> None:
    """Answers one question, given or piped; without one, as many as a person asks, until Ctrl-D.

    base: the base model answers, as it was before training. Raises EaglerayError for anything a person can act on,
    waits.Interrupted on SIGTERM.
    """
    display = Display(Console(stderr=True, force_terminal=sys.stderr.isatty()))
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read()
    if question is not None and not question.strip():
        raise EaglerayError("there is no question; write it behind the folder, pipe it, or leave it out for a conversation")
    result = find(folder, display)
    trl = replace(result.config.trl, rollout_func=None)  # a person is who the model talks with
    result = replace(result, config=replace(result.config, trl=trl))
    tokenizer = tokenizer_of(result)
    with ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _end))
        with redirect_stdout(sys.stderr):  # merging loads DeepSpeed, whose log goes to what stdout is then
            weights = stack.enter_context(loadable(result, display))
        with display.phase("starting Ray"):
            stack.enter_context(cluster.connected())
        plan = sampling_plan(result.config, cluster.nodes(), engines=1)
        group = stack.enter_context(cluster.placed(plan))
        window = result.config.vllm.max_model_len or -1
        engines = Engines(result, plan, group, display, window=window, completions=1)
        engines.load(Weights(result.config.base_model, None) if base else weights)
        conversation = Conversation(_asker(engines, tokenizer, display), templated=tokenizer.chat_template is not None)
        if question is not None:
            print(conversation.say(question.strip()))
            return
        who = f"the base model {result.config.base_model}" if base else result.name
        display.note(f"{who} answers; Ctrl-D ends")
        if not conversation.templated:
            display.note("its tokenizer has no chat template, so it goes on with each text, and each stands for itself")
        talk(conversation, display)


def _end(signum: int, frame: Any) -> None:
    """As Ctrl-C does, so that what lasts as long as the chat is removed: reading a line is no wait that `waits` could end."""
    raise waits.Interrupted(signum)


class Conversation:
    """What was said so far. A model without a chat template knows no turns: each text stands for itself."""

    def __init__(self, ask: Callable[[Prompt], str], *, templated: bool) -> None:
        self.ask = ask
        self.templated = templated
        self.messages: list[dict[str, Any]] = []

    def say(self, text: str) -> str:
        """The answer. What failed was not said."""
        if not self.templated:
            return self.ask(text)
        messages = [*self.messages, {"role": "user", "content": text}]
        answer = self.ask(messages)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def talk(conversation: Conversation, display: Display) -> None:
    """Reads lines and prints answers until Ctrl-D. A conversation that got too long begins anew."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited)
    while True:
        try:
            text = input(PROMPT).strip()
        except EOFError:
            print()
            return
        if not text:
            continue
        try:
            print(conversation.say(text))
        except EaglerayError as error:
            if not conversation.messages:
                raise
            conversation.messages = []
            display.warn(f"{error}\nthe conversation begins anew; ask again")


def _asker(engines: Engines, tokenizer: Any, display: Display) -> Callable[[Prompt], str]:
    config = engines.result.config
    tokens = max(MAX_TOKENS, config.trl.max_completion_length)
    sampling = SamplingSpec(1, tokens, temperature=0.0, extra=endings(config, tokenizer))

    def ask(prompt: Prompt) -> str:
        ((_, ref),) = engines.ask([Row(prompt, {}, "what was asked")], sampling, config.seed)
        with display.phase("answering"):
            group: RolloutGroup = waits.fetch(ref, "engine 0, answering", config.ray.rollout_timeout_s)
        if group.truncated[0]:
            display.note(f"the answer was cut after {len(group.completion_ids[0])} tokens")
        return group.texts[0]

    return ask
