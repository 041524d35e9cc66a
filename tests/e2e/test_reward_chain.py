"""The chain: a reward job, and a GRPO job that its reward model scores."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from tests.e2e.conftest import finish, start
from tests.e2e.test_run import command, records


@pytest.fixture
def reward_job(tmp_path: Path, llama: Path) -> Path:
    """A small reward job on the tiny model, which writes to tmp_path/judge."""
    rows = [{"input": f"w{3 + i % 40}", "chosen": f"w{4 + i % 40} w6 w8", "rejected": f"w{5 + i % 40} w7"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "base_model": str(llama),
        "rl": "reward_trainer",
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "chat_template": "chatml",
        "special_tokens": {"pad_token": "<unk>"},
        "datasets": [{"path": str(tmp_path / "pairs.jsonl"), "type": "bradley_terry.chat_template"}],
        "sequence_len": 128,
        "micro_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 2e-2,
        "bf16": False,
        "output_dir": str(tmp_path / "judge"),
    }
    path = tmp_path / "reward.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.usefixtures("no_ray")
def test_a_reward_model_that_is_not_there_yet_is_told_before_anything_starts(
    job: Callable[..., Path], tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        str(tmp_path / "judge"): f"trl.reward_funcs: there is no folder {tmp_path}/judge",
        "outputs/judge": "trl.reward_funcs: outputs/judge is no folder, not in the hub's cache",
    }
    for name, expected in cases.items():
        code, output = command(capsys, "run", job(trl__reward_funcs=[name]))
        assert code == 1 and output.count("eagleray: ") == 1, output
        assert expected in output and "If a job of yours writes it, run that job first" in output
    code, output = command(capsys, "run", job(trl__reward_funcs=[str(llama)]))
    assert code == 1 and f"{llama} is LlamaForCausalLM, not a reward model" in output
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_reward_model_is_trained_and_scores_the_next_job(
    job: Callable[..., Path], reward_job: Path, tmp_path: Path
) -> None:
    code, output = finish(start("run", reward_job))
    assert code == 0, output
    assert AutoTokenizer.from_pretrained(tmp_path / "judge").pad_token == "<unk>"

    held_out = [{"path": str(tmp_path / "prompts.jsonl")}]
    reward_funcs = ["judge", "tiny_rewards.even"]  # the folder lies beside the YAML
    config = job(trl__reward_funcs=reward_funcs, trl__reward_weights=[2.0, 0.5], test_datasets=held_out, max_steps=2)
    code, output = finish(start("run", config))
    assert code == 0, output
    for record in records(tmp_path / "out", "train"):
        assert record["reward"] == pytest.approx(2.0 * record["reward/judge"] + 0.5 * record["reward/tiny_rewards.even"])
        assert record["reward_std"] > 0 and record["samples_dropped"] == 0

    alone = ["trl.reward_funcs=[judge]", "trl.reward_weights=", f"output_dir={tmp_path}/alone"]
    code, output = finish(start("run", config, *alone))
    assert code == 0, output
    assert "held-out accuracy" not in output
    first, last = (record["eval/reward"] for record in records(tmp_path / "alone", "eval"))
    assert f"held-out reward {first:.2f} (before training) -> {last:.2f} (after step 2)" in output
