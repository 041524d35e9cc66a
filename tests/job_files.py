"""Two job files that load, ways to write them with changes, and what was said of them."""

from pathlib import Path

import pytest

from orchestrator.config import load
from orchestrator.schema import JobConfig

GRPO = """\
base_model: org/model
rl: grpo
adapter: lora
lora_r: 16
lora_alpha: 32
lora_target_linear: true
learning_rate: 2e-4
gradient_accumulation_steps: 8
datasets:
  - path: sums.jsonl
    type: sums.prompts
trl:
  reward_funcs: [sums.exact]
"""  # 13 lines: what a test appends begins at line 14
FULL_GRPO = "".join(line for line in GRPO.splitlines(True) if not line.startswith(("adapter", "lora_")))
SFT = "base_model: org/model\nlearning_rate: 1e-5\ndatasets: [{path: d.jsonl, type: alpaca}]\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def grpo(folder: Path, extra: str = "", *overrides: str) -> JobConfig:
    return load(write(folder, GRPO + extra), overrides)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What a person was told in the log."""
    return [record.getMessage() for record in caplog.records if record.name == "eagleray"]
