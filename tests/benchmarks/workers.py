"""SFT and DPO on two Ray Train workers, under FSDP2 and ZeRO-3, against one worker that holds the model.

Each side is a job as a person runs it, `eagleray run` on one cluster, with LoRA as in the other figures. One worker takes a
step's rows in two passes, two take half of them each. A step takes all rows, so the i-th steps of two sides compute the
same tokens and are compared, as times and as losses, though the jobs run after one another. Tokens are those of the rows;
padding and DPO's reference come on top, on all sides.
"""

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from actors import device
from orchestrator import metrics
from tests.benchmarks import conversations
from tests.benchmarks.common import CORES
from tests.benchmarks.results import Row
from tests.e2e import conftest

WORDS = (300, 500) if device.has_gpu() else (20, 40)  # of an answer
ROWS = 64 if device.has_gpu() else 8  # of a step
WARM_UP = 3  # steps
STEPS_PER_PAIR = 4
ONE = {"ray_num_workers": 1, "gradient_accumulation_steps": 2}
TWO = {"ray_num_workers": 2, "gradient_accumulation_steps": 1}
SHARDED: dict[str, dict[str, Any]] = {
    "FSDP2": {**TWO, "fsdp_version": 2},
    "ZeRO-3": {**TWO, "deepspeed": {"zero_optimization": {"stage": 3}}},
}
SAID = re.compile(r"(\d+) tokens, \d+ of them trained")


def run(pairs: int) -> list[Row]:
    steps = WARM_UP + STEPS_PER_PAIR * pairs
    rows = []
    with tempfile.TemporaryDirectory() as name, conftest.head_node(max(4, CORES)) as head:
        folder = Path(name)
        there = {**head.environment, "RAY_ADDRESS": head.gcs}
        sft = conversations.write(folder / "sft.jsonl", conversations.conversations(ROWS, WORDS))
        dpo = conversations.write(folder / "dpo.jsonl", conversations.pairs(ROWS // 2, WORDS))
        pair = [{"path": str(dpo), "type": "chat_template.default"}]
        methods: dict[str, tuple[Path, dict[str, Any]]] = {
            "SFT": (sft, {"micro_batch_size": ROWS // 2}),
            "DPO": (dpo, {"micro_batch_size": ROWS // 4, "rl": "dpo", "datasets": pair}),
        }
        for method, (file, keys) in methods.items():
            given = {"sequence_len": 1024, "max_steps": steps, **keys}
            one_s, one_loss, tokens = train(there, folder, file, **given, **ONE)
            for sharding, cut in SHARDED.items():
                ours_s, ours_loss, _ = train(there, folder, file, **given, **cut)
                what = f"{method}, 2 workers, {sharding}"
                rows.append(Row(what, "1 worker", ours_s[WARM_UP:], one_s[WARM_UP:], tokens=tokens))
                rows.append(Row(f"loss of {what}", "1 worker", ours_loss, one_loss, "cost", unit="nats"))
    return rows


def train(
    environment: Mapping[str, str], folder: Path, file: Path, **keys: Any
) -> tuple[tuple[float, ...], tuple[float, ...], int]:
    """Runs a job. Returns seconds and losses of its steps, and the tokens of its rows."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        config = conversations.job(Path(name), file, **keys)
        command = [sys.executable, "-m", "orchestrator", "run", str(Path(name) / "job.yaml")]
        code, output = conftest.run(command, dict(environment))
        found = SAID.search(output)
        if code != 0 or not found:
            raise RuntimeError(f"a job ended with exit code {code}:\n{output}")
        records = [r for r in metrics.read(Path(config.output_dir) / metrics.METRICS_FILE) if r["kind"] == "train"]
    seconds, losses = (tuple(record[name] for record in records) for name in ("step_s", "loss"))
    said = {key: value for key, value in keys.items() if key != "datasets"}
    curve = " ".join(f"{loss:.3f}" for loss in losses)  # at once, since a figure of several jobs may be cut off
    print(f"{said}: {median(seconds):.3f} s a step, losses {curve}", flush=True)
    return seconds, losses, int(found[1])
