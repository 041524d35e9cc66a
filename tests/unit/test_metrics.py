"""The metrics log: what is on disk after writes, kills and resumes, and what other readers find there."""

import json
import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.errors import EaglerayError
from orchestrator import metrics
from orchestrator.metrics import METRICS, MetricsLog, entry, read


def write_steps(
    folder: Path, steps: list[int], reward: float, resumed_from: int = 0, tensorboard: bool = False
) -> None:
    with MetricsLog(folder, "run", resumed_from, tensorboard) as log:
        for step in steps:
            log.write("train", {"step": step, "reward": reward})


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_disk_at_once_with_kind_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.time, "time", lambda: 1700000000.1234)
    log = MetricsLog(tmp_path, "run", use_tensorboard=False)
    log.write("eval", {"step": 0, "eval/accuracy": 0.125})
    log.write("train", {"step": 1, "reward": 0.5, "reward/exact": 1.0})
    assert lines_of(tmp_path) == [
        {"time": 1700000000.123, "kind": "eval", "step": 0, "eval/accuracy": 0.125},
        {"time": 1700000000.123, "kind": "train", "step": 1, "reward": 0.5, "reward/exact": 1.0},
    ]
    log.close()
    assert not (tmp_path / "tensorboard").exists()


def test_resume_drops_the_steps_that_are_trained_again(tmp_path):
    with MetricsLog(tmp_path, "run", use_tensorboard=False) as log:
        log.write("eval", {"step": 0, "eval/accuracy": 0.1})
        for step in range(1, 6):
            log.write("train", {"step": step, "reward": 1.0, "loss": math.nan})
        log.write("eval", {"step": 4, "eval/accuracy": 0.4})
    write_steps(tmp_path, [4, 5], reward=2.0, resumed_from=3)
    assert [(r["kind"], r["step"], r.get("reward")) for r in lines_of(tmp_path)] == [
        ("eval", 0, None),
        ("train", 1, 1.0),
        ("train", 2, 1.0),
        ("train", 3, 1.0),
        ("train", 4, 2.0),
        ("train", 5, 2.0),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_at_the_last_step_appends(tmp_path):
    write_steps(tmp_path, [1, 2], reward=1.0)
    before = (tmp_path / "metrics.jsonl").read_text()
    write_steps(tmp_path, [3], reward=2.0, resumed_from=2)
    after = (tmp_path / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert json.loads(after[len(before) :])["step"] == 3


def test_a_new_run_sets_the_old_metrics_aside(tmp_path):
    write_steps(tmp_path, [1, 2, 3], reward=1.0)
    write_steps(tmp_path, [1], reward=2.0)
    assert [record["reward"] for record in lines_of(tmp_path)] == [2.0]
    assert [record["reward"] for record in read(tmp_path / "metrics.previous.jsonl")] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("half", ['{"time": 1.0, "kind": "train", "st', "{", "\0\0\0"])
def test_a_half_written_last_line_is_dropped(tmp_path, half):
    write_steps(tmp_path, [1, 2], reward=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + half)
    assert [record["step"] for record in read(path)] == [1, 2]
    write_steps(tmp_path, [3], reward=1.0, resumed_from=2)
    assert [record["step"] for record in lines_of(tmp_path)] == [1, 2, 3]


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    write_steps(tmp_path, [1, 2], reward=1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().removesuffix("\n"))
    write_steps(tmp_path, [3], reward=1.0, resumed_from=2)
    assert [record["step"] for record in lines_of(tmp_path)] == [1, 2, 3]


def test_a_kill_while_the_resume_rewrites_leaves_the_old_file(tmp_path, monkeypatch):
    write_steps(tmp_path, [1, 2, 3], reward=1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(tmp_path, "run", resumed_from=1, use_tensorboard=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("bad", ["not json", '{"step": 1}', '{"kind": "train"}', "[1]", '{"kind": "other", "step": 1}'])
def test_a_damaged_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n' + bad + '\n{"kind": "train", "step": 3}\n')
    with pytest.raises(EaglerayError, match=r"metrics\.jsonl, line 2 is not a metrics record"):
        read(path)


def test_no_file_is_an_error_with_its_path(tmp_path):
    with pytest.raises(EaglerayError, match="metrics.jsonl does not exist"):
        read(tmp_path / "metrics.jsonl")


def test_values_that_are_not_finite_stay_valid_json_and_come_back_as_nan(tmp_path):
    with MetricsLog(tmp_path, "run", use_tensorboard=False) as log:
        log.write("train", {"step": 1, "loss": math.nan, "grad_norm": math.inf, "kl": 0.5})
    raw = (tmp_path / "metrics.jsonl").read_text()
    assert '"loss": null' in raw and '"grad_norm": null' in raw
    (record,) = read(tmp_path / "metrics.jsonl")
    assert math.isnan(record["loss"]) and math.isnan(record["grad_norm"]) and record["kl"] == 0.5


def test_an_unknown_metric_is_refused_before_anything_is_written(tmp_path):
    log = MetricsLog(tmp_path, "run", use_tensorboard=False)
    with pytest.raises(KeyError, match="rewrad"):
        log.write("train", {"step": 1, "rewrad": 0.5})
    log.close()
    assert lines_of(tmp_path) == []


def test_reward_functions_are_families_even_when_named_by_a_path():
    assert entry("reward") == ("reward", "")
    assert entry("reward/exact") == ("reward/*", "exact")
    assert entry("reward/org/judge-1b") == ("reward/*", "org/judge-1b")
    assert entry("eval/reward/exact") == ("eval/reward/*", "exact")


def test_every_metric_has_a_unit_and_a_meaning():
    assert all(unit and len(meaning.split()) >= 2 for unit, meaning in METRICS.values())


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_the_values_back(tmp_path):
    log = MetricsLog(tmp_path, "run")
    log.write("eval", {"step": 0, "eval/accuracy": 0.25})
    log.write("train", {"step": 1, "reward": 0.5, "reward/exact": 0.75})
    log.write("train", {"step": 2, "reward": 1.5})
    # Before close: a killed run must have its curves too.
    assert scalars(tmp_path, "reward") == [(1, 0.5), (2, 1.5)]
    assert scalars(tmp_path, "reward/exact") == [(1, 0.75)]
    assert scalars(tmp_path, "eval/accuracy") == [(0, 0.25)]
    log.close()


def test_tensorboard_shows_no_step_twice_after_a_resume(tmp_path):
    write_steps(tmp_path, [1, 2, 3, 4], reward=1.0, tensorboard=True)
    write_steps(tmp_path, [3, 4], reward=2.0, resumed_from=2, tensorboard=True)
    assert scalars(tmp_path, "reward") == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
