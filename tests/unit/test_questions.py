"""Which prompts `eagleray eval` asks, and what it takes from a job's own records."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors import storage
from actors.errors import DataError, EaglerayError
from orchestrator.cli import main
from orchestrator.config import load
from orchestrator.data import load_prompts
from orchestrator.jobs import write_config
from orchestrator.questions import questions_for
from orchestrator.results import find
from tests.unit.test_results import Told

Run = Callable[..., Path]
ROWS = [{"prompt": f"w{3 + i} w{4 + i}", "answer": i} for i in range(20)]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path, base: str, adapter: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Writes what a GRPO job leaves that was started in tmp_path/project, and goes elsewhere."""
    project = tmp_path / "project"
    project.mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_rows(project / "rows.jsonl", ROWS)
    out = adapter()

    def write(**keys: Any) -> Path:
        job = {"base_model": base, "learning_rate": 1e-3, "sequence_len": 32, "micro_batch_size": 8, "rl": "grpo"}
        job |= {"datasets": [{"path": "rows.jsonl"}], "trl": {"reward_funcs": ["sums.correct"], "max_completion_length": 8}}
        job |= {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}
        (project / "job.yaml").write_text(yaml.safe_dump(job | keys))
        monkeypatch.chdir(project)
        config = load("job.yaml")
        write_config(config, out)
        checkpoint = storage.checkpoint_path(out, 2)
        checkpoint.mkdir(exist_ok=True)
        digest = load_prompts(config, config.source.folders).fingerprint
        state = {"step": 2, "job": {"datasets (digest of their prompts)": digest}}
        storage.write_json(checkpoint / storage.STATE, state)
        storage.seal(checkpoint)
        monkeypatch.chdir(tmp_path / "elsewhere")
        return out

    return write


def asked(out: Path, file: Path | None = None) -> tuple[list[Any], str]:
    questions = questions_for(find(out, Told()), file, Told())
    return sorted(row.columns["answer"] for row in questions.rows), questions.source


def test_what_val_set_size_held_out_is_found_again(run: Run, tmp_path: Path) -> None:
    """The same rows that a job of this file holds out, although another file of that name lies in the current folder."""
    out = run(val_set_size=6, seed=7)
    config = load(tmp_path / "project" / "job.yaml")
    expected = load_prompts(config, [str(tmp_path / "project")]).held_out
    write_rows(tmp_path / "elsewhere" / "rows.jsonl", ROWS[:9])
    found, source = asked(out)
    assert found == sorted(row.columns["answer"] for row in expected) and len(found) == 6
    assert source == "val_set_size 6 of rows.jsonl"


def test_rows_that_changed_since_are_refused(run: Run, tmp_path: Path) -> None:
    out = run(val_set_size=6)
    write_rows(tmp_path / "project" / "rows.jsonl", ROWS[1:])
    with pytest.raises(DataError, match="not those of the run any more, so nobody knows which it held out"):
        asked(out)


def test_where_no_checkpoint_is_left_nobody_can_check_the_rows(run: Run) -> None:
    out = run(val_set_size=6)
    shutil.rmtree(out / "checkpoint-2")
    told = Told()
    assert len(questions_for(find(out, told), None, told).rows) == 6
    assert "the run has no checkpoint, so nobody can check that its prompts are the same" in told.text.getvalue()


def test_a_file_of_held_out_prompts(run: Run, tmp_path: Path) -> None:
    write_rows(tmp_path / "project" / "held-out.jsonl", [{"prompt": "w9 w3", "answer": 1}, {**ROWS[3], "answer": 2}])
    out = run(test_datasets=[{"path": "held-out.jsonl"}])
    told = Told()
    questions = questions_for(find(out, told), None, told)
    assert ([row.columns["answer"] for row in questions.rows], questions.source) == ([1, 2], "held-out.jsonl")
    assert "1 of the 2 held-out prompts are among those trained on" in told.text.getvalue()


def test_another_file(run: Run, tmp_path: Path) -> None:
    out = run()
    with pytest.raises(EaglerayError, match="held no prompts out .* name a file by --prompts"):
        asked(out)
    write_rows(tmp_path / "elsewhere" / "mine.jsonl", ROWS[:2])
    assert asked(out, Path("mine.jsonl")) == ([0, 1], "mine.jsonl")
    with pytest.raises(DataError, match="there is no file"):
        asked(out, Path("none.jsonl"))
    write_rows(tmp_path / "elsewhere" / "long.jsonl", [{"prompt": "w3 " * 30, "answer": 0}])
    with pytest.raises(DataError, match="the prompt has 30 tokens"):
        asked(out, Path("long.jsonl"))


def dataset_run(run: Run, *records: dict[str, Any]) -> Path:
    out = run(rl="dpo", trl={})
    (out / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0, **record}) + "\n" for record in records))
    return out


def test_a_dataset_job_has_its_own_records(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a checkpoint up to its step; each time in a new file."""
    margins = {0: 0.0, 2: 0.5, 4: 0.75}
    records = [{"kind": "eval", "step": s, "eval/loss": 1.0 - m, "eval/reward_margin": m} for s, m in margins.items()]
    out = dataset_run(run, {"kind": "train", "step": 1, "loss": 0.7}, *records)
    (out / "checkpoint-2" / "adapter_config.json").write_text((out / "adapter_config.json").read_text())
    (out / "checkpoint-2" / "adapter_model.safetensors").write_bytes((out / "adapter_model.safetensors").read_bytes())
    for folder, after in ((out, 0.75), (out / "checkpoint-2", 0.5), (out, 0.75)):
        assert main(["eval", str(folder)]) == 0
        rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
        assert rows["margin"] == ["0.000", f"{after:.3f}", f"+{after:.3f}"]
        assert rows["loss"] == ["1.0000", f"{1 - after:.4f}", f"-{after:.4f}"]
    written = [json.loads(file.read_text()) for file in sorted((out / "eval").iterdir())]
    assert len(written) == 3
    assert sorted(w["after"]["margin"] for w in written) == [0.5, 0.75, 0.75]
    assert {w["step"] for w in written} == {None, 2}


def test_what_a_dataset_job_cannot_be_asked(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    out = dataset_run(run, {"kind": "eval", "step": 4, "eval/loss": 1.0})
    for arguments, message in {
        (): "has no records of held-out rows before and after",
        ("--prompts", "rows.jsonl"): "asked with both --prompts FILE, rows with a `prompt` and columns, and --reward",
        ("--reward", "sums.correct"): "asked with both --prompts FILE",
        ("--samples", "0"): "--samples is 0; it must be 1 or more",
    }.items():
        assert main(["eval", str(out), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (out / "eval").exists()
