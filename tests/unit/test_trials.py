"""How a trial's actor reads its job: records as they come, from a file that a resumed job replaces."""

import json
from pathlib import Path

from orchestrator.trials import Tail


def line(step: int) -> str:
    return json.dumps({"time": 0.0, "kind": "train", "step": step}) + "\n"


def steps(tail: Tail) -> list[int]:
    return [record["step"] for record in tail.new()]


def test_records_are_read_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert steps(tail) == [], "there is no file yet"
    path.write_text(line(1) + line(2)[:10])
    assert steps(tail) == [1]
    with path.open("a") as file:
        file.write(line(2)[10:] + line(3))
    assert steps(tail) == [2, 3]
    assert steps(tail) == []


def test_of_an_earlier_run_only_what_the_resumed_one_kept_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + line(2) + line(3))
    tail = Tail(path, old=path.stat().st_ino)
    assert steps(tail) == [], "the job has not resumed yet, and may drop some of them"
    (tmp_path / "new").write_text(line(1) + line(2))
    (tmp_path / "new").replace(path)
    assert steps(tail) == [1, 2]
    (tmp_path / "new").write_text(line(1))  # workers that were started again take steps back
    (tmp_path / "new").replace(path)
    assert steps(tail) == [1]
