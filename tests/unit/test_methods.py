"""The methods beside TRL's own trainers: the same rows in the same order give the same losses.

TRL gets the rows of the recipes as a person would give them to it, conversations or text, and prepares them itself; ours
gets what actors/formats made of the same rows. The model is tiny and random, the tokenizer and the rows are real.
"""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerState,
)
from transformers.trainer import Trainer as HfTrainer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer import utils

from actors import hub, model
from actors.dataset_loop import model_init_arguments, save_result, watchdog
from actors.errors import ActorError
from actors.formats.base import FormatSpec
from actors.formats.kto import build_judged
from actors.formats.preference import build_pairs
from actors.formats.reward import build_reward_pairs
from actors.formats.sft import build_sft
from actors.methods import METHODS
from actors.methods.base import Inputs
from actors.optimizers import load_optimizer, load_schedule, save_optimizer
from actors.reward_model import ensure_reward_model
from actors.specs import DatasetTrainSpec, LoraSpec, ModelSpec, RewardModelSpec
from tests.tiny import SMOLLM2, save_smollm2_llama, training_arguments

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[2]
STEPS = 20
BATCH = 2
ROWS = STEPS * BATCH
LORA = LoraSpec(r=4, alpha=8)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2.name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    return save_smollm2_llama(tmp_path_factory.mktemp("llama"), **shape)


def rows_of(name: str) -> list[dict[str, Any]]:
    with (ROOT / "configs" / name).open(encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, ROWS)]


def arguments(out: Path, **changes: Any) -> dict[str, Any]:
    return training_arguments(out, **{"per_device_train_batch_size": BATCH, "max_steps": STEPS} | changes)


def losses(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_of_ours(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of a trainer whose head computes without TRL's kernel (actors/head.py)."""
    with monkeypatch.context() as patch:
        patch.setattr(utils, "_ChunkedLogProbFunction", None)
        return losses(trainer)


def ours(
    method: str,
    folder: str,
    tokenizer: Any,
    rows: list[Any],
    given: dict[str, Any],
    packed: bool = False,
    lora: LoraSpec | None = LORA,
) -> Any:
    spec = DatasetTrainSpec(
        method, ModelSpec(folder, "float32"), lora, (), (), packed=packed, rows_per_step=BATCH, output_dir="", job={},
        arguments={},
    )
    task = "SEQ_CLS" if method == "reward_trainer" else "CAUSAL_LM"
    return METHODS[method](
        Inputs(
            model=folder,
            model_init=model_init_arguments(spec),
            tokenizer=tokenizer,
            peft_config=model.peft_config(lora, task) if lora else None,
            train=Dataset.from_list(rows),
            held_out=None,
            arguments=given,
            packed=packed,
        )
    )


def as_prompt_and_answers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"prompt": row["messages"], "chosen": [row["chosen"]], "rejected": [row["rejected"]]}


def test_sft(folder: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": row["question"], "chosen": row["chosen"]} for row in rows_of("orpo/howto-train.jsonl")]
    format_text = "{instruction}\n"
    fields = {"field_instruction": "question", "field_output": "chosen"}
    encode = build_sft(FormatSpec(type={**fields, "format": format_text, "no_input_format": format_text}), tokenizer)
    trainer = ours("sft", folder, tokenizer, [encode(row) for row in rows], arguments(tmp_path))
    peer = SFTTrainer(
        model=folder,
        args=SFTConfig(model_init_kwargs={"dtype": "float32"}, **arguments(tmp_path)),
        train_dataset=Dataset.from_list([{"prompt": f"{row['question']}\n", "completion": row["chosen"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=model.peft_config(LORA),
    )
    compare(losses_of_ours(trainer, monkeypatch), losses(peer))


@pytest.mark.parametrize("loss_type", ["sigmoid", pytest.param("ipo", marks=pytest.mark.slow)])
def test_dpo(folder: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss_type: str) -> None:
    rows = rows_of("dpo/direct-train.jsonl")
    encode = build_pairs(FormatSpec(type="chat_template.default"), tokenizer)
    given = arguments(tmp_path, beta=0.1, loss_type=loss_type)
    trainer = ours("dpo", folder, tokenizer, [encode(row) for row in rows], given)
    peer = DPOTrainer(
        model=folder,
        args=DPOConfig(model_init_kwargs={"dtype": "float32"}, **given),
        train_dataset=Dataset.from_list([as_prompt_and_answers(row) for row in rows]),
        processing_class=tokenizer,
        peft_config=model.peft_config(LORA),
    )
    compare(losses_of_ours(trainer, monkeypatch), losses(peer))


def test_kto(folder: str, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of("kto/notes-train.jsonl")
    encode = build_judged(FormatSpec(type="chat_template.default"), tokenizer)
    given = arguments(tmp_path, beta=0.1, desirable_weight=1.0, undesirable_weight=0.8)
    # TRL pairs prompts with other rows' answers before training, and so keeps the order of the rows; ours shuffles.
    monkeypatch.setattr(HfTrainer, "_get_train_sampler", lambda self, dataset=None: SequentialSampler(self.train_dataset))
    trainer = ours("kto", folder, tokenizer, [encode(row) for row in rows], given)
    peer = KTOTrainer(
        model=folder,
        args=KTOConfig(model_init_kwargs={"dtype": "float32"}, **given),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=model.peft_config(LORA),
    )
    compare(losses_of_ours(trainer, monkeypatch), losses(peer))


def test_orpo(folder: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = None  # ORPOTrainer writes one in front, also where the tokenizer does not
    rows = [
        {"prompt": f"{row['question']}\n", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in rows_of("orpo/howto-train.jsonl")
    ]
    encode = build_pairs(FormatSpec(type="passthrough"), tokenizer)
    given = arguments(tmp_path, beta=0.1, max_length=256)
    trainer = ours("orpo", folder, tokenizer, [encode(row) for row in rows], given)
    peer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=ORPOConfig(**given),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=model.peft_config(LORA),
    )
    compare(losses(trainer), losses(peer))


def test_reward(folder: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = rows_of("reward/courtesy-train.jsonl")
    encode = build_reward_pairs(FormatSpec(type="bradley_terry.chat_template"), tokenizer)
    given = arguments(tmp_path, center_rewards_coefficient=0.01)
    trainer = ours("reward_trainer", folder, tokenizer, [encode(row) for row in rows], given)

    def turns(row: Mapping[str, Any], side: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return [*system, {"role": "user", "content": row["input"]}, {"role": "assistant", "content": row[side]}]

    peer = RewardTrainer(
        model=folder,
        args=RewardConfig(model_init_kwargs={"dtype": "float32"}, **given),
        train_dataset=Dataset.from_list([{side: turns(row, side) for side in ("chosen", "rejected")} for row in rows]),
        processing_class=tokenizer,
        peft_config=model.peft_config(LORA, "SEQ_CLS"),
    )
    compare(losses(trainer), losses(peer))


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_reward_model_loads_with_the_scores_that_it_was_saved_with(
    folder: str, tokenizer: Any, tmp_path: Path, tuning: str
) -> None:
    rows = rows_of("reward/courtesy-train.jsonl")[: 3 * BATCH]
    encode = build_reward_pairs(FormatSpec(type="bradley_terry.chat_template"), tokenizer)
    lora = LORA if tuning == "lora" else None
    trainer = ours(
        "reward_trainer", folder, tokenizer, [encode(row) for row in rows], arguments(tmp_path, max_steps=3), lora=lora
    )
    trainer.train()
    base = ModelSpec(folder, "float32")
    spec = DatasetTrainSpec(
        "reward_trainer", base, lora, (), (), False, str(tmp_path), rows_per_step=BATCH, job={}, arguments={}
    )
    save_result(trainer, spec)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": row["input"]}], tokenize=False) for row in rows
    ]
    padded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    assert not padded["attention_mask"].all(), "one of them is padded"
    with torch.no_grad():
        expected = trainer.model.eval()(**padded).logits
        # As the README has it; without num_labels for a whole model.
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **({"num_labels": 1} if lora else {}))
        torch.testing.assert_close(loaded.eval()(**padded).logits, expected)
        if lora:
            loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
            torch.testing.assert_close(loaded.eval()(**padded).logits, expected)
    if not lora:
        saved = json.loads((tmp_path / "config.json").read_text())
        assert (loaded.config.num_labels, saved["pad_token_id"]) == (1, tokenizer.pad_token_id)
    ensure_reward_model(RewardModelSpec("it", ModelSpec(str(tmp_path), "float32")), conversational=True)


def compare(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected) == STEPS
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-3, (found, expected)
    assert max(expected) - min(expected) > 1e-2, "nothing was learned, so the comparison shows nothing"


def test_packed_documents_do_not_see_each_other(folder: str, tokenizer: Any, tmp_path: Path) -> None:
    """The logits of each document in a packed row are those that it has alone, with and without a mask for it."""
    encode = build_sft(FormatSpec(type="chat_template"), tokenizer)
    documents = [encode(row) for row in rows_of("sft/tickets-train.jsonl")[:3]]
    packed = {
        "input_ids": [i for d in documents for i in d["input_ids"]],
        "labels": [i for d in documents for i in d["labels"]],
        "seq_lengths": [len(d["input_ids"]) for d in documents],
    }
    reversed_documents = {key: [v for d in documents[::-1] for v in d[key]] for key in ("input_ids", "labels")}
    packs = [packed, {**reversed_documents, "seq_lengths": packed["seq_lengths"][::-1]}]
    trainer = ours("sft", folder, tokenizer, packs, arguments(tmp_path, per_device_train_batch_size=2), packed=True)
    single = {key: values for key, values in packed.items() if key != "seq_lengths"}  # as of eval_sample_packing: false
    assert len(trainer.data_collator([single])["packed"]["blocks"]) == 1
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert "attention_mask" not in batch and batch.pop("labels").shape == (1, 2 * len(packed["input_ids"]))
    with torch.no_grad():
        alone = [trainer.model(input_ids=torch.tensor([d["input_ids"]])).logits[0] for d in documents]
        expected = torch.cat([*alone, *alone[::-1]])
        told = trainer.model(**trainer._prepare_inputs(batch)).logits[0]
        torch.testing.assert_close(told, expected, atol=1e-4, rtol=1e-4)
        trainer.model.set_attn_implementation("sdpa")  # which goes by the positions alone
        torch.testing.assert_close(trainer.model(**batch).logits[0], expected, atol=1e-4, rtol=1e-4)




@pytest.mark.parametrize("name", ["adamw_torch", "adamw_bnb_8bit", "lion_8bit", "paged_adamw_32bit", "adafactor", "sgd"])
def test_an_optimizer_comes_back_from_its_file(tmp_path: Path, name: str) -> None:
    """Two steps, a file, and the third step is the one of the optimizer that was not saved."""
    from transformers import Trainer, TrainingArguments

    def made() -> tuple[Any, Any]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(80, 80, bias=False)  # bitsandbytes quantizes moments of 4096 elements and more
        given = TrainingArguments(output_dir=str(tmp_path), optim=name, learning_rate=1e-2, use_cpu=True, report_to="none")
        cls, options = Trainer.get_optimizer_cls_and_kwargs(given, layer)
        return layer, cls(layer.parameters(), **options)

    def step(layer: Any, optimizer: Any, seed: int) -> None:
        layer.weight.grad = torch.randn(80, 80, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    layer, optimizer = made()
    for seed in (1, 2):
        step(layer, optimizer, seed)
    save_optimizer(optimizer, tmp_path / "optimizer.safetensors")
    resumed_layer, resumed = made()
    resumed_layer.load_state_dict({key: value.clone() for key, value in layer.state_dict().items()})
    load_optimizer(resumed, tmp_path / "optimizer.safetensors")
    for one, other in ((layer, optimizer), (resumed_layer, resumed)):
        step(one, other, 3)
    assert torch.equal(layer.weight, resumed_layer.weight)


def test_a_resumed_job_learns_as_its_own_configuration_says(tmp_path: Path) -> None:
    """Trials of population based training go on from another one's checkpoint with other rates."""
    from transformers import get_scheduler

    def made(rate: float, decay: float) -> tuple[Any, Any]:
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay)
        return optimizer, get_scheduler("linear", optimizer, 0, 10)

    saved, schedule = made(1.0, 0.1)
    for _ in range(4):
        saved.param_groups[0]["params"][0].grad = torch.ones(3)
        saved.step()
        schedule.step()
    save_optimizer(saved, tmp_path / "optimizer.safetensors")
    resumed, other = made(0.5, 0.2)
    load_optimizer(resumed, tmp_path / "optimizer.safetensors")
    load_schedule(other, schedule.state_dict())
    (group,) = resumed.param_groups
    assert group["lr"] == pytest.approx(0.5 * 6 / 10), "the fifth of ten steps, of a rate half as high"
    assert (group["weight_decay"], group["initial_lr"]) == (0.2, 0.5)
    assert resumed.state[group["params"][0]]["step"] == 4
    other.step()
    assert group["lr"] == pytest.approx(0.5 * 5 / 10)


@pytest.mark.parametrize(
    ("losses", "ends_at"),
    [
        ([6.0, 6.0, 6.0], 3),
        ([6.0, 6.0, 5.0, 6.0, 6.0, 5.1], 6),  # 5.0 is not above
        ([6.0, float("nan"), 6.0], 3),
        ([4.0] * 5, None),
    ],
)
def test_the_watchdog_ends_a_job_whose_loss_stays_too_high(losses: list[float], ends_at: int | None) -> None:
    state, one = TrainerState(), watchdog(5.0, 3)
    one.on_log(None, state, None, {"eval_loss": 9.0})

    def follow() -> None:
        for state.global_step, loss in enumerate(losses, 1):
            one.on_log(None, state, None, {"loss": loss})

    if ends_at is None:
        follow()
    else:
        with pytest.raises(ActorError, match=f"was above 5 at 3 records in a row, .* at step {ends_at}; lower learning_rate"):
            follow()
    assert state.global_step == (ends_at or len(losses))
