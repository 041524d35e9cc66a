"""`eagleray top`: what is drawn of a run, and how it is found in a folder."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.errors import ActorError, EaglerayError
from orchestrator import sightings
from orchestrator.cli import main
from orchestrator.dashboard import Actor, Machine
from orchestrator.frame import frame, sparkline
from orchestrator.sightings import OfCluster, OfFolder, Sighting

START = {
    "time": 1000.0,
    "kind": "start",
    "job_id": "02000000",
    "dashboard": "http://127.0.0.1:8265",
    "run": "grpo-sums",
    "method": "grpo",
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "output_dir": "/data/outputs/grpo-sums",
}
GIB = 2**30


def record(step: int, **values: float | None) -> dict[str, Any]:
    return {"time": 1000.0 + 20 * step, "kind": "train", "step": step, "step_s": 20.0, **values}


def engine(
    number: int, state: str = "ALIVE", restarts: int = 0, memory: int | None = 3 * GIB // 2, death: str = ""
) -> Actor:
    return Actor(f"a{number}", f"engine {number}", "RolloutEngine", state, "n1", 4000 + number, restarts, memory, None, death)


def sighting(**changes: Any) -> Sighting:
    events = [
        {"time": 1001.0, "kind": "plan", "steps": 16},
        {"time": 1040.0, "kind": "warning", "text": "step 2: loss was not finite\nand more"},
        {"time": 1060.0, "kind": "phase", "text": "step 4 of 16"},
    ]
    records = [
        {"time": 1000.5, "kind": "eval", "step": 0, "eval/accuracy": 0.125},
        record(1, reward=0.1, kl=None, sample_s=5.0, train_s=10.0, tokens_per_s=611.0, staleness=0.0),
        record(2, reward=None, sample_s=5.0, train_s=10.0, staleness=1.0),
        record(3, reward=0.4567, sample_s=5.0, train_s=10.0, tokens_per_s=612.0, staleness=1.0),
        {"time": 1060.5, "kind": "eval", "step": 3, "eval/accuracy": 0.5},
    ]
    machines = {"n1": Machine("n1", "node-1", 9 * GIB, 24 * GIB, ((61440, 81920),))}
    seen: dict[str, Any] = {
        "start": START,
        "events": events,
        "records": records,
        "actors": [engine(0), engine(1, "DEAD", memory=None), engine(2, restarts=3)],
        "machines": machines,
        "unseen": "",
        "at": 1072.0,
    }
    return Sighting(**{**seen, **changes})


def drawn(seen: Sighting, width: int = 100, height: int = 30) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height, force_terminal=False).print(frame(seen, width, height))
    return out.getvalue().splitlines()


def line_with(lines: list[str], text: str) -> str:
    (line,) = [line for line in lines if text in line]
    return line


def test_a_frame_says_how_the_run_is() -> None:
    lines = drawn(sighting())
    assert "grpo-sums" in lines[0] and "grpo of SmolLM2-135M-Instruct" in lines[0]
    assert "● running  step 4 of 16  12s" in lines[0]  # since 1060
    assert "http://127.0.0.1:8265" in lines[1] and "/data/outputs/grpo-sums" in lines[1]
    text = "\n".join(lines)
    assert "step 3 of 16" in text and "4m20s left" in text  # 13 steps of 20 s
    assert "0.457" in line_with(lines, "reward ") and "▁ █" in line_with(lines, "reward ")
    assert "KL" not in text, "no record has a number for it"
    assert "10.0 s" in line_with(lines, "train ")
    assert line_with(lines, "whole step").count("━") == 2 * line_with(lines, "train ").count("━") == 24
    assert "612 tokens/s" in text and "12s ago" in text
    assert "50.0 % accuracy, first 12.5 %" in text
    assert line_with(lines, "engine 0").split()[1:] == ["engine", "0", "alive", "node-1", "4000", "1.5", "GiB", "-", "0", "│"]
    assert "dead" in line_with(lines, "engine 1") and line_with(lines, "engine 2").split()[-2] == "3"
    assert "node-1  9.0 GiB of 24.0 GiB   GPU 0 60/80 GiB" in text
    assert "step 2: loss was not finite" in text and "and more" not in text


@pytest.mark.parametrize(("width", "height"), [(100, 30), (80, 24), (160, 50)])
def test_a_frame_fits_its_terminal_however_many_actors_there_are(width: int, height: int) -> None:
    """And those that are not alive are among the ones shown."""
    actors = [engine(number) for number in range(60)] + [engine(60, "RESTARTING")]
    warnings = [{"time": 1040.0, "kind": "warning", "text": "w" * 300}] * 20
    machines = {str(i): Machine(str(i), f"node-{i}", 9 * GIB, 24 * GIB, ()) for i in range(9)}
    seen = sighting(actors=actors, machines=machines, events=[*sighting().events, *warnings])
    lines = drawn(seen, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert "restarting" in line_with(lines, "engine 60")
    assert any("more" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "state", "said"),
    [
        ({"unseen": "Ray's dashboard at x does not answer"}, "● out of sight", "Ray's dashboard at x does not answer"),
        ({"records": [], "actors": []}, "● running", "no step is done yet"),
        ({"events": [{"time": 1.0, "kind": "end", "how": "failed", "text": "engine 0 died"}]}, "● failed  engine 0 died", ""),
        ({"events": [{"time": 1.0, "kind": "end", "how": "done", "text": ""}]}, "● done", ""),
        ({"start": {}, "events": [], "records": [], "actors": []}, "● running", "none yet"),
    ],
)
def test_what_is_not_known_is_said(changes: dict[str, Any], state: str, said: str) -> None:
    if "unseen" in changes:
        changes["actors"] = []
    lines = drawn(sighting(**changes))
    assert state in lines[0]
    assert said in "\n".join(lines)


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([0, 0, 7, 7, 7, 7], 3, "▁██"),
        ([5, 5, 5], 10, "▁▁▁"),
        ([0, float("nan"), 7], 10, "▁ █"),
        ([1, 3, float("nan"), 8], 2, "▁█"),  # means 2 and 8
        ([], 10, ""),
        ([float("nan")], 10, " "),
    ],
)
def test_sparklines(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


class Answers:
    """A dashboard whose answers are given."""

    asked: list[str] = []
    files_of_job: dict[str, str | None] = {}  # None: a link to a file that is gone

    def __init__(self, address: str, *, with_token: bool = True) -> None:
        self.address = address
        self.asked.append(address if with_token else f"{address} without a token")

    def actors(self, job_id: str) -> list[Actor]:
        return [engine(0)] if job_id == "02000000" else []

    def machines(self) -> dict[str, Machine]:
        return {
            "n1": Machine("n1", "node-1", 1, 2, ()),
            "n2": Machine("n2", "node-2", 1, 2, (), alive=False),
        }

    def running_jobs(self) -> list[str]:
        return ["02000000"]

    def files(self, node_id: str, pattern: str) -> list[str]:
        assert node_id == "n1" and pattern == "eagleray-*-events.jsonl"
        return [name for name in self.files_of_job if name.endswith("events.jsonl")]

    def file(self, node_id: str, name: str, lines: int = -1) -> str:
        content = self.files_of_job.get(name)
        if content is None:
            raise ActorError("no such file")
        kept = content.splitlines()
        return "\n".join(kept if lines < 0 else kept[-lines:])


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> type[Answers]:
    monkeypatch.setattr(Answers, "asked", [])
    monkeypatch.setattr(Answers, "files_of_job", {})
    monkeypatch.setattr(sightings, "Dashboard", Answers)
    return Answers


def write(path: Path, *lines: dict[str, Any] | str) -> None:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


def test_a_folder_shows_its_last_run(tmp_path: Path, answers: type[Answers]) -> None:
    ended = {"time": 900.0, "kind": "end", "how": "stopped", "text": ""}
    planned = {"time": 1001.0, "kind": "plan", "steps": 4}
    write(tmp_path / "events.jsonl", {**START, "job_id": "01000000"}, ended, START, planned)
    write(tmp_path / "metrics.jsonl", record(1, reward=0.5), '{"time": 1, "kind": "tra')
    seen = OfFolder(tmp_path).look()
    assert seen.start["job_id"] == "02000000" and seen.end is None
    assert [r["step"] for r in seen.train] == [1]
    assert [actor.name for actor in seen.actors] == ["engine 0"] and answers.asked == ["http://127.0.0.1:8265"]

    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1100.0, "kind": "end", "how": "done", "text": ""}) + "\n")
    answers.asked.clear()
    over = OfFolder(tmp_path).look()
    assert over.end and not over.actors and not answers.asked, "a cluster that may be gone is not asked"


def test_the_address_in_the_events_of_another_user_gets_no_token(
    tmp_path: Path, answers: type[Answers], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "events.jsonl", START)
    OfFolder(tmp_path).look()
    owner = (tmp_path / "events.jsonl").stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)
    OfFolder(tmp_path).look()
    assert answers.asked == ["http://127.0.0.1:8265", "http://127.0.0.1:8265 without a token"]


def test_a_cluster_shows_the_newest_run_that_goes_on(answers: type[Answers]) -> None:
    newer = {**START, "job_id": "03000000", "time": 2000.0, "output_dir": "/data/other"}
    events = "eagleray-02000000-events.jsonl"
    answers.files_of_job = {
        "eagleray-01000000-events.jsonl": None,  # of a run whose folder was deleted
        events: json.dumps(START),
        "eagleray-03000000-events.jsonl": json.dumps(newer),
        "eagleray-02000000-metrics.jsonl": json.dumps(record(7)),
    }
    source = OfCluster("http://head:8265")
    assert source.look().start["run"] == "grpo-sums" and source.look().train[0]["step"] == 7
    # What is told later arrives once.
    told = {"time": 1005.0, "kind": "warning", "text": "a"}
    answers.files_of_job[events] = f"{json.dumps(START)}\n{json.dumps(told)}"
    assert source.look().told("warning") == source.look().told("warning") == [told]

    other = OfCluster("http://head:8265", "other/").look()
    assert other.start["job_id"] == "03000000" and not other.records
    with pytest.raises(EaglerayError, match="no run of Eagleray whose output_dir ends in nothing is known at http://head:8265"):
        OfCluster("http://head:8265", "nothing")


def test_top_prints_one_frame_into_a_pipe(tmp_path: Path, answers: type[Answers], capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "events.jsonl", START)
    write(tmp_path / "metrics.jsonl", record(1, reward=0.5))
    assert main(["top", str(tmp_path), "--once"]) == 0
    printed = capsys.readouterr().out
    assert "● running" in printed and "engine 0" in printed and "\x1b" not in printed


def test_an_actor_that_was_asked_to_end_is_not_dead() -> None:
    asked = engine(0, "DEAD", death="The actor is dead because it was killed by `ray.kill`.")
    lines = drawn(sighting(actors=[asked, engine(1, "DEAD", death="Worker exit type: SYSTEM_ERROR")]))
    assert "ended" in line_with(lines, "engine 0") and "dead" in line_with(lines, "engine 1")


def test_no_run_and_no_cluster_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["top", str(tmp_path), "--once"]) == 1
    assert f"{tmp_path} holds no run to watch" in capsys.readouterr().err
    assert main(["top", "--address", "http://127.0.0.1:9", "--once"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("eagleray: Ray's dashboard at http://127.0.0.1:9 does not answer") and error.count("\n") == 1
