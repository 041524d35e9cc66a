"""Whether rows are prompts of rl: grpo, and which reward that needs no Python can judge their completions.

A new such reward is a line in VERIFIERS, in the order in which they are preferred.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from actors import prompts, verifiers
from actors.chat import prompt_token_ids
from actors.reading import BadRow
from orchestrator.row_kinds import Fit, Layout
from orchestrator.row_sample import MOST, Sample

SHORT = 40  # characters of an answer that is not a number and can still be compared with


@dataclass(frozen=True)
class Verifier:
    """A reward that comes with Eagleray or TRL, and the rows that it can judge."""

    reward: str  # in trl.reward_funcs
    columns: tuple[str, ...]
    judges: Callable[[Mapping[str, Any]], bool]  # whether it can judge a row with these columns
    needs: str  # for a person
    chats_only: bool = False


def _short(row: Mapping[str, Any]) -> bool:
    right = verifiers.final_answer(row["answer"])
    return verifiers.number_of(right) is not None or (0 < len(right) <= SHORT and "\n" not in right)


def _of_reasoning_gym(row: Mapping[str, Any]) -> bool:
    described = row["metadata"]  # a mapping or its JSON
    return isinstance(described, str | Mapping) and "source_dataset" in described


def _has_examples(row: Mapping[str, Any]) -> bool:
    try:
        return bool(verifiers.examples(row["input_output"]))
    except (ValueError, KeyError, TypeError):
        return False


VERIFIERS = (
    Verifier(
        "actors.verifiers.reasoning_gym",
        ("answer", "metadata"),
        _of_reasoning_gym,
        "answer and metadata of reasoning-gym",
    ),
    Verifier("actors.verifiers.passes_tests", ("test_list",), lambda row: bool(row["test_list"]), "tests in test_list"),
    Verifier("actors.verifiers.passes_tests", ("input_output",), _has_examples, "tests in input_output"),
    Verifier("actors.verifiers.right_answer", ("answer",), _short, "a number or a few words in answer"),
    Verifier(
        "trl.rewards.accuracy_reward",
        ("solution",),
        lambda row: any(sign in str(row["solution"]) for sign in ("$", "\\boxed", "\\frac")),
        "LaTeX in solution",
        chats_only=True,
    ),
)


def prompt_fit(sample: Sample, tokenizer: Any) -> Fit:
    """The rows as prompts: a question, or a conversation that waits for its answer."""
    chats = bool(tokenizer.chat_template)
    transform = (prompts.chat if chats else prompts.text)(None)
    lengths: list[int] = []
    bad = list(sample.bad)
    for place, row in zip(sample.places, sample.rows, strict=True):
        try:
            asked = transform(row)["prompt"]
            if not isinstance(asked, str) and asked[-1]["role"] == "assistant":
                raise ValueError("the conversation is answered already")
            lengths.append(len(prompt_token_ids(tokenizer, asked, {})))
        except Exception as error:  # rows are anyone's, and so are the templates that must take them
            bad.append(BadRow(place, f"is no prompt ({error})"))
    column = next((name for name in prompts.QUESTIONS if sample.have((name,))), "prompt")
    as_they_are = column == "prompt" and not (chats and any(isinstance(row.get("prompt"), str) for row in sample.rows))
    made = None if as_they_are else f"actors.prompts.{'chat' if chats else 'text'}"
    return Fit(Layout((column,), made), tuple(sorted(lengths)), tuple(bad))


def verifier_of(sample: Sample, chats: bool) -> Verifier | None:
    """The reward that can judge most rows without a function of one's own."""
    for verifier in VERIFIERS:
        if not sample.have(verifier.columns) or (verifier.chats_only and not chats):
            continue
        having = [row for row in sample.rows if all(row.get(name) is not None for name in verifier.columns)]
        if sum(map(verifier.judges, having)) >= MOST * len(sample.rows):
            return verifier
    return None
