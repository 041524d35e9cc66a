"""The verifiers that come with Eagleray, through the worker that calls them, on rows as datasets have them."""

import json
from typing import Any

import numpy as np
import pytest
import reasoning_gym

from actors.rewards import RewardWorker
from actors.specs import RewardSpec, SandboxSpec
from actors.types import RolloutGroup, Scores
from actors.verifiers import python_of

CHAT = [{"role": "user", "content": "Do it."}]
CODE = "actors.verifiers.passes_tests"
MATH = "trl.rewards.accuracy_reward"
GYM = "actors.verifiers.reasoning_gym"


def scored(path: str, prompt: Any, columns: dict[str, Any], *texts: str) -> Scores:
    one = (np.zeros(1, np.int32),)
    group = RolloutGroup(0, one[0], one * len(texts), (np.zeros(1, np.float32),) * len(texts), (False,) * len(texts), texts)
    return RewardWorker(RewardSpec(path, (), SandboxSpec(time_s=2.0))).score(prompt, columns, group)


def rewards(path: str, prompt: Any, columns: dict[str, Any], *texts: str) -> tuple[float | None, ...]:
    scores = scored(path, prompt, columns, *texts)
    assert scores.failure is None
    return scores.rewards


ADD = "def add(a, b):\n    return a + b\n"
ONLY_ONE = "def add(a, b):\n    return 3\n"


@pytest.mark.parametrize("prompt", ["Do it.", CHAT])
def test_statements_of_mbpp(prompt: Any) -> None:
    row = {"test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"], "test_setup_code": "", "challenge_test_list": []}
    texts = [f"Here:\n```python\n{ADD}```\nIt adds.", ADD, ONLY_ONE, "I do not know.", "import os; os._exit(0)", ""]
    assert rewards(CODE, prompt, row, *texts) == (1.0, 1.0, 0.5, 0.0, 0.0, 0.0)


def test_what_the_statements_need_is_there() -> None:
    row = {"test_list": ["assert math.isclose(add(1, 2), three)"]}
    assert rewards(CODE, CHAT, {**row, "test_setup_code": "import math\nthree = 3"}, ADD) == (1.0,)
    assert rewards(CODE, CHAT, {**row, "test_imports": ["import math", "three = 3"]}, ADD) == (1.0,)
    assert rewards(CODE, CHAT, row, ADD) == (0.0,)


def test_what_programs_read_and_print_as_in_apps() -> None:
    doubles = "print(int(input()) * 2)"
    pairs: dict[str, Any] = {"inputs": ["1\n", "2\n", "3\n", "4\n"], "outputs": ["2\n", "4 \n\n", "6", "9\n"]}
    fails = "n = int(input())\nprint(n * 2)\nif n > 1: raise SystemExit(1)"
    hangs = "n = int(input())\nprint(n * 2, flush=True)\nwhile n == 2: pass"  # after which 3 is not tried
    for column in (pairs, json.dumps(pairs)):
        assert rewards(CODE, CHAT, {"input_output": column}, doubles, fails, hangs, "") == (0.75, 0.25, 0.25, 0.0)
    lines = {"inputs": [["1", "2"]], "outputs": [["1", "2"]]}
    assert rewards(CODE, CHAT, {"input_output": lines}, "print(input())\nprint(input())") == (1.0,)


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"test_list": None},
        {"test_list": [], "input_output": ""},
        {"input_output": {"inputs": [], "outputs": []}},
        {"input_output": {"fn_name": "add", "inputs": [[1, 2]], "outputs": [3]}},
    ],
)
def test_a_row_without_tests_gives_no_reward(columns: dict[str, Any]) -> None:
    assert rewards(CODE, CHAT, columns, ADD, "") == (None, None)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\na\n```\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nprints\n```text\n1\n```\nsee\n```\nb\n```", "a\n"),
        ("```\na\n```\n```bash\nls\n```", "a\n"),
        ("```Python title\ns = '```'\n```", "s = '```'\n"),
        ("```python\na", "```python\na"),
    ],
)
def test_which_part_of_an_answer_is_code(text: str, code: str) -> None:
    assert python_of(text) == code


def test_an_entry_of_reasoning_gym_is_judged_by_its_own_task() -> None:
    (entry,) = reasoning_gym.create_dataset("chain_sum", size=1, seed=1)
    assert entry["answer"] == "-4"
    texts = ["-4", " -4.0\n", "I think <answer>7</answer>, no, <answer> -4 </answer>!", "4", ""]
    for metadata in (entry["metadata"], json.dumps(entry["metadata"])):
        found = rewards(GYM, CHAT, {**entry, "metadata": metadata}, *texts)
        assert found[:3] == (1.0, 1.0, 1.0) and max(r for r in found[3:] if r is not None) < 0.1
    unknown = scored(GYM, CHAT, {"answer": "", "metadata": {"source_dataset": "no_such_task"}}, "")
    assert unknown.failure == "ValueError: Dataset 'no_such_task' not registered"


def test_mathematics_by_trl_and_math_verify() -> None:
    pytest.importorskip("math_verify")
    texts = [r"It is $\boxed{\frac{2}{6}}$.", r"$\boxed{\frac{1}{2}}$", "no idea", ""]
    assert rewards(MATH, CHAT, {"solution": r"$\frac{1}{3}$"}, *texts) == (1.0, 0.0, 0.0, 0.0)
    assert rewards(MATH, CHAT, {"solution": "a solution in words"}, *texts) == (None,) * 4
    assert "solution" in (scored(MATH, CHAT, {}, *texts).failure or "")


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (72, ["72", "It is 72.", "48 + 24 = 72", "\\boxed{72} apples, of 80"], ["7", "172", "72 or 73", "", "none"]),
        ("48 + 24 = <<48+24=72>>72\n#### 72", ["So 72.", "72.0"], ["48"]),
        ("1,250", ["1250", "$1,250 in all"], ["1,2", "250"]),
        ("-0.5", ["x = -0.5"], ["0.5"]),
        ("Paris", ["paris", "It is Paris.", "<answer>Paris</answer>, not Rome", "**Paris**"], ["Parisian", "Paris or Rome"]),
        ("B", ["B", "The answer is (B)."], ["AB", "B or C"]),
    ],
)
def test_a_completion_ends_in_the_rows_answer(answer: Any, right: list[str], wrong: list[str]) -> None:
    found = rewards("actors.verifiers.right_answer", CHAT, {"answer": answer}, *right, *wrong)
    assert found == (*[1.0] * len(right), *[0.0] * len(wrong))


@pytest.mark.parametrize("answer", [None, "", " "])
def test_a_row_without_an_answer_gives_no_reward(answer: Any) -> None:
    assert rewards("actors.verifiers.right_answer", CHAT, {"answer": answer}, "72") == (None,)
