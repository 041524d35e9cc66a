"""What is written down of a batch, as a person reads it."""

import json
from dataclasses import replace
from pathlib import Path

from actors.samples import SampleWriter
from actors.types import Scores
from tests.tiny import random_group


def test_a_line_a_completion_and_all_its_turns(tmp_path: Path) -> None:
    plain = random_group(3, [2, 4], seed=0)
    turns = [{"role": "assistant", "content": "É"}, {"role": "user", "content": "?"}]
    played = replace(random_group(3, [5], seed=1), messages=(turns,), truncated=(True,))
    path = tmp_path / "rollouts" / "step-000001.jsonl"
    scores = [[Scores("a.b", (1.0, None), None)], [Scores("a.b", (), "failed")]]
    chat = [{"role": "user", "content": "Hi"}]
    SampleWriter().write(str(path), ["p", chat], scores, [[1.0, None], [None]], [[0.5, None], [None]], plain, played)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["completion"] for line in lines] == ["completion 0", "completion 1", turns]
    assert [(line["prompt"], line["tokens"], line["truncated"]) for line in lines] == [
        ("p", 2, False), ("p", 4, False), (chat, 5, True),
    ]  # fmt: skip
    assert [(line["reward"], line["rewards"], line["advantage"]) for line in lines] == [
        (1.0, {"a.b": 1.0}, 0.5), (None, {"a.b": None}, None), (None, {"a.b": None}, None),
    ]  # fmt: skip
    assert list(path.parent.iterdir()) == [path]
