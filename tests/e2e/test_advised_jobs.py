"""What `eagleray advise` writes runs as it is, but for its number of steps."""

import shlex
from pathlib import Path

import pytest

from tests.e2e.conftest import REPOSITORY, finish, start
from tests.e2e.test_run import records


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "method"),
    [
        ("sft/tickets", "SFT"),
        ("dpo/direct", "DPO"),
        ("kto/notes", "KTO"),
        ("reward/courtesy", "reward model"),
        ("grpo/sums", "GRPO"),
    ],
)
def test_an_advised_job_trains(tmp_path: Path, data: str, method: str) -> None:
    job = tmp_path / "job.yaml"
    code, output = finish(start("advise", f"configs/{data}-train.jsonl", "--write", job))
    assert code == 0 and f"{method}: " in output and f"wrote {job}" in output, output
    code, output = finish(start("run", job, "max_steps=2", f"output_dir={tmp_path / 'out'}"))
    assert code == 0, output
    assert [record["step"] for record in records(tmp_path / "out", "train")] == [1, 2]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_command_for_another_method_trains(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    code, output = finish(start("advise", str(REPOSITORY / "configs/orpo/howto-train.jsonl"), "--write", job))
    assert code == 0, output
    (line,) = (line for line in job.read_text().splitlines() if "rl=orpo" in line)
    changes = shlex.split(line.partition(f"{job} ")[2])
    code, output = finish(start("run", job, *changes, "max_steps=1", f"output_dir={tmp_path / 'out'}"))
    assert code == 0 and "ORPO: " in output, output
    assert [record["step"] for record in records(tmp_path / "out", "train")] == [1]
