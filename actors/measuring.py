"""Actors that measure what others need: each does a job's own work for two steps, on rows of chance, and tells its peak.

After the first step the optimizer has its states, so the second one is as all others are. A new role is a class here.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor

from actors import attention, device, ranks
from actors.dataset_loop import build_trainer
from actors.engine import RolloutEngine
from actors.specs import DatasetTrainSpec, EngineSpec, RankSpec, TrainerSpec
from actors.trainer import Trainer
from actors.types import RolloutGroup

STEPS = 2
WORDS = (10, 1000)  # ids that every vocabulary has
PROBE = tuple(range(*WORDS))[:32]


def random_ids(draw: np.random.Generator, count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return draw.integers(*WORDS, count, dtype=np.int32)


class MeasuredTrainer:
    """A rank of an online job's trainer."""

    def __init__(self, spec: TrainerSpec, rank: RankSpec) -> None:
        self.trainer = Trainer(spec, rank)
        self.trainer.set_probe(PROBE)

    def peak(self, groups: int, prompt: int, completions: int, length: int) -> int:
        """Bytes. Of so many groups a step, each a prompt of so many tokens and so many completions of a length."""
        draw = np.random.default_rng(0)
        rollouts = [_group(draw, prompt, completions, length) for _ in range(groups)]
        advantages = [[1.0 - 2.0 * (i % 2) for i in range(completions)] for _ in rollouts]
        with device.measured() as peak:
            for _ in range(STEPS):
                self.trainer.train(advantages, *rollouts)
                for _ in self.trainer.publish():
                    pass
        return peak()


def _group(draw: np.random.Generator, prompt: int, completions: int, length: int) -> RolloutGroup:
    return RolloutGroup(
        policy_version=0,
        prompt_ids=random_ids(draw, prompt),
        completion_ids=tuple(random_ids(draw, length) for _ in range(completions)),
        logprobs=(np.full(length, -5.0, dtype=np.float32),) * completions,
        truncated=(False,) * completions,
        texts=("",) * completions,
    )


class MeasuredWorker:
    """A worker of a dataset job, without Ray Train."""

    def __init__(self, spec: DatasetTrainSpec, rank: RankSpec, reports: Any) -> None:
        """reports: handle of an actors.dataset_loop.Reports."""
        device.set_threads(spec.threads)
        if rank.world > 1 or {"fsdp", "deepspeed"} & spec.arguments.keys():
            ranks.meet(rank)
        self.spec = spec
        self.reports = reports

    def peak(self, rows: int, length: int) -> int:
        """Bytes. Of so many rows a step, of a length; every other one is shorter by a token, so that there is padding."""
        draw = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            made = [_row(self.spec, draw, index, length) for index in range(rows)]
            Dataset.from_list(made).save_to_disk(f"{folder}/rows", num_shards=1)
            arguments = {**self.spec.arguments, "max_steps": STEPS, "output_dir": folder}
            spec = replace(
                self.spec, arguments=arguments, train_files=(f"{folder}/rows/data-00000-of-00001.arrow",), output_dir=folder
            )
            trainer = build_trainer(spec, self.reports)
            with device.measured() as peak:
                trainer.train()
            return peak()


def _row(spec: DatasetTrainSpec, draw: np.random.Generator, index: int, length: int) -> Mapping[str, Any]:
    """A prepared row of the method, whose columns actors/formats name."""
    shorter = length - index % 2
    prompt = length // 2
    if spec.method == "sft":
        ids = random_ids(draw, length if spec.packed else shorter)
        return {"input_ids": ids, "labels": ids, **({"seq_lengths": attention.uneven(length)} if spec.packed else {})}
    if spec.method == "kto":
        return _answers(draw, prompt, {"completion_ids": shorter}) | {"label": index % 2 == 0}
    return _answers(draw, prompt, {"chosen_ids": length, "rejected_ids": shorter})


def _answers(draw: np.random.Generator, prompt: int, lengths: Mapping[str, int]) -> dict[str, Any]:
    """lengths: by column, of prompt and answer together."""
    answers = {column: random_ids(draw, length - prompt) for column, length in lengths.items()}
    return {"prompt_ids": random_ids(draw, prompt), **answers}


class MeasuredEngine:
    """An engine: what it holds once it is ready."""

    def __init__(self, spec: EngineSpec) -> None:
        self.packed = 0  # bytes of weights that are no tensors any more
        if not device.has_gpu():
            self._count_packed()
        self.engine = RolloutEngine(spec, PROBE)

    def _count_packed(self) -> None:
        """On most CPUs vLLM gives weights to oneDNN, which keeps as many bytes in an order of its own."""
        from vllm import _custom_ops

        pack = _custom_ops.create_onednn_mm

        def counted(weight: Tensor, *args: Any) -> Any:
            packed = pack(weight, *args)
            self.packed += weight.nbytes
            return packed

        _custom_ops.create_onednn_mm = counted

    async def peak(self) -> int:
        """Bytes: its weights, and the KV cache."""
        await self.engine.probe_logprobs()
        return device.tensor_bytes() + self.packed
