"""Weights & Biases: what its own file holds after a run and a resume, and that its failures cost a warning each."""

import io
import json
import struct
from pathlib import Path

import pytest
from rich.console import Console

from actors.errors import ConfigError
from orchestrator import jobs, wandb_run
from orchestrator.config import load
from orchestrator.display import Display
from orchestrator.schema import JobConfig

API_KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def private_wandb(tmp_path, monkeypatch):
    """No credentials and no settings of this machine's; what a test sets up ends with it."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    yield
    wandb.teardown()


def job(folder: Path, *overrides: str) -> JobConfig:
    folder.mkdir(parents=True, exist_ok=True)
    text = "base_model: m\nlearning_rate: 1e-4\nadapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
    (folder / "job.yaml").write_text(text)
    fixed = ["datasets=[{path: x, type: alpaca}]", f"output_dir={folder / 'out'}", "use_tensorboard=false"]
    return load(folder / "job.yaml", [*fixed, *overrides])


def display() -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    return Display(Console(file=out, width=300)), out


def records_of(file: Path) -> list:
    """wandb's protobuf records: LevelDB's log format after a header of 7 bytes, in blocks of 32 KiB."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its process writes until it ends
    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            records.append(Record.FromString(parts))
            parts = b""
    return records


def history_of(records: list) -> list[dict]:
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            values = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in values.items() if not name.startswith("_")} | {"step": values["_step"]})
    return rows


def run_of(records: list):
    return next(record.run for record in records if record.WhichOneof("record_type") == "run")


def test_an_offline_run_holds_names_steps_configuration_and_goes_on_after_a_resume(tmp_path):
    config = job(tmp_path, "wandb_project=sums", "wandb_mode=offline", "wandb_name=first try")
    shown, _ = display()
    with jobs.metrics_log(config, 0, shown) as log:
        log.write("eval", {"step": 0, "eval/loss": 2.5})
        log.write("train", {"step": 1, "loss": 2.0, "reward/exact": 0.5})
        log.write("eval", {"step": 1, "eval/loss": 1.5})
    with jobs.metrics_log(config, 1, shown) as log:
        log.write("train", {"step": 2, "loss": 1.0})
    first, second = (records_of(file) for file in sorted((tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")))
    assert history_of(first) == [
        {"step": 0, "eval/loss": 2.5},
        {"step": 1, "loss": 2.0, "reward/exact": 0.5, "eval/loss": 1.5},
    ]
    assert history_of(second) == [{"step": 2, "loss": 1.0}]
    assert run_of(first).project == "sums" and run_of(first).display_name == "first try"
    assert run_of(first).run_id == run_of(second).run_id
    logged = {item.key: json.loads(item.value_json) for item in run_of(first).config.update}
    assert logged["learning_rate"] == 1e-4 and logged["ray"]["engines"] == 1


def test_a_new_run_in_the_same_folder_is_another_one_and_an_id_that_is_given_is_kept(tmp_path):
    shown, _ = display()
    ids = []
    for overrides in ((), (), ("wandb_run_id=mine",)):
        with jobs.metrics_log(job(tmp_path, "use_wandb=true", "wandb_mode=offline", *overrides), 0, shown):
            ids.append(json.loads((tmp_path / "out" / "wandb.json").read_text())["run_id"])
    assert len(set(ids)) == 3 and ids[2] == "mine"


def test_the_adapter_is_an_artifact_when_the_job_says_so(tmp_path):
    config = job(tmp_path, "use_wandb=true", "wandb_mode=offline", "wandb_log_model=end")
    shown, _ = display()
    with jobs.metrics_log(config, 0, shown) as log:
        (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"weights")
        (tmp_path / "out" / "quarantine.json").write_text("[]")
        log.keep_result()
    (file,) = (tmp_path / "out" / "wandb").glob("offline-run-*/run-*.wandb")
    (artifact,) = [record.artifact for record in records_of(file) if record.WhichOneof("record_type") == "artifact"]
    assert artifact.type == "model"
    assert [entry.path for entry in artifact.manifest.contents] == ["adapter_model.safetensors"]


def test_a_server_that_does_not_answer_costs_one_warning_and_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run, "INIT_TIMEOUT_S", 1.0)
    monkeypatch.setattr(wandb_run, "FINISH_TIMEOUT_S", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", API_KEY)
    config = job(tmp_path, "use_wandb=true")
    wandb_run.ensure_login(config)
    shown, out = display()
    with jobs.metrics_log(config, 0, shown) as log:
        log.write("train", {"step": 1, "loss": 2.0})
        log.write("train", {"step": 2, "loss": 1.0})
        log.keep_result()
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    assert out.getvalue().count("warning: Weights & Biases: ") == 1
    assert "the job goes on without it" in out.getvalue()
    written = [file for file in tmp_path.rglob("*") if file.is_file() and API_KEY.encode() in file.read_bytes()]
    assert written == []


def test_no_credentials_are_an_error_before_anything_starts_and_only_when_they_are_needed(tmp_path):
    with pytest.raises(ConfigError, match="no credentials .*run `wandb login`, or set wandb_mode: offline"):
        wandb_run.ensure_login(job(tmp_path, "use_wandb=true"))
    for fine in (["wandb_project=p", "wandb_mode=offline"], ["wandb_project=p", "wandb_mode=disabled"], []):
        wandb_run.ensure_login(job(tmp_path, *fine))


@pytest.mark.parametrize("overrides", [[], ["wandb_project=p", "wandb_mode=disabled"]])
def test_a_job_without_it_leaves_no_trace_of_it(tmp_path, overrides):
    shown, _ = display()
    with jobs.metrics_log(job(tmp_path, *overrides), 0, shown) as log:
        log.write("train", {"step": 1, "loss": 2.0})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.jsonl"]
