"""Jobs as a person starts them: the command line in a process of its own, on a Ray cluster that it starts and ends."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil
import pytest
import ray
import requests
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from orchestrator import trial_process
from tests.tiny import save_llama

REPOSITORY = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose heads have a size that vLLM's CPU attention knows."""
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder)
    vocab = len(AutoTokenizer.from_pretrained(folder))
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def job(tmp_path: Path, llama: Path) -> Callable[..., Path]:
    """Writes a small GRPO job on the tiny model, with changes; returns its file."""

    def write(name: str = "job.yaml", **changes: Any) -> Path:
        rows = "".join(f'{{"prompt": "w{i} w{i + 1} w{i + 2}"}}\n' for i in range(3, 19))
        (tmp_path / "prompts.jsonl").write_text(rows)
        (tmp_path / "tiny_rewards.py").write_text(
            "import time\n\n"
            "def even(completions, completion_ids, **_):\n"
            "    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n\n"
            "def raises(completions):\n    print('about to raise', flush=True)\n    raise RuntimeError('no idea')\n\n"
            "def hangs(completions):\n    time.sleep(600)\n\n"
            "async def play(conversation):\n    await conversation.answer()\n"
        )
        config: dict[str, Any] = {
            "base_model": str(llama),
            "rl": "grpo",
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "datasets": [{"path": str(tmp_path / "prompts.jsonl")}],
            "sequence_len": 32,
            "micro_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 1e-2,
            "lr_scheduler": "constant",
            "bf16": False,
            "output_dir": str(tmp_path / "out"),
            "trl": {"num_generations": 4, "max_completion_length": 8, "reward_funcs": ["tiny_rewards.even"]},
            "ray": {"kv_cache_gib": 1},
        }
        for key, value in changes.items():
            section, _, inner = key.rpartition("__")
            (config[section] if section else config)[inner] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture
def dataset_job(tmp_path: Path, llama: Path) -> Callable[..., Path]:
    """Writes a small job of any method on the tiny model, with changes; returns its file."""

    def write(name: str = "job.yaml", **changes: Any) -> Path:
        texts = [{"text": " ".join(f"w{3 + (i + j) % 40}" for j in range(6 + i % 5))} for i in range(40)]
        pairs = [
            {"prompt": f"w{3 + i % 40} ", "chosen": f"w{4 + i % 40} w5", "rejected": f"w{9 + i % 30} w7"} for i in range(40)
        ]
        (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
        config: dict[str, Any] = {
            "base_model": str(llama),
            "adapter": "lora",
            "lora_r": 4,
            "lora_alpha": 8,
            "lora_target_linear": True,
            "datasets": [{"path": str(tmp_path / "texts.jsonl"), "type": "completion"}],
            "val_set_size": 8,
            "sequence_len": 32,
            "micro_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 6,
            "save_steps": 2,
            "eval_steps": 3,
            "learning_rate": 2e-2,
            "lr_scheduler": "constant",
            "bf16": False,
            "output_dir": str(tmp_path / "out"),
        }
        for key, value in changes.items():
            section, _, inner = key.rpartition("__")
            (config.setdefault(section, {}) if section else config)[inner] = value
        path = tmp_path / name
        path.write_text(yaml.safe_dump(config))
        return path

    return write


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """For commands in this process that must end before anything starts."""
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


def start(*arguments: object) -> subprocess.Popen[str]:
    """`eagleray ARGUMENTS`, with stdout and stderr in one pipe."""
    command = [sys.executable, "-m", "orchestrator", *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 600) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=timeout_s)
    return process.returncode, output


@dataclass(frozen=True)
class Head:
    """A running head node, and the environment of whoever may talk to it."""

    dashboard: str  # its address, with http://
    gcs: str  # for RAY_ADDRESS
    environment: dict[str, str]  # knows the cluster's token


@contextmanager
def head_node(cpus: int, *more: str) -> Iterator[Head]:
    """A cluster of one node on free ports, which says that it has so many CPUs. more: arguments of `ray start`."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    with TemporaryDirectory(prefix="er", dir="/tmp", ignore_cleanup_errors=True) as folder:  # some end late
        environment = {**os.environ, "HOME": folder, "RAY_TMPDIR": folder}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as an activated .venv has it
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment["EAGLERAY_CACHE"] = str(Path.home() / ".cache" / "eagleray")
        for name in ("RAY_ADDRESS", "VLLM_ENABLE_V1_MULTIPROCESSING"):
            environment.pop(name, None)
        command = [*RAY, "start", "--head", "--block", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"]
        command += ["--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", f"--temp-dir={folder}"]
        command += more
        with open(Path(folder) / "head.log", "w") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{ports[1]}"
        try:
            for _ in range(120):
                try:
                    requests.get(address, timeout=1)
                    break
                except requests.ConnectionError:
                    assert process.poll() is None, (Path(folder) / "head.log").read_text()
                    time.sleep(0.5)
            yield Head(address, f"127.0.0.1:{ports[0]}", environment)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # after six jobs on GPUs it took longer
                process.kill()


def run(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """A command's exit code and output."""
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return finish(process, 400)


def running(folder: Path, number: int) -> psutil.Process | None:
    """The process of a trial, once its job runs."""
    found = [one for one in trial_process.processes(folder) if one.cmdline()[-1] == str(folder / "trials" / f"{number:04d}")]
    log = folder / "trials" / f"{number:04d}" / "metrics.jsonl"
    return found[0] if found and log.exists() else None
