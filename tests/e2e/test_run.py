"""Whole jobs: real Ray, real vLLM, real files."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors import hub, storage
from orchestrator.cli import main
from tests.e2e.conftest import REPOSITORY, finish, start
from tests.tiny import SMOLLM2


def records(output_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def test_the_demo_recipe_end_to_end(tmp_path: Path) -> None:
    """Two steps of the demo, and its adapter: plain PEFT gives the answers that the engine gave."""
    held_out = [json.loads(line) for line in (REPOSITORY / "configs/grpo/sums-held-out.jsonl").read_text().splitlines()][:8]
    (tmp_path / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    overrides = [f"output_dir={tmp_path / 'out'}", "max_steps=2", f"test_datasets=[{{path: {tmp_path}/held-out.jsonl}}]"]
    # In float32 on every machine: the numbers below are held against transformers to three digits.
    overrides += ["learning_rate=2e-3", "gradient_accumulation_steps=2", "bf16=false"]
    code, output = finish(start("run", "configs/grpo/smollm2-lora-cpu.yaml", *overrides))
    assert code == 0, output
    out = tmp_path / "out"
    assert "held-out accuracy" in output
    assert f"adapter  {out}" in output
    assert "Traceback" not in output
    train = records(out, "train")
    assert [record["step"] for record in train] == [1, 2]
    assert all(record["completion_tokens"] > 32 and record["groups"] == 4 for record in train)
    assert all(record["probe_gap"] < 1e-3 and record["engine_gap"] < 1e-3 for record in train)
    assert list(out.glob("tensorboard/events*"))
    storage.verify(out / "checkpoint-2")

    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2.name))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(hub.resolve(SMOLLM2.name), dtype=torch.float32), str(out)
    )
    solved = 0
    for row in held_out:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
        numbers = [word.strip(".,!?=+") for word in tokenizer.decode(answer, skip_special_tokens=True).split()]
        numbers = [word for word in numbers if word.lstrip("-").isdigit()]
        solved += bool(numbers) and int(numbers[-1]) == row["answer"]
    assert solved == round(records(out, "eval")[-1]["eval/accuracy"] * len(held_out))


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(job: Callable[..., Path], tmp_path: Path) -> None:
    """With batches in flight: Ctrl-C after the checkpoint of step 2, then the same command goes on to the same losses."""
    code, output = finish(start("run", job("a.yaml", output_dir=str(tmp_path / "a"), ray__max_staleness=1)))
    assert code == 0, output

    config = job("b.yaml", output_dir=str(tmp_path / "b"), ray__max_staleness=1, auto_resume_from_checkpoints=True)
    process = start("run", config, "max_steps=1000")
    deadline = time.monotonic() + 300
    while not (tmp_path / "b" / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = children(process.pid)
    asked = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process, 60)
    assert code == 130
    assert "is whole" in output and "auto_resume_from_checkpoints=true" in output and "Traceback" not in output
    assert time.monotonic() - asked < 30
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    for newer in (tmp_path / "b").glob("checkpoint-*"):
        storage.verify(newer)
        if newer.name != "checkpoint-2":
            newer.rename(newer.with_name(f"moved-{newer.name}"))

    code, output = finish(start("run", config))
    assert code == 0, output
    assert "resumed from" in output
    keys = ("step", "loss", "reward", "grad_norm", "staleness", "completion_tokens", "engine_gap")
    a, b = ([{key: r[key] for key in keys} for r in records(tmp_path / name, "train")] for name in "ab")
    assert a == b


def test_a_reward_that_fails_ends_in_one_message(job: Callable[..., Path], tmp_path: Path) -> None:
    """And in a report that has what the function printed, and all actors as they were."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 52365)) == 0:
            pytest.skip("another Ray cluster on this machine has the port of the agent that reads logs")
    code, output = finish(start("run", job(trl__reward_funcs=["tiny_rewards.raises"])))
    assert code == 1
    assert "eagleray: reward tiny_rewards.raises failed on 2 calls of step 1: RuntimeError: no idea" in output
    assert "Traceback" not in output
    (folder,) = (tmp_path / "out" / "crash").iterdir()
    facts = json.loads((folder / "report.json").read_text())
    assert facts["missing"] == "" and facts["step"] == 1 and facts["cause"]["name"] == "reward"
    assert facts["actor"]["name"] == "reward tiny_rewards.raises" and facts["actor"]["memory"] != 0
    states = {actor["name"]: actor["state"] for actor in facts["actors"]}
    assert states == dict.fromkeys(("trainer", "engine 0", "reward tiny_rewards.raises"), "ALIVE")
    assert 0 < facts["machine"]["memory_used"] < facts["machine"]["memory_total"]
    assert "about to raise" in (folder / "logs" / "reward-tiny-rewards.raises.out").read_text()
    assert f"report  {folder}/report.md" in output
    events = [json.loads(line) for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["kind"] == "end" and events[-1]["how"] == "failed"


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and output of `eagleray ARGUMENTS` in this process, for what ends before anything starts."""
    code = main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.usefixtures("no_ray")
def test_bad_input_ends_before_anything_starts(
    job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = job()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "w3"}\n{"question": "w4"}\n')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "adapter_model.safetensors").write_text("mine")
    cases = {
        (tmp_path / "none.yaml",): "none.yaml",
        (good, f"datasets=[{{path: {tmp_path}/empty.jsonl}}]"): "no prompts in",
        (good, f"datasets=[{{path: {tmp_path}/bad.jsonl}}]"): "bad.jsonl:2: has no `prompt`",
        (good, "base_model=/nowhere/at/all"): "there is no folder /nowhere/at/all",
        (good, "base_model=nobody/nothing"): "nobody/nothing is no folder, not in the hub's cache",
        (good, f"output_dir={tmp_path}/used"): "holds an earlier run",
        (good, "trl.num_generations=1"): "num_generations",
        (good, "lora_rr=3"): "did you mean lora_r?",
        (good, "trl.max_completion_length=30"): "leaves 2",
        (good, "trl.rollout_func=tiny_rewards.even"): "tiny_rewards.even is no `async def even(conversation, **columns)`",
        (good, "trl.rollout_func=tiny_rewards.play"): "is plain text; give messages with role and content",
    }
    for arguments, expected in cases.items():
        code, output = command(capsys, "run", *arguments)
        assert code == 1, (arguments, output)
        assert output.count("eagleray: ") == 1 and expected in output, (arguments, output)
    assert (tmp_path / "used" / "adapter_model.safetensors").read_text() == "mine"
    assert not list(tmp_path.glob("*/crash")), "that is no crash"

    code, output = finish(start("run", good, "lora_rr=3"), 120)
    assert code == 1
    assert "did you mean lora_r?" in output and "Traceback" not in output


@pytest.mark.usefixtures("no_ray")
def test_a_folder_in_use_is_refused(job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from orchestrator.checkpoints import claimed

    with claimed(tmp_path / "out"):
        code, output = command(capsys, "run", job())
    assert code == 1
    assert "is in use by another run" in output


@pytest.mark.usefixtures("no_ray")
def test_plan_starts_nothing(job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = command(capsys, "plan", job())
    assert code == 0
    assert "8 micro_batch_size x 1 gradient_accumulation_steps x 1 ray_num_workers = 8 completions a step" in output
    assert not (tmp_path / "out").exists()
    code, output = command(capsys, "plan", job(ray__engine_cpus=4096))
    assert code == 1
    assert "engine 0 needs 4096 CPU" in output


@pytest.mark.slow
def test_prompts_are_written_in_the_template_that_the_job_names(job: Callable[..., Path], tmp_path: Path) -> None:
    """The tiny model has none of its own, so that no chat could be written without it."""
    rows = [{"prompt": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(3, 19)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [{"path": str(tmp_path / "chats.jsonl")}]
    code, output = finish(start("run", job(datasets=chats, sequence_len=64)))
    assert code == 1 and "the chat template cannot take the prompt" in output, output
    code, output = finish(start("run", job(datasets=chats, sequence_len=64, chat_template="chatml", max_steps=1)))
    assert code == 0, output
    assert [record["step"] for record in records(tmp_path / "out", "train")] == [1]
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template, "it goes with the result"


@pytest.mark.slow
def test_an_adapter_is_trained_on_and_merged(job: Callable[..., Path], tmp_path: Path, llama: Path) -> None:
    """The second job's engines serve the first one's adapter before it has taken a step, and its KL counts from there."""
    first, second = tmp_path / "first", tmp_path / "second"
    code, output = finish(start("run", job(output_dir=str(first), max_steps=2)))
    assert code == 0, output
    code, output = finish(start("run", job(output_dir=str(second), max_steps=2, lora_model_dir=str(first), trl__beta=0.1)))
    assert code == 0, output
    assert "r=8 alpha=16, from " in output
    train = records(second, "train")
    assert train[0]["kl"] == pytest.approx(0.0, abs=1e-6) and train[1]["kl"] > 1e-5
    assert all(record["probe_gap"] < 1e-3 and record["engine_gap"] < 1e-3 for record in train)
    code, output = finish(start("merge", second))
    assert code == 0, output
    ids = torch.tensor([[3, 4, 5, 6]])
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(second / "merged")(input_ids=ids).logits
        torch.testing.assert_close(merged, PeftModel.from_pretrained(base, second)(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(second / "merged")("w5")["input_ids"] == [5], "the base's, since the job leaves none"
