"""Reward functions that come with Eagleray, named in trl.reward_funcs as `actors.verifiers.NAME`.

Mathematics needs none of ours: `trl.rewards.accuracy_reward` compares with the column `solution`. A new verifier is a
function here that takes completions and the columns it names, as `rewards.py` says, and gives None to what it cannot judge.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from actors import sandbox
from actors.cage import STOPPED
from actors.specs import SandboxSpec
from actors.types import Completion

PYTHON = ("python", "python3", "py")
AT_ONCE = 4  # programs of one group that run side by side, where there are as many cores; rewards reserve none
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MARKED = re.compile(r"<answer>(.*?)</answer>|\\boxed\{([^{}]*)\}", re.DOTALL)  # where a model was asked to put its answer
FENCE = re.compile(r"^```[ \t]*([\w+-]*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def reasoning_gym(completions: Sequence[Completion], answer: Sequence[str], metadata: Sequence[Any]) -> list[float]:
    """The score, 0 to 1, of reasoning-gym's own verifier for an entry of it, whose columns are answer and metadata.

    Some of those verifiers evaluate an answer as Python, here and not in the sandbox: string_insertion, n_queens,
    binary_matrix, spiral_matrix, countdown, puzzle24 and the tasks of algebra. Train on them where that may be.

    metadata: a mapping or its JSON; its source_dataset names the task. What is judged is the last `<answer>` of a
    completion, or all of it where there is none.
    """
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.utils import extract_answer

    scores = []
    for completion, right, described in zip(completions, answer, metadata, strict=True):
        entry = {"answer": right, "metadata": json.loads(described) if isinstance(described, str) else described}
        given = extract_answer(text_of(completion)) or text_of(completion).strip()
        scores.append(float(get_score_answer_fn(entry["metadata"]["source_dataset"])(given, entry)))
    return scores


def passes_tests(
    completions: Sequence[Completion],
    sandbox_limits: SandboxSpec,
    test_list: Sequence[Any] | None = None,
    test_setup_code: Sequence[str | None] | None = None,
    test_imports: Sequence[Any] | None = None,
    input_output: Sequence[Any] | None = None,
) -> list[float | None]:
    """The share of a row's tests that the completion's Python passes; None where the row has no tests.

    Tests are in the columns of MBPP: test_list holds statements that raise, test_setup_code or test_imports what they need;
    or in that of APPS and TACO: input_output is {"inputs": [...], "outputs": [...]} or its JSON, what a program reads and
    prints. Rows of the latter that name a function to call have no tests here.

    Lines are compared without the blanks at their ends. After an input that takes too long the rest is not tried. Programs
    run in a sandbox with sandbox_limits, up to AT_ONCE at a time.
    """
    count = len(completions)
    statements, setup, imports, pairs = (
        column or [None] * count for column in (test_list, test_setup_code, test_imports, input_output)
    )

    def share(i: int) -> float | None:
        program = python_of(text_of(completions[i]))
        if checks := list(statements[i] or []):
            before = "\n".join([*(imports[i] or []), setup[i] or ""])
            passed = sandbox.run(program, sandbox_limits, [f"{before}\n{check}" for check in checks]).passed
            return min(passed, len(checks)) / len(checks)  # whoever finds the token could write it often
        if wanted := examples(pairs[i]):
            return _matches(program, wanted, sandbox_limits) / len(wanted)
        return None

    with ThreadPoolExecutor(min(AT_ONCE, len(os.sched_getaffinity(0)))) as pool:
        return list(pool.map(share, range(count)))


def right_answer(completions: Sequence[Completion], answer: Sequence[Any]) -> list[float | None]:
    """1 where a completion ends in the row's answer, else 0; None where the row has none.

    The answer is what follows the last `####` of the column, as in GSM8K, or all of it. The completion's last `<answer>` or
    `\\boxed{}`, or else all of it, must end in it: its last number be the same, or its last words, in upper or lower case.
    """
    return [_ends_in(text_of(one), final_answer(right)) for one, right in zip(completions, answer, strict=True)]


def final_answer(written: Any) -> str:
    """What of a row's `answer` must be found; "" where there is nothing."""
    return "" if written is None else str(written).rpartition("####")[2].strip()


def examples(described: Any) -> list[tuple[str, str]]:
    """What of a row's `input_output` goes in and must come out, by pairs; none where a function is to be called.

    Raises ValueError, KeyError or TypeError for what is laid out in no such way.
    """
    if isinstance(described, str):
        described = json.loads(described) if described.strip() else None
    if not isinstance(described, Mapping) or described.get("fn_name"):
        return []
    return [(_joined(i), _joined(o)) for i, o in zip(described["inputs"], described["outputs"], strict=True)]


def text_of(completion: Completion) -> str:
    """What was written, be it plain text or a message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def python_of(text: str) -> str:
    """The last fenced block that says it is Python, else the last that says nothing, else all of the text."""
    blocks: list[tuple[str, str]] = FENCE.findall(text)
    for tags in (PYTHON, ("",)):
        if found := [code for tag, code in blocks if tag.lower() in tags]:
            return found[-1]
    return text


def number_of(text: str) -> float | None:
    """The number that a text is, such as `-1,250.5` or `$3`; None where it is none."""
    bare = text.strip().lstrip("$").rstrip("%").replace(",", "")
    return float(bare) if NUMBER.fullmatch(bare) else None


def _ends_in(text: str, right: str) -> float | None:
    if not right:
        return None
    given = ([found for pair in MARKED.findall(text) for found in pair if found] or [text])[-1]
    if (number := number_of(right)) is not None:
        written = NUMBER.findall(given.replace(",", ""))
        return float(bool(written) and float(written[-1]) == number)
    return float(re.search(rf"(?:^|\W){re.escape(right)}\W*$", given, re.IGNORECASE) is not None)


def _joined(text: str | Sequence[str]) -> str:
    return text if isinstance(text, str) else "\n".join(map(str, text))


def _matches(program: str, examples: Sequence[tuple[str, str]], limits: SandboxSpec) -> int:
    matches = 0
    for given, expected in examples:
        ended = sandbox.run(program, limits, stdin=given)
        if ended.exit_code == STOPPED:
            break
        matches += ended.exit_code == 0 and _lines(ended.output) == _lines(expected)
    return matches


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
