"""A GRPO step against trl.GRPOTrainer: 64 completions of 32 tokens on a CPU, 512 of 128 on a GPU.

Same prompts, lengths, dtype, LoRA, reward, optimizer and loss. Ours is the wall time of a step over engines, a trainer
and a reward process, the new policy in the engines included; engines and trainer compute in turn. TRL's is the time from
`on_step_begin` to `on_step_end` of its own `train()` in the driver's process, with as many threads; its gradient
checkpointing, which trades time for memory, is off. On a CPU it generates with transformers, since its vLLM mode needs a
GPU; on a GPU with vLLM in its own process. Of the CUTS of its batch, the fastest one is taken. Our step is run from its
`on_step_begin`, before its clock starts, so the two take turns.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback

from actors import device, hub, model
from actors.engine import RolloutEngine
from actors.trainer import Trainer
from tests.benchmarks import common
from tests.benchmarks.common import LORA, MODEL, STEP
from tests.benchmarks.results import Row
from tests.benchmarks.step import LEARNING_RATE, Loop

# completions per forward pass, passes per step
CUTS = ((64, 8),) if device.has_gpu() else ((16, 4), (64, 1))
TRL_MEMORY = 0.2  # of the GPU, for TRL's own vLLM
TRIAL_STEPS = 2  # the first one loads kernels, which may take longer than a step


def run(pairs: int) -> list[Row]:
    size, passes = min(CUTS, key=lambda cut: min(_trl_steps(cut, TRIAL_STEPS))) if len(CUTS) > 1 else CUTS[0]
    with common.session():
        loop = Loop(STEP, RolloutEngine, Trainer)
        ours: list[float] = []
        step = common.wall(loop.step)
        theirs = _trl_steps((size, passes), 1 + pairs, before=lambda: ours.append(step()))
    peer = f"trl.GRPOTrainer, {size} x {passes}"
    what = f"GRPO step, {STEP.prompts * STEP.completions} completions of {STEP.tokens} tokens"
    return [Row(what, peer, tuple(ours[1:]), tuple(theirs[1:]), reach=4 if device.has_gpu() else 10)]


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Times optimizer steps, and calls `before` ahead of each."""

    def __init__(self, before: Callable[[], None] | None) -> None:
        self.before = before
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self.before:
            self.before()
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def _reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    if any(len(ids) != STEP.tokens for ids in completion_ids):
        raise RuntimeError(f"TRL sampled completions of other lengths than {STEP.tokens} tokens")
    return common.reward(completions)


def _trl_steps(cut: tuple[int, int], steps: int, before: Callable[[], None] | None = None) -> list[float]:
    """Seconds of each of TRL's optimizer steps."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    clock = _Clock(before)
    gpu = device.has_gpu()
    with tempfile.TemporaryDirectory() as folder:
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
        )
        trainer = GRPOTrainer(
            model=hub.resolve(MODEL.name),
            reward_funcs=_reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": messages} for messages in STEP.messages()]),
            peft_config=model.peft_config(LORA),
            callbacks=[clock],
        )
        trainer.train()
    return clock.seconds
