"""A job whose completions have several turns: real Ray, real vLLM, and what it leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import REPOSITORY, finish, start
from tests.e2e.test_run import records

RECIPE = REPOSITORY / "configs/grpo/smollm2-lora-calculator.yaml"
FAILS = """
import calculator

async def play(conversation, answer, **columns):
    if {when}:
        raise ZeroDivisionError("no such luck")
    return await calculator.play(conversation, **columns)
"""


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def short(folder: Path) -> list[str]:
    """Overrides: two steps of 16 completions each, in float32, and four held-out prompts."""
    held_out = (REPOSITORY / "configs/grpo/calculator-held-out.jsonl").read_text().splitlines(True)[:4]
    (folder / "held-out.jsonl").write_text("".join(held_out))
    small = ["micro_batch_size=8", "gradient_accumulation_steps=2", "trl.num_generations=4", "max_steps=2", "bf16=false"]
    return [*small, f"output_dir={folder / 'out'}", f"test_datasets=[{{path: {folder}/held-out.jsonl}}]"]


@pytest.mark.slow
def test_the_calculator_recipe_and_its_evaluation(tmp_path: Path) -> None:
    code, output = finish(start("run", RECIPE, *short(tmp_path)))
    assert code == 0 and "Traceback" not in output, output
    out = tmp_path / "out"
    train = records(out, "train")
    assert [record["step"] for record in train] == [1, 2]
    # The trainer computes what the engine sampled, turns and answers of the tool together.
    assert all(record["engine_gap"] < 1e-3 and record["reward/calculator.asked"] > 0 for record in train)
    sampled = lines(out / "rollouts/step-000001.jsonl") + lines(out / "rollouts/held-out-000000.jsonl")
    for line in sampled:
        roles = [message["role"] for message in line["completion"]]
        assert roles == ["assistant", "user"] * (len(roles) // 2) + ["assistant"]
        told = [message["content"] for message in line["completion"] if message["role"] == "user"]
        assert all(text.startswith("The calculator says ") for text in told)
    assert max(len(line["completion"]) for line in sampled) >= 3
    written = sum(line["tokens"] for line in lines(out / "rollouts/step-000001.jsonl"))
    assert train[0]["completion_tokens"] < written, "what the calculator says was not sampled"

    code, output = finish(start("eval", out, "--samples", 2))
    assert code == 0 and "Traceback" not in output, output
    (file,) = (out / "eval").iterdir()
    found = json.loads(file.read_text())
    answers = [answer for row in found["answers"] for answer in row["after"]["sampled"]]
    assert len(answers) == 8 and any(len(answer["completion"]) >= 3 for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["answer > 2000", "True"])
def test_a_function_that_fails(tmp_path: Path, when: str) -> None:
    """Costs its groups and nothing else; where it fails on all of a step, it ends the job with its reason."""
    (tmp_path / "sometimes.py").write_text(FAILS.format(when=when))
    config = yaml.safe_load(RECIPE.read_text())
    for entry in config["datasets"]:
        entry["path"] = str(REPOSITORY / entry["path"])
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "calculator.py").write_text((RECIPE.parent / "calculator.py").read_text())
    overrides = [*short(tmp_path), "trl.rollout_func=sometimes.play", "test_datasets=", "max_steps=1"]
    code, output = finish(start("run", tmp_path / "job.yaml", *overrides))
    reason = "trl.rollout_func sometimes.play failed on {} prompts of step 1: ZeroDivisionError: no such luck"
    if when == "True":
        assert code == 1 and output.count(reason.format(4)) >= 1, output
        assert "nothing to learn from" in output and "Traceback" not in output
        return
    assert code == 0, output
    dropped = int(records(tmp_path / "out", "train")[0]["samples_dropped"])
    assert dropped in (4, 8, 12) and reason.format(dropped // 4) in output
