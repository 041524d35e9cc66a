"""Every `eagleray` command of the README as it stands there, one after another, where a newcomer's files are.

The recipes are the README's with two steps each; the cluster is one of this machine, so its address and its jobs' names take
the places of the README's.
"""

import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest
import requests

from tests.e2e.conftest import REPOSITORY, Head, finish, head_node
from tests.unit.test_readme import COMMANDS

pytestmark = pytest.mark.slow

ADDRESS = "http://127.0.0.1:8265"
SAID = "said.txt"  # what is typed, where a command asks
BEFORE = "run configs/grpo/smollm2-lora-cpu.yaml"  # what `make demo` does
# The README shows a cluster's newest run before it has said how to submit one.
ORDERED = sorted(COMMANDS, key=lambda command: ADDRESS in command or "stop" in command)
LEFT = {  # by some of the commands
    "advise rows.jsonl --write job.yaml": "job.yaml",
    "report outputs/grpo-sums": "outputs/grpo-sums/report.png",
    "merge outputs/grpo-sums": "outputs/grpo-sums/merged/model.safetensors",
    "run configs/reward/smollm2-lora-cpu.yaml": "outputs/reward-lora/adapter_model.safetensors",
    "run configs/grpo/smollm2-lora-reward-model.yaml": "outputs/grpo-replies/adapter_model.safetensors",
    "sweep configs/sweeps/sft-rates.yaml": "outputs/sft-rates/trials/0000/adapter_model.safetensors",
}


def plain(command: str) -> str:
    return " ".join(shlex.split(command))


def test_what_is_looked_for_is_of_commands_that_are_there() -> None:
    assert set(LEFT) <= {plain(command) for command in COMMANDS}


@dataclass
class Newcomer:
    folder: Path
    head: Head
    submitted: list[str] = field(default_factory=list)  # names of jobs

    def start(self, command: str, output: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        words = shlex.split(command.replace(ADDRESS, self.head.dashboard))
        environment = {**self.head.environment, "RAY_API_SERVER_ADDRESS": self.head.dashboard}
        words = [self.submitted[-1] if word in ("JOB", "[JOB]") else word for word in words]
        with (self.folder / SAID).open() as said:
            return subprocess.Popen(
                ["eagleray", *words],
                cwd=self.folder,
                env=environment,
                text=True,
                stdin=said,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def run(self, command: str) -> str:
        code, output = finish(self.start(command))
        assert code == 0, output
        self.submitted += re.findall(r"^job (\w+)", output, re.MULTILINE) if command.startswith("submit") else []
        return output


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Newcomer]:
    folder = tmp_path_factory.mktemp("newcomer")
    shutil.copytree(REPOSITORY / "configs", folder / "configs")
    for file in folder.glob("configs/*/*.yaml"):
        text = re.sub(r"^(max_steps|save_steps|eval_steps): \d+", r"\1: 2", file.read_text(), flags=re.MULTILINE)
        file.write_text(text.replace("grace_period: 12", "grace_period: 1").replace("num_samples: 4", "num_samples: 1"))
    rows = (folder / "configs/sft/tickets-train.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(rows[:24]))
    shutil.copy(REPOSITORY / "tests/unit/axolotl/dpo-lora.yml", folder / "axolotl.yml")
    (folder / SAID).write_text("Hello!\n")
    with head_node(2) as head:
        newcomer = Newcomer(folder, head)
        newcomer.run(BEFORE)
        yield newcomer


@pytest.mark.parametrize("command", [one for one in ORDERED if not one.startswith("serve")])
def test_it_does_what_it_says(newcomer: Newcomer, command: str) -> None:
    if command.startswith("stop"):
        newcomer.run("submit job.yaml output_dir=again --no-wait")
    assert newcomer.run(command)
    left = LEFT.get(plain(command))
    assert left is None or (newcomer.folder / left).is_file()


@pytest.mark.parametrize("command", [one for one in ORDERED if one.startswith("serve")])
def test_it_serves_until_it_is_stopped(newcomer: Newcomer, command: str) -> None:
    log = newcomer.folder / "serve.log"  # since nobody reads a pipe, which stops it when it is full
    with log.open("w") as output:
        process = newcomer.start(command, output)
    models: set[str] = set()
    try:
        for _ in range(200):
            time.sleep(1)
            assert process.poll() is None, log.read_text()
            try:
                answer = requests.get("http://127.0.0.1:8000/v1/models", timeout=60)
                models = {model["id"] for model in answer.json()["data"]}
                break
            except (requests.ConnectionError, requests.JSONDecodeError, KeyError):
                continue
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)
    assert {"grpo-sums", "grpo-replies"} <= models
