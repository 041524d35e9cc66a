"""A step of SFT and of DPO with LoRA, against TRL's trainers alone and against a bare PyTorch loop.

Ours is a dataset job as a person runs it: rows prepared by Ray Data, TRL's trainer in a worker of Ray Train, records on
their way to the driver. TRL's side is its own trainer in a process of its own, with the same arguments; it takes SFT rows
packed as ours are, and pairs as conversations. The bare loop is forward pass, loss, backward pass and AdamW on the batch
that TRL's collator makes, ready before the clock starts, with no record of anything.

A step takes all rows at once, so every step of every side computes the same tokens. The three sides take turns, one step
each; a step's time is from the end of the one before to its own end, so loading its batch is in it and waiting for the turn
is not. The first step of each side is warm-up, and the last is not counted. "until the first step" is what came before: on
our side starting Ray, preparing rows and starting Ray Train; on each side loading libraries and model. The sides started
one after the other.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import TrainerCallback

from actors import dataset_loop, device, hub, model
from actors.dataset_loop import dataset_of
from actors.specs import DatasetTrainSpec
from orchestrator import checkpoints, cluster, dataset_job
from orchestrator.dataset_plan import make_dataset_plan
from orchestrator.display import DATASET_COLUMNS, Display
from tests.benchmarks import common, conversations
from tests.benchmarks.common import LORA, MODEL
from tests.benchmarks.results import Row

SIDES = ("bare", "trl", "ours")  # in the order in which they start
# method: (rows of a step, keys of its job); SFT's rows are documents, of which several share a row of the model
METHODS: dict[str, tuple[Iterator[dict[str, Any]], dict[str, Any]]] = {
    "SFT": (conversations.conversations(12), {"sample_packing": True}),
    "DPO": (conversations.pairs(6), {"rl": "dpo"}),
}


class Turns:
    """Lets one side compute at a time, and keeps its times. An actor; no side begins before all have arrived."""

    def __init__(self) -> None:
        self.arrived: dict[str, float] = {}  # time.time()
        self.seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        self.done = 0
        self.changed = asyncio.Condition()

    async def take(self, side: str, seconds: float | None, last: bool) -> None:
        """Ends a side's turn, unless it is its first, and returns when its next one begins, if there is one."""
        async with self.changed:
            if seconds is None:
                self.arrived[side] = time.time()
            else:
                self.seconds[side].append(seconds)
                self.done += 1
            self.changed.notify_all()
            await self.changed.wait_for(lambda: last or self._is_next(side))

    def _is_next(self, side: str) -> bool:
        return len(self.arrived) == len(SIDES) and SIDES[self.done % len(SIDES)] == side

    async def arrival(self, side: str) -> float:
        """When a side was ready for its first step; waits for it."""
        async with self.changed:
            await self.changed.wait_for(lambda: side in self.arrived)
            return self.arrived[side]

    async def times(self) -> dict[str, list[float]]:
        """Seconds of each step, by side."""
        return self.seconds


class Turn:
    """One side's clock."""

    def __init__(self, turns: Any, side: str) -> None:
        self.turns = turns
        self.side = side
        self.began: float | None = None

    def next(self, last: bool = False) -> None:
        """Ends a step, and waits until the next may begin, unless this was the last one."""
        seconds = None if self.began is None else time.perf_counter() - self.began
        ray.get(self.turns.take.remote(self.side, seconds, last))
        self.began = time.perf_counter()


def clock(turns: Any, side: str) -> Any:
    """The same as a callback of transformers."""

    class Clock(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.turn = Turn(turns, side)

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.turn.next()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.turn.next(last=state.global_step == state.max_steps)

    return Clock()


def timed_train_loop(config: dict[str, Any], turns: Any) -> None:
    """Our train loop with a clock in its trainer; runs in the worker of Ray Train."""
    build = dataset_loop.build_trainer

    def build_timed(spec: DatasetTrainSpec, reports: Any) -> Any:
        trainer = build(spec, reports)
        trainer.add_callback(clock(turns, "ours"))
        return trainer

    dataset_loop.build_trainer = build_timed
    dataset_loop.train_loop(config)


class Peer:
    """A side in a process of its own."""

    def trl(self, method: str, spec: DatasetTrainSpec, file: str, turns: Any) -> None:
        """TRL's trainer alone."""
        trainer = _trl_trainer(method, spec, file)
        trainer.add_callback(clock(turns, "trl"))
        trainer.train()

    def bare(self, method: str, spec: DatasetTrainSpec, file: str, turns: Any) -> None:
        """Forward pass, loss, backward pass and AdamW, on the batch of TRL's collator."""
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        (batch,) = list(_trl_trainer(method, spec, file).get_train_dataloader())
        base = AutoModelForCausalLM.from_pretrained(hub.resolve(MODEL.name), dtype=MODEL.dtype).to(device.device())
        policy = get_peft_model(base, model.peft_config(LORA)).train()
        optimizer = torch.optim.AdamW((p for p in policy.parameters() if p.requires_grad), fused=True)
        loss_of = {"SFT": _sft_loss, "DPO": _dpo_loss}[method]
        turn = Turn(turns, "bare")
        turn.next()
        steps = int(str(spec.arguments["max_steps"]))
        for step in range(1, 1 + steps):
            with torch.autocast(device.device().type, torch.bfloat16, enabled=MODEL.dtype == "bfloat16"):
                loss = loss_of(policy, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            float(loss)  # waits for the device
            turn.next(last=step == steps)


def _trl_trainer(method: str, spec: DatasetTrainSpec, file: str) -> Any:
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    folder = tempfile.mkdtemp()
    given = {**spec.arguments, "output_dir": folder, "max_length": None, "model_init_kwargs": {"dtype": MODEL.dtype}}
    shared = {
        "model": hub.resolve(MODEL.name),
        "processing_class": AutoTokenizer.from_pretrained(hub.resolve(MODEL.name)),
        "peft_config": model.peft_config(LORA),
    }
    if method == "SFT":
        given |= {"padding_free": True, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return SFTTrainer(args=SFTConfig(**given), train_dataset=dataset_of(spec.train_files), **shared)
    rows = load_dataset("json", data_files=file, split="train", cache_dir=folder)
    rows = rows.map(
        lambda row: {"prompt": row["messages"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]},
        remove_columns=["messages"],
    )
    return DPOTrainer(args=DPOConfig(**given), train_dataset=rows, **shared)


def _sft_loss(policy: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of the trained tokens; their logits alone are computed."""
    labels_BT = batch["labels"][:, 1:]
    logits_KV = _logits(policy, batch, labels_BT != -100)
    return torch.nn.functional.cross_entropy(logits_KV.float(), labels_BT[labels_BT != -100])


def _dpo_loss(policy: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """-log sigmoid of beta times the difference of the two log ratios (arXiv:2305.18290, equation 7)."""
    mask_BT = batch["completion_mask"][:, 1:] != 0
    ids_K = batch["input_ids"][:, 1:][mask_BT]
    row_of_K = mask_BT.nonzero()[:, 0]

    def logprobs_B() -> torch.Tensor:
        logprobs_K = -torch.nn.functional.cross_entropy(_logits(policy, batch, mask_BT).float(), ids_K, reduction="none")
        return torch.zeros(len(mask_BT)).index_add(0, row_of_K, logprobs_K)

    ratios_B = logprobs_B()
    with torch.no_grad(), policy.disable_adapter():
        ratios_B = ratios_B - logprobs_B()
    chosen, rejected = ratios_B.chunk(2)
    return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()


def _logits(policy: Any, batch: dict[str, torch.Tensor], mask_BT: torch.Tensor) -> torch.Tensor:
    """Logits that predict the tokens in the mask, [tokens, vocabulary]. mask_BT: of all tokens but the first."""
    causal = policy.get_base_model()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return causal.lm_head(causal.model(**inputs, use_cache=False).last_hidden_state[:, :-1][mask_BT])


def run(pairs: int) -> list[Row]:
    return [row for method in METHODS for row in _compare(method, pairs)]


def _compare(method: str, pairs: int) -> list[Row]:
    display = Display()
    display.columns = DATASET_COLUMNS[METHODS[method][1].get("rl")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows, keys = METHODS[method]
        file = conversations.write(folder / "rows.jsonl", rows)
        config = conversations.job(folder, file, **keys)
        before = time.time()
        with (
            common.session(),
            checkpoints.claimed(Path(config.output_dir)) as marker,
            dataset_job.prepared_rows(config, Path(config.output_dir), display) as prepared,
        ):
            ours_startup = time.time() - before
            # The first is warm-up, and beside the last one the other sides end.
            config = replace(config, micro_batch_size=prepared.train.rows, max_steps=1 + pairs + 1)
            plan = make_dataset_plan(config, cluster.nodes(), MODEL.dtype)
            spec = dataset_job.train_spec(config, plan, prepared, None)
            turns = common.start(Turns)
            startup: dict[str, float] = {}
            running = []
            for side in ("bare", "trl"):
                before = time.time()
                peer = common.start(Peer)
                running.append((peer, getattr(peer, side).remote(method, spec, str(file), turns)))
                startup[side] = _arrival(turns, side, running[-1][1]) - before
            before = time.time()
            job = dataset_job._Training(config, plan, prepared, Path(config.output_dir), display)
            with _train_loop(lambda given: timed_train_loop(given, turns)):
                job.run(None, 0, marker)
            startup["ours"] = ours_startup + ray.get(turns.arrival.remote("ours")) - before
            ray.get([ref for _, ref in running])
            times = {side: tuple(seconds[1 : 1 + pairs]) for side, seconds in ray.get(turns.times.remote()).items()}
    tokens = prepared.train.tokens
    trl = f"trl.{method}Trainer"
    return [
        Row(f"{method} step", trl, times["ours"], times["trl"], reach=1.0, tokens=tokens),
        Row(f"{method} step", "forward, backward, AdamW", times["ours"], times["bare"], reach=0.98, tokens=tokens),
        Row(f"{method} until the first step", trl, (startup["ours"],), (startup["trl"],), "cost"),
    ]


def _arrival(turns: Any, side: str, ref: Any) -> float:
    """When a side that was started is ready; raises what it raised instead."""
    arrival = turns.arrival.remote(side)
    first, _ = ray.wait([arrival, ref], num_returns=1)
    ray.get(first)
    return float(ray.get(arrival))


@contextmanager
def _train_loop(timed: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """Within the block, what dataset jobs give to Ray Train."""
    before = dataset_job.train_loop
    dataset_job.train_loop = timed
    try:
        yield
    finally:
        dataset_job.train_loop = before
