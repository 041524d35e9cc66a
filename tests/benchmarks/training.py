"""Steps of SFT, packed, and of DPO as a job has them, against TRL's trainer alone and against a plain PyTorch loop.

Ours is `eagleray run` with one worker on a Ray that it starts: rows by Ray Data, steps in Ray Train. TRL's trainer and the
loop have a process of their own, with as many threads. Model, LoRA, rows, passes of a step, packing (best fit, no document
cut) and precision are the same; TRL prepares its rows itself, the loop finds its batches made. The sides take turns, each
time from nothing; what counts are the steps of all epochs after the first. A step ends when its weights have changed;
fetching its batch is not in it, on no side. All sides see the same tokens in an epoch, if in other batches; padding and DPO's
reference come on top, on all sides.
"""

import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from actors import device, hub, model
from tests.benchmarks import common, conversations
from tests.benchmarks.common import LORA, MODEL
from tests.benchmarks.results import Row
from tests.benchmarks.workers import train

WORDS = (100, 400) if device.has_gpu() else (20, 80)  # of an answer
ROWS = {"SFT": 256, "DPO": 128} if device.has_gpu() else {"SFT": 16, "DPO": 8}
AT_ONCE = {"SFT": 4, "DPO": 16} if device.has_gpu() else {"SFT": 1, "DPO": 4}  # packed rows, or pairs, in a pass
LENGTH = 2048 if device.has_gpu() else 512
EPOCHS = 3  # the first one is a warm-up
BETA = 0.1
Batch = dict[str, torch.Tensor]


def run(pairs: int) -> list[Row]:
    rows = []
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for method, count in ROWS.items():
            made = conversations.conversations(count, WORDS) if method == "SFT" else conversations.pairs(count, WORDS)
            file = conversations.write(folder / f"{method}.jsonl", made)
            tokens: list[int] = []

            def ours(method: str = method, file: Path = file, tokens: list[int] = tokens) -> float:
                seconds, _, of_an_epoch = train(alone, folder, file, **_keys(method, file))
                tokens.append((EPOCHS - 1) * of_an_epoch)
                return _counted(seconds)

            def peer(side: str, method: str = method, file: Path = file) -> Callable[[], float]:
                command = [sys.executable, "-m", __name__, side, method, str(file)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(common.CORES)}
                return lambda: float(subprocess.check_output(command, env=environment).split()[-1])

            ours_s, trl_s, loop_s = common.in_turn(pairs, ours, peer("trl"), peer("loop"))
            what = f"{method}, packed" if method == "SFT" else method
            rows.append(Row(what, f"trl.{method}Trainer", ours_s, trl_s, reach=1.0, tokens=tokens[0]))
            rows.append(Row(what, "a PyTorch loop", ours_s, loop_s, reach=0.98, tokens=tokens[0]))
    return rows


def _keys(method: str, file: Path) -> dict[str, Any]:
    if method == "SFT":
        of_method: dict[str, Any] = {"sample_packing": True}
    else:
        of_method = {"rl": "dpo", "rl_beta": BETA, "datasets": [{"path": str(file), "type": "chat_template.default"}]}
    return {"sequence_len": LENGTH, "num_epochs": EPOCHS, "micro_batch_size": AT_ONCE[method], **of_method}


def _counted(seconds: Sequence[float]) -> float:
    """Of all steps, those after the first epoch."""
    return sum(seconds[len(seconds) // EPOCHS :])


def of_trl(method: str, rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of the steps of TRL's trainer."""
    import trl
    from datasets import Dataset

    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "model_init_kwargs": {"dtype": MODEL.dtype},
            "per_device_train_batch_size": AT_ONCE[method],
            "gradient_accumulation_steps": 1,
            "num_train_epochs": EPOCHS,
            "max_length": LENGTH,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "use_cpu": not device.has_gpu(),
            "bf16": MODEL.dtype == "bfloat16",
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
        }
        of_method: dict[str, Any] = {"packing": True} if method == "SFT" else {"beta": BETA}
        clock = _clock()
        getattr(trl, f"{method}Trainer")(
            model=hub.resolve(MODEL.name),
            args=getattr(trl, f"{method}Config")(**arguments, **of_method),
            train_dataset=Dataset.from_list(rows),
            peft_config=model.peft_config(LORA),
            callbacks=[clock],
        ).train()
        return list(clock.seconds)


def _clock() -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Times optimizer steps as our jobs do."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            device.wait()
            self.seconds.append(time.perf_counter() - self.began)

    return Clock()


def of_loop(method: str, rows: list[dict[str, Any]]) -> list[float]:
    """Seconds of the steps of a loop that does what the method is, and nothing else."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = torch.device("cuda" if device.has_gpu() else "cpu")
    name = hub.resolve(MODEL.name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    loaded = AutoModelForCausalLM.from_pretrained(name, dtype=MODEL.dtype).to(where)
    policy = get_peft_model(loaded, model.peft_config(LORA)).train()
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    batches = list(_packed(rows, tokenizer) if method == "SFT" else _paired(rows, tokenizer))
    loss_of = _sft_loss if method == "SFT" else _dpo_loss
    seconds = []
    for epoch in range(EPOCHS):
        for batch in random.Random(epoch).sample(batches, len(batches)):
            here = {key: values.to(where) for key, values in batch.items()}
            began = time.perf_counter()
            with torch.autocast(where.type, torch.bfloat16, enabled=MODEL.dtype == "bfloat16"):
                loss = loss_of(policy, here)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            device.wait()
            seconds.append(time.perf_counter() - began)
            if not math.isfinite(loss.item()):
                raise RuntimeError(f"the loop's loss is {loss.item()}")
    return seconds


def _packed(rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[Batch]:
    """Documents side by side in one row, told apart by positions that begin anew."""
    from datasets import Dataset
    from trl import pack_dataset

    documents = [_tokenized(tokenizer, row["prompt"], row["completion"]) for row in rows]
    columns = {"input_ids": [p + c for p, c in documents], "labels": [[-100] * len(p) + c for p, c in documents]}
    packs = list(pack_dataset(Dataset.from_dict(columns), LENGTH, "bfd"))
    for start in range(0, len(packs), AT_ONCE["SFT"]):
        chosen = packs[start : start + AT_ONCE["SFT"]]
        row = {key: torch.tensor([[value for pack in chosen for value in pack[key]]]) for key in columns}
        lengths = [length for pack in chosen for length in pack["seq_lengths"]]
        yield {**row, "position_ids": torch.cat([torch.arange(length) for length in lengths])[None]}


def _sft_loss(policy: Any, batch: Batch) -> torch.Tensor:
    loss: torch.Tensor = policy(**batch, use_cache=False).loss
    return loss


def _paired(rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[Batch]:
    """Chosen answers above the rejected ones, padded to the longest."""
    for start in range(0, len(rows), AT_ONCE["DPO"]):
        chosen = rows[start : start + AT_ONCE["DPO"]]
        texts = [_tokenized(tokenizer, row["prompt"], row[side]) for side in ("chosen", "rejected") for row in chosen]
        longest = max(len(p) + len(c) for p, c in texts)
        ids, mask, answer = (torch.zeros(len(texts), longest, dtype=torch.long) for _ in range(3))
        for i, (p, c) in enumerate(texts):
            ids[i, : len(p) + len(c)] = torch.tensor(p + c)
            mask[i, : len(p) + len(c)] = 1
            answer[i, len(p) : len(p) + len(c)] = 1
        yield {"input_ids": ids, "attention_mask": mask, "answer": answer}


def _dpo_loss(policy: Any, batch: Batch) -> torch.Tensor:
    """Equation 7 of arXiv:2305.18290."""

    def logp() -> torch.Tensor:  # [2 x pairs], of whole answers
        logits = policy(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        of_tokens = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
        )
        return -(of_tokens * batch["answer"][:, 1:]).sum(1)

    with torch.no_grad(), policy.disable_adapter():
        reference = logp()
    chosen, rejected = (logp() - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _tokenized(tokenizer: Any, prompt: list[dict[str, str]], answer: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its answer."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*prompt, *answer], return_dict=True)["input_ids"]
    return before, whole[len(before) :]


def _as_trl_has_it(row: dict[str, Any]) -> dict[str, Any]:
    if "chosen" in row:
        return {"prompt": row["messages"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}
    return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}


def main(side: str, method: str, file: str) -> None:
    rows = [_as_trl_has_it(json.loads(line)) for line in Path(file).read_text(encoding="utf-8").splitlines()]
    print(_counted({"trl": of_trl, "loop": of_loop}[side](method, rows)))


if __name__ == "__main__":
    main(*sys.argv[1:])
