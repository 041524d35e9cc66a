"""What comes after training, as a person starts it: chat, eval and serve, with real vLLM and the real openai client.

The reference is transformers with PEFT: the adapter on its base, greedily.
"""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.conftest import REPOSITORY, finish, start
from tests.e2e.test_run import children, records
from tests.tiny import save_adapter

pytestmark = pytest.mark.slow
PROMPT = "w5 w6 w7"
TEMPLATE = "{% for m in messages %}{{ m['content'] + ' w9 ' }}{% endfor %}"
TOKENS = 12  # that are compared: the tiny model never ends


@pytest.fixture
def trained(job: Callable[..., Path], tmp_path: Path) -> Path:
    """The folder of a GRPO job that was run, with 4 held-out prompts."""
    rows = "".join(f'{{"prompt": "w{i} w{i + 2}"}}\n' for i in range(20, 24))
    (tmp_path / "held-out.jsonl").write_text(rows)
    code, output = finish(start("run", job(test_datasets=[{"path": "held-out.jsonl"}])))
    assert code == 0, output
    return tmp_path / "out"


@pytest.fixture
def written(tmp_path: Path, llama: Path) -> Callable[..., Path]:
    """Writes what an SFT job leaves, with a chat template of its own."""

    def write(name: str, *, dora: bool = False) -> Path:
        out = tmp_path / name
        save_adapter(llama, out, target_modules="all-linear", use_dora=dora)
        tokenizer = AutoTokenizer.from_pretrained(llama)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(out)
        job = {"base_model": str(llama), "learning_rate": 1e-3, "bf16": False, "adapter": "lora", "lora_r": 4}
        job |= {"lora_alpha": 8, "lora_target_linear": True, "peft_use_dora": dora, "datasets": [{"path": "none.jsonl"}]}
        (out / "config.yaml").write_text(yaml.safe_dump(job))
        return out

    return write


def generated(llama: Path, folder: Path | None, text: str) -> tuple[list[int], list[int]]:
    """Tokens of the prompt, and the first TOKENS that transformers gives behind it, greedily."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    ids = AutoTokenizer.from_pretrained(llama)(text, return_tensors="pt")["input_ids"]
    whole = model.generate(input_ids=ids, max_new_tokens=TOKENS, do_sample=False)[0]
    return ids[0].tolist(), whole[ids.shape[1] :].tolist()


def reference(llama: Path, folder: Path | None, text: str) -> str:
    """What is generated as it goes on behind the prompt: with the space between them, as vLLM gives it."""
    prompt, answer = generated(llama, folder, text)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    before, whole = (str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (prompt, prompt + answer))
    return whole.removeprefix(before)


def answer(*arguments: object, piped: str = "") -> str:
    """What `eagleray chat` writes to stdout."""
    command = [sys.executable, "-m", "orchestrator", "chat", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, input=piped, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat_answers_as_what_was_trained(trained: Path, llama: Path) -> None:
    """The result, and a checkpoint."""
    expected = reference(llama, trained, PROMPT)
    assert expected != reference(llama, None, PROMPT), "training changed nothing, so this shows nothing"
    assert answer(trained, PROMPT).startswith(expected)
    assert answer(trained / "checkpoint-2", PROMPT).startswith(reference(llama, trained / "checkpoint-2", PROMPT))


def test_chat_answers_as_the_base_model_and_as_an_adapter_that_no_engine_knows(
    written: Callable[..., Path], llama: Path
) -> None:
    dora = written("dora", dora=True)
    asked = f"{PROMPT} w9 "
    assert reference(llama, dora, asked) != reference(llama, None, asked)
    assert answer(dora, PROMPT).startswith(reference(llama, dora, asked))
    assert answer(dora, "--base", piped=PROMPT + "\n").startswith(reference(llama, None, asked))


def test_a_conversation_in_a_terminal(written: Callable[..., Path], llama: Path) -> None:
    """The second question is answered with the first one and its answer in view; Ctrl-D ends it."""
    texts = written("texts")
    ours, theirs = pty.openpty()
    os.write(ours, f"{PROMPT}\nw8 w10\n\x04".encode())
    command = [sys.executable, "-m", "orchestrator", "chat", str(texts)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdin=theirs, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "texts answers; Ctrl-D ends" in done.stderr
    first, second, last = done.stdout.removeprefix("> ").rstrip("\n").split("\n> ")
    assert last == ""
    asked = f"{PROMPT} w9 "
    assert first.startswith(reference(llama, texts, asked))
    assert second.startswith(reference(llama, texts, f"{asked}{first} w9 w8 w10 w9 "))


def test_eval_finds_what_the_job_found(trained: Path, llama: Path) -> None:
    """The job itself measured its held-out prompts before and after; so does this, from another folder and in new files."""
    for _ in range(2):
        code, output = finish(start("eval", trained, "--samples", 2))
        assert code == 0, output
    assert "Traceback" not in output and "4 prompts of held-out.jsonl" in output
    files = sorted((trained / "eval").iterdir())
    first, second = (json.loads(file.read_text()) for file in files)
    assert {**first, "time": ""} == {**second, "time": ""}, "the seed decides what is sampled"
    of_job = records(trained, "eval")
    for side, record, folder in (("before", of_job[0], None), ("after", of_job[-1], trained)):
        assert first[side]["greedy"]["reward"] == pytest.approx(record["eval/reward"])
        assert first[side]["greedy"]["tokens"] == pytest.approx(record["eval/completion_length"])
        assert 0.0 <= first[side]["sampled"]["pass@1"] <= first[side]["sampled"]["pass@2"] <= 1.0
        for asked in first["answers"]:
            (greedy,) = asked[side]["greedy"]
            assert reference(llama, folder, asked["prompt"]).startswith(greedy["completion"])
            _, ids = generated(llama, folder, asked["prompt"])  # not all of them are in the text: some are special tokens
            ids = ids[: greedy["tokens"]]
            assert greedy["reward"] == pytest.approx(sum(i % 2 == 0 for i in ids) / len(ids))
            assert len(asked[side]["sampled"]) == 2
    rows = [line.split() for line in output.splitlines()]
    change = first["after"]["greedy"]["reward"] - first["before"]["greedy"]["reward"]
    assert ["reward", f"{first['before']['greedy']['reward']:.3f}", f"{first['after']['greedy']['reward']:.3f}"] in [
        row[:3] for row in rows
    ]
    assert any(row and row[0] == "reward" and float(row[3]) == pytest.approx(change, abs=2e-3) for row in rows)


@contextmanager
def served(*arguments: object, key: str = "any") -> Iterator[openai.OpenAI]:
    """The client of `eagleray serve ARGUMENTS`, which ends at Ctrl-C without leaving a process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = start("serve", *arguments, "--port", port)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            try:
                client.models.list()
                break
            except (openai.APIConnectionError, openai.APIStatusError):
                time.sleep(1)
        else:
            pytest.fail("nothing was served")
        yield client
    finally:
        family = children(process.pid) if process.poll() is None else []
        process.send_signal(signal.SIGINT)
        code, output = finish(process, 90)
    assert code == 130 and "Traceback" not in output, output
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive


def completed(client: openai.OpenAI, model: str, text: str = PROMPT) -> str:
    arguments: dict[str, Any] = {"model": model, "prompt": text, "max_tokens": TOKENS, "temperature": 0}
    whole = client.completions.create(**arguments).choices[0].text
    pieces = [piece.choices[0].text for piece in client.completions.create(**arguments, stream=True) if piece.choices]
    assert len(pieces) > 1 and "".join(pieces) == whole
    return whole


def said(client: openai.OpenAI, model: str, text: str = PROMPT) -> str:
    messages: list[Any] = [{"role": "user", "content": text}]
    arguments: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    stream = client.chat.completions.create(**arguments, stream=True)
    pieces = [piece.choices[0].delta.content or "" for piece in stream if piece.choices]
    assert len(pieces) > 1 and "".join(pieces) == whole
    return str(whole)


def test_one_adapter_is_served_alone(trained: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_SERVE_KEY", "a secret")
    with served(trained, "--api-key-env", "TEST_SERVE_KEY", key="a secret") as client:
        assert [model.id for model in client.models.list()] == ["out"]
        assert client.models.retrieve("out").id == "out"
        assert completed(client, "out") == reference(llama, trained, PROMPT)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="another").models.list()
        with pytest.raises(openai.NotFoundError):
            completed(client, "none")
        with pytest.raises(openai.BadRequestError, match="chat template"):
            said(client, "out")


def test_adapters_share_an_engine_with_their_base(trained: Path, written: Callable[..., Path], llama: Path) -> None:
    """And one that no engine knows has an engine of its own."""
    texts, dora = written("texts"), written("dora", dora=True)
    with served(trained, trained / "checkpoint-2", texts, dora) as client:
        assert [model.id for model in client.models.list()] == [llama.name, "out", "out/checkpoint-2", "texts", "dora"]
        for name, folder in {llama.name: None, "out": trained, "out/checkpoint-2": trained / "checkpoint-2"}.items():
            assert completed(client, name) == reference(llama, folder, PROMPT), name
        for folder in (texts, dora):
            assert completed(client, folder.name) == reference(llama, folder, PROMPT)
            assert said(client, folder.name) == reference(llama, folder, f"{PROMPT} w9 ")
