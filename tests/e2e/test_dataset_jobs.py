"""Whole dataset jobs: real Ray Data, Ray Train and TRL, on the tiny model."""

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors import storage
from tests.e2e.conftest import finish, start
from tests.e2e.test_run import children, command, records

Job = Callable[..., Path]


def test_sft_from_rows_to_adapter(dataset_job: Job, tmp_path: Path, llama: Path) -> None:
    tracked = {"wandb_project": "texts", "wandb_mode": "offline", "wandb_log_model": "end"}
    config = dataset_job(ray__max_bad_rows=0.1, save_total_limit=2, chat_template="chatml", logging_steps=4, **tracked)
    with (tmp_path / "texts.jsonl").open("a") as rows:
        rows.write('{"text": \n{"text": ""}\n')
    code, output = finish(start("run", config))
    assert code == 0, output
    out = tmp_path / "out"
    assert "Traceback" not in output and "2 rows cannot be used" in output and f"adapter  {out}" in output
    bad = json.loads((out / "quarantine.json").read_text())
    assert sorted(row["place"] for row in bad) == [f"{tmp_path}/texts.jsonl:41", f"{tmp_path}/texts.jsonl:42"]
    train, held_out = records(out, "train"), records(out, "eval")
    assert [record["step"] for record in train] == [4, 6], "every fourth step, and the last one"
    assert "done: 6 steps" in output
    assert [record["step"] for record in held_out] == [0, 3, 6]
    assert held_out[-1]["eval/loss"] < held_out[0]["eval/loss"] - 0.1
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    for step in (4, 6):
        storage.verify(out / f"checkpoint-{step}")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(out).chat_template, "the template of the rows goes with the result"
    run_id = json.loads((out / "wandb.json").read_text())["run_id"]
    assert len(list((out / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))) == 1
    assert not list(out.rglob("*.bin")) and not list(out.rglob("*.pt*")), "no pickle is written"
    assert not list(out.glob(".ray-train")) and not list(out.glob(".prepared"))
    adapter = json.loads((out / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(llama)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), str(out))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(), tuned.disable_adapter():
        base = tuned(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(tuned(input_ids=ids).logits, base, atol=1e-2)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(dataset_job: Job, tmp_path: Path) -> None:
    code, output = finish(start("run", dataset_job("a.yaml", output_dir=str(tmp_path / "a"), lora_dropout=0.2)))
    assert code == 0, output

    changes = {"output_dir": str(tmp_path / "b"), "lora_dropout": 0.2, "auto_resume_from_checkpoints": True}
    process = start("run", dataset_job("b.yaml", **changes), "max_steps=1000")
    deadline = time.monotonic() + 300
    while not (tmp_path / "b" / "checkpoint-2" / storage.MANIFEST).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    finish(process, 60)
    for one in family:
        if one.is_running():
            one.kill()
    psutil.wait_procs(family, timeout=10)
    for newer in (tmp_path / "b").glob("checkpoint-*"):
        if newer.name != "checkpoint-2":
            newer.rename(newer.with_name(f"moved-{newer.name}"))

    code, output = finish(start("run", dataset_job("b.yaml", **changes)))
    assert code == 0, output
    assert "resumed from" in output
    keys = ("step", "loss", "grad_norm", "learning_rate")
    a, b = ([{key: r[key] for key in keys} for r in records(tmp_path / name, "train")] for name in "ab")
    assert a == b


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_job_that_is_asked_to_stop_says_where_it_goes_on(
    dataset_job: Job, tmp_path: Path, signum: int, expected: int
) -> None:
    process = start("run", dataset_job(), "max_steps=1000")
    deadline = time.monotonic() + 300
    while not (tmp_path / "out" / "checkpoint-2" / storage.MANIFEST).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = children(process.pid)
    asked = time.monotonic()
    os.kill(process.pid, signum)
    code, output = finish(process, 60)
    assert code == expected and time.monotonic() - asked < 30
    assert re.search(r"stopped after step \d+; the checkpoint of step \d+ is whole", output)
    assert "auto_resume_from_checkpoints=true" in output and "Traceback" not in output
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


@pytest.mark.slow
def test_two_workers_learn_what_one_does(dataset_job: Job, tmp_path: Path) -> None:
    """The same rows a step, in fp32: twice the workers, half the accumulation."""
    for name, workers in (("one", 1), ("two", 2)):
        config = dataset_job(
            f"{name}.yaml",
            output_dir=str(tmp_path / name),
            ray_num_workers=workers,
            gradient_accumulation_steps=2 // workers,
            save_strategy="no",
            save_steps=None,
        )
        code, output = finish(start("run", config))
        assert code == 0, output
    one, two = ([record["loss"] for record in records(tmp_path / name, "train")] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.slow
def test_a_job_that_gets_worse_stops_and_leaves_its_best(dataset_job: Job, tmp_path: Path) -> None:
    config = dataset_job(early_stopping_patience=2, eval_steps=2, max_steps=40, learning_rate=3.0, max_grad_norm=100.0)
    code, output = finish(start("run", config))
    assert code == 0, output
    out = tmp_path / "out"
    held_out = {record["step"]: record["eval/loss"] for record in records(out, "eval")}
    best = min((step for step in held_out if step > 0), key=lambda step: held_out[step])
    assert max(held_out) == best + 4 < 40, "two evaluations without a better one"
    result, checkpoint = (load_file(path / "adapter_model.safetensors") for path in (out, out / f"checkpoint-{best}"))
    assert all(torch.equal(result[name], checkpoint[name]) for name in result)
    assert not list(out.glob("optimizer*")) and not (out / "trainer_state.json").exists()


@pytest.mark.slow
def test_a_job_with_a_range_of_workers_survives_the_loss_of_one(dataset_job: Job, tmp_path: Path) -> None:
    """It goes on from the newest checkpoint, to the losses of a job that lost nobody."""
    changes = {"gradient_accumulation_steps": 2, "max_steps": 20, "save_steps": 4, "eval_steps": 10}
    code, output = finish(start("run", dataset_job("a.yaml", output_dir=str(tmp_path / "a"), ray_num_workers=2, **changes)))
    assert code == 0, output

    config = dataset_job("b.yaml", output_dir=str(tmp_path / "b"), ray_num_workers=[1, 2], **changes)
    process = start("run", config)
    deadline = time.monotonic() + 300
    while not (tmp_path / "b" / "checkpoint-4" / storage.MANIFEST).exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    workers = [one for one in children(process.pid) if "RayTrainWorker" in " ".join(one.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    code, output = finish(process, 500)
    assert code == 0, output
    assert "Ray Train has started the workers again" in output
    for kind in ("train", "eval"):
        a, b = ([(r["step"], r.get("loss", r.get("eval/loss"))) for r in records(tmp_path / name, kind)] for name in "ab")
        assert [step for step, _ in a] == [step for step, _ in b], kind
        assert [loss for _, loss in a] == pytest.approx([loss for _, loss in b], abs=1e-4), kind


@pytest.mark.slow
@pytest.mark.parametrize("rl", ["dpo", "orpo"])
def test_pairs_in_full(dataset_job: Job, tmp_path: Path, rl: str) -> None:
    entry = {"path": str(tmp_path / "pairs.jsonl"), "type": "passthrough"}
    code, output = finish(start("run", dataset_job(rl=rl, datasets=[entry], adapter=None, learning_rate=1e-3)))
    assert code == 0, output
    assert f"model    {tmp_path / 'out'}" in output
    held_out = records(tmp_path / "out", "eval")
    assert held_out[-1]["eval/reward_margin"] > held_out[0]["eval/reward_margin"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.usefixtures("no_ray")
def test_bad_input_ends_in_one_message(dataset_job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        (dataset_job(), f"datasets=[{{path: {tmp_path}/none.jsonl, type: completion}}]"): "there is no file",
        (dataset_job(), f"datasets=[{{path: {tmp_path}/texts.jsonl, type: alpacca}}]"): "alpaca",
        (dataset_job(), "deepspeed=z.json"): "there is no file z.json",
    }
    for arguments, expected in cases.items():
        code, output = command(capsys, "run", *arguments)
        assert code == 1 and expected in output and output.count("eagleray: ") == 1, (arguments, output)


def test_too_many_bad_rows_stop_the_job(dataset_job: Job, tmp_path: Path) -> None:
    config = dataset_job(val_set_size=0, eval_steps=None)
    (tmp_path / "texts.jsonl").write_text('{"text": "w3 w4"}\n{"txt": "w5"}\n')
    code, output = finish(start("run", config), 200)
    assert code == 1 and "Traceback" not in output
    assert f"{tmp_path}/texts.jsonl:2" in output and "ray.max_bad_rows" in output
    (bad,) = json.loads((tmp_path / "out" / "quarantine.json").read_text())
    assert bad["place"] == f"{tmp_path}/texts.jsonl:2"


@pytest.mark.slow
def test_a_stream_goes_on_where_it_was(dataset_job: Job, tmp_path: Path) -> None:
    """Several times over its rows, bad ones among them; resumed, it takes the steps that it would have taken."""
    steps = {"max_steps": 16, "save_steps": 4, "val_set_size": 0, "eval_steps": None}
    config = dataset_job(streaming=True, auto_resume_from_checkpoints=True, ray__max_bad_rows=0.1, **steps)
    with (tmp_path / "texts.jsonl").open("a") as rows:
        rows.write('{"text": \n{"text": ""}\n')
    code, output = finish(start("run", config))
    assert code == 0, output
    out = tmp_path / "out"
    bad = json.loads((out / "quarantine.json").read_text())
    assert sorted(row["place"] for row in bad) == [f"{tmp_path}/texts.jsonl:41", f"{tmp_path}/texts.jsonl:42"]
    whole = [(record["step"], record["loss"]) for record in records(out, "train")]
    assert [step for step, _ in whole] == list(range(1, 17)) and whole[-1][1] < whole[0][1] - 0.1
    for step in (8, 12, 16):
        shutil.rmtree(out / f"checkpoint-{step}")
    code, output = finish(start("run", config))
    assert code == 0, output
    assert [(record["step"], record["loss"]) for record in records(out, "train")] == whole


@pytest.mark.slow
def test_sft_then_dpo_from_its_adapter_then_one_model(dataset_job: Job, tmp_path: Path, llama: Path) -> None:
    """The chain that people run; two workers, since a second adapter is one more thing that ranks must agree on."""
    code, output = finish(start("run", dataset_job("sft.yaml", output_dir=str(tmp_path / "sft"))))
    assert code == 0, output
    entry = {"path": str(tmp_path / "pairs.jsonl"), "type": "passthrough"}
    changes = {"rl": "dpo", "datasets": [entry], "lora_model_dir": str(tmp_path / "sft"), "lora_r": None, "lora_alpha": None}
    workers = {"ray_num_workers": 2, "gradient_accumulation_steps": 1, "learning_rate": 2e-3}
    code, output = finish(start("run", dataset_job("dpo.yaml", **changes, **workers)))
    assert code == 0, output
    out = tmp_path / "out"
    assert f"r=4 alpha=8, from {tmp_path / 'sft'}" in output
    held_out = records(out, "eval")
    assert held_out[0]["eval/loss"] == pytest.approx(0.6931, abs=1e-4), "the policy is its reference"
    assert held_out[-1]["eval/reward_margin"] > 0.01
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for folder, target in ((out, out / "merged"), (out / "checkpoint-4", out / "merged-checkpoint-4")):
        code, output = finish(start("merge", folder))
        assert code == 0 and f'AutoModelForCausalLM.from_pretrained("{target}")' in output, output
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(out / "merged")(input_ids=ids).logits
        expected = PeftModel.from_pretrained(base, out)(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_loss_that_stays_too_high_ends_the_job(dataset_job: Job, tmp_path: Path) -> None:
    config = dataset_job(loss_watchdog_threshold=0.1, loss_watchdog_patience=2)
    code, output = finish(start("run", config))
    assert code == 1 and "Traceback" not in output, output
    assert "loss_watchdog_threshold: the loss was above 0.1 at 2 records in a row, " in output
    assert "at step 2; lower learning_rate, or look at the rows" in output
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
