"""Generated chat rows and pairs of answers, the same in every run, and the job that reads them."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config import load
from orchestrator.schema import JobConfig
from tests.benchmarks.common import LORA, MODEL

TEXT = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man me "
    "even most made after also did many before must through back years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between both "
    "life being under never day same another know while last might us great old year off come since against go came "
    "right used take three"
)
WORDS = TEXT.split()


def conversations(count: int, words: tuple[int, int] = (10, 70)) -> Iterator[dict[str, Any]]:
    """Rows of a question and an answer: some 80 tokens each, from 40 to 130. words: of the shortest and the longest answer."""
    draw = random.Random(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(shortest, longest))).capitalize() + "."

    for _ in range(count):
        yield {"messages": [{"role": "user", "content": text(5, 20)}, {"role": "assistant", "content": text(*words)}]}


def pairs(count: int, words: tuple[int, int] = (10, 70)) -> Iterator[dict[str, Any]]:
    """Rows of a question and two answers, the better one first."""
    for one, other in zip(*[conversations(2 * count, words)] * 2, strict=True):
        question, chosen = one["messages"]
        yield {"messages": [question], "chosen": chosen, "rejected": other["messages"][1]}


def write(path: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """A JSONL file."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def job(folder: Path, rows: Path, **changes: Any) -> JobConfig:
    """A dataset job on a file of these rows; its file is job.yaml in the folder."""
    content = {
        "base_model": MODEL.name,
        "output_dir": str(folder / "out"),
        "adapter": "lora",
        "lora_r": LORA.r,
        "lora_alpha": LORA.alpha,
        "lora_target_linear": True,
        "datasets": [{"path": str(rows), "type": "chat_template"}],
        "sequence_len": 256,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "save_strategy": "no",
        **changes,
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return load(folder / "job.yaml")
