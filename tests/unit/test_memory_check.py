"""The memory model beside what a rank or a worker really needs, each method on a small model.

Measured in a process of its own, as an actor is: other tests leave tensors in this one.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from actors.measuring import MeasuredTrainer, MeasuredWorker
from actors.specs import DatasetTrainSpec, RankSpec, TrainerSpec
from orchestrator.dataset_plan import make_dataset_plan
from orchestrator.memory import longest_rows, trainer_memory
from orchestrator.memory_check import Measured, worker_spec
from orchestrator.online_specs import trainer_spec
from orchestrator.plan import Node, make_plan
from orchestrator.schema import DatasetConfig
from tests.models import model_job

LAPTOP = [Node("laptop", {"CPU": 1.0})]
ROWS = {"sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": False}
GRPO = {**ROWS, "rl": "grpo", "trl__max_completion_length": 24, "trl__num_generations": 4}
SAVING = {"gradient_checkpointing": True}
SLOW = pytest.mark.slow
MORE: list[tuple[str | None, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", SAVING),
    ("qlora", {}),
    (None, {}),
    (None, {"gradient_accumulation_steps": 1}),
    (None, {**SAVING, "sample_packing": True}),
    ("lora", {"rl": "dpo"}),
    (None, {"rl": "dpo"}),
    ("lora", {"rl": "kto"}),
    ("lora", {"rl": "orpo"}),
    ("lora", {"rl": "reward_trainer"}),
]
MORE_ONLINE: list[tuple[str | None, dict[str, Any]]] = [
    ("lora", SAVING),
    ("lora", {"trl__beta": 0.1}),
    (None, {}),
    (None, {**SAVING, "trl__beta": 0.1}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, base: str) -> str:
    """Small, but so that its layers need more than its weights do."""
    folder = tmp_path_factory.mktemp("model")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=160, num_hidden_layers=6, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "rows.jsonl").write_text('{"text": "w3 w4"}\n')
    return str(folder)


@pytest.fixture(scope="module")
def process() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin_alone) as pool:
        yield pool


def begin_alone() -> None:
    """In the process; torch's own function cannot be sent there once vLLM has put another in its place here."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("adapter", "changes"), [("lora", {"bf16": True}), *(pytest.param(*job, marks=SLOW) for job in MORE)], ids=str
)
def test_workers(process: Executor, model: str, tmp_path: Path, adapter: str | None, changes: dict[str, Any]) -> None:
    config = model_job(model, adapter, **{**ROWS, "output_dir": str(tmp_path), **changes})
    config.datasets = [DatasetConfig(path=f"{model}/rows.jsonl", type=None if config.rl else "completion")]
    plan = make_dataset_plan(config, LAPTOP)
    rows = config.micro_batch_size * config.gradient_accumulation_steps
    measured = process.submit(peak_of_a_worker, worker_spec(config, plan), rows, config.sequence_len).result()
    compare(trainer_memory(config, plan.dtype, 1, gpu=False), measured)


def peak_of_a_worker(spec: DatasetTrainSpec, rows: int, length: int) -> int:
    reports = SimpleNamespace(add=SimpleNamespace(remote=lambda *_: None))
    return MeasuredWorker(spec, RankSpec(), reports).peak(rows, length)


@pytest.mark.parametrize(
    ("adapter", "changes"), [("lora", {}), *(pytest.param(*job, marks=SLOW) for job in MORE_ONLINE)], ids=str
)
def test_ranks(process: Executor, model: str, adapter: str | None, changes: dict[str, Any]) -> None:
    config = model_job(model, adapter, **{**GRPO, **changes})
    plan = make_plan(config, LAPTOP, 8)
    rows: Any = longest_rows(config, gpu=False)
    shape = (plan.prompts_per_step, rows.prompt, config.trl.num_generations, rows.length)
    measured = process.submit(peak_of_a_rank, trainer_spec(config, plan), *shape).result()
    compare(trainer_memory(config, plan.dtype, 1, gpu=False), measured)


def peak_of_a_rank(spec: TrainerSpec, *shape: int) -> int:
    return MeasuredTrainer(spec, RankSpec()).peak(*shape)


def compare(planned: Any, measured: int) -> None:
    found = Measured("trainer 0", planned, measured)
    print(f"{planned.moment}: planned {planned.tensors:,}, measured {measured:,}, {found.off:+.1%}", dict(planned.terms))
    assert found.agrees
