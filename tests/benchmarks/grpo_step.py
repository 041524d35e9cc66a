"""A GRPO step against trl.GRPOTrainer: 64 completions of 32 tokens on a CPU, 512 of 128 on a GPU.

Same prompts, lengths, dtype, LoRA, reward, optimizer and loss. Ours is the wall time of a step over engines, a trainer
and a reward process, the new policy in the engines included; engines and trainer compute in turn. TRL's is the time from
`on_step_begin` to `on_step_end` of its own `train()` in a process of its own, with as many threads; its gradient
checkpointing, which trades time for memory, is off. On a CPU it generates with transformers, since its vLLM mode needs a
GPU; on a GPU with vLLM in its own process. Of several CUTS of its batch, the fastest one is taken.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from queue import Queue
from typing import Any

import ray
from transformers import TrainerCallback

from actors import device, hub, model
from actors.engine import RolloutEngine
from actors.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.common import CORES, LORA, MODEL, STEP
from tests.benchmarks.results import Row
from tests.benchmarks.step import LEARNING_RATE, Loop

# Completions per forward pass, passes per step. On an H100 64 x 8 was slower, alone on it; 256 x 2 has no room beside ours.
CUTS = ((128, 4),) if device.has_gpu() else ((16, 4), (64, 1))
TRL_MEMORY = 0.1  # of a GPU, for TRL's own vLLM: all completions have room at once
TRIAL_STEPS = 2  # the first one loads kernels, which may take longer than a step


def run(pairs: int) -> list[Row]:
    with common.session():
        cut = min(CUTS, key=_trial) if len(CUTS) > 1 else CUTS[0]
        loop = Loop(STEP, RolloutEngine, Trainer)
        ours, theirs = common.in_turn(pairs, common.wall(loop.step), start_trl(cut, 1 + pairs))
    what = f"GRPO step, {STEP.prompts * STEP.completions} completions of {STEP.tokens} tokens"
    return [Row(what, f"trl.GRPOTrainer, {cut[0]} x {cut[1]}", ours, theirs, reach=4 if device.has_gpu() else 10)]


def _trial(cut: tuple[int, int]) -> float:
    step = start_trl(cut, TRIAL_STEPS)
    return min(step() for _ in range(TRIAL_STEPS))


def start_trl(cut: tuple[int, int], steps: int, **keys: Any) -> Callable[[], float]:
    """TRL's side of `in_turn`, ready for its first step. keys: of GRPOConfig, besides those that every figure has."""
    trainer = common.start(TrlTrainer, cut, steps, keys, threads=CORES)
    return lambda: float(ray.get(trainer.step.remote()))


class TrlTrainer:
    """trl.GRPOTrainer, a step at a time: its own `train()` runs in a thread and waits before each."""

    def __init__(self, cut: tuple[int, int], steps: int, keys: dict[str, Any]) -> None:
        self.clock = _Clock()
        threading.Thread(target=self._train, args=(cut, steps, keys), daemon=True).start()
        self._said()

    def step(self) -> float:
        """Seconds of the next step."""
        self.clock.begin.put(None)
        return self._said()

    def _said(self) -> float:
        said = self.clock.said.get()
        if isinstance(said, BaseException):
            raise said
        return said

    def _train(self, cut: tuple[int, int], steps: int, keys: dict[str, Any]) -> None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                _trl_trainer(cut, steps, folder, self.clock, keys).train()
        except BaseException as error:  # told to who waits for the step
            self.clock.said.put(error)


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Times optimizer steps, each of which waits until it may begin."""

    def __init__(self) -> None:
        self.begin: Queue[None] = Queue()
        self.said: Queue[float | BaseException] = Queue()  # seconds of a step; first of all, of nothing
        self.started = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.said.put(0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin.get()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.said.put(time.perf_counter() - self.started)


def _reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    if any(len(ids) != STEP.tokens for ids in completion_ids):
        raise RuntimeError(f"TRL sampled completions of other lengths than {STEP.tokens} tokens")
    return common.reward(completions)


def _trl_trainer(cut: tuple[int, int], steps: int, folder: str, clock: _Clock, keys: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    gpu = device.has_gpu()
    config = GRPOConfig(
        output_dir=folder,
        model_init_kwargs={"dtype": MODEL.dtype},
        per_device_train_batch_size=cut[0],
        gradient_accumulation_steps=cut[1],
        num_generations=STEP.completions,
        max_completion_length=STEP.tokens,
        generation_kwargs={"min_tokens" if gpu else "min_new_tokens": STEP.tokens},
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=steps,
        use_vllm=gpu,
        vllm_gpu_memory_utilization=TRL_MEMORY,
        vllm_max_model_length=64 + STEP.tokens,
        use_cpu=not gpu,
        bf16=MODEL.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **keys,
    )
    return GRPOTrainer(
        model=hub.resolve(MODEL.name),
        reward_funcs=_reward,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in STEP.messages()]),
        peft_config=model.peft_config(LORA),
        callbacks=[clock],
    )
