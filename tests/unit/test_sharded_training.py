"""Models in shards: two processes on gloo learn what one process learns, and go on from a checkpoint as if never stopped."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors import sharding, storage
from actors.methods import METHODS
from actors.methods.base import Inputs
from actors.model import peft_config, quantization
from actors.specs import LoraSpec, ModelSpec
from tests.tiny import save_smollm2_llama, training_arguments

STEPS = 4
# Matrices of whole blocks of bitsandbytes' kernels.
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
MORE = ("sft", "dpo", "orpo")  # methods in mixed precision, on a model whose embeddings are tied
LORA = LoraSpec(r=4, alpha=8)
ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "train_batch_size": "auto",
}
SHARDINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}},
    "fsdp, loaded by rank 0": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}, **ZERO}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}, **ZERO}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}, **ZERO}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its embeddings tied, as SmolLM2's are."""
    path = tmp_path_factory.mktemp("llama")
    save_smollm2_llama(path, tie_word_embeddings=True, **SHAPE)
    return path


def rows_for(method: str) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 40, (count,), generator=generator).tolist()

    rows: list[dict[str, Any]] = []
    for index in range(8 * STEPS):
        if method == "sft":
            tokens = ids(8 + index % 3)
            rows.append({"input_ids": tokens, "labels": tokens})
        elif method == "kto":
            rows.append({"prompt_ids": ids(5), "completion_ids": ids(4), "label": index % 2 == 0})
        else:
            rows.append({"prompt_ids": ids(5), "chosen_ids": ids(4), "rejected_ids": ids(3 + index % 2)})
    return Dataset.from_list(rows)


def train(
    rank: int,
    world: int,
    port: int,
    folder: str,
    out: str,
    method: str,
    lora: bool,
    kind: str,
    resume: str | None,
    quantized: bool,
    mixed: bool,
) -> None:
    """One rank; rank 0 leaves losses and gradient norms in losses.json."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    steps = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 2}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4 // world}
    rate = {"learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    arguments = training_arguments(out, **steps, **batch, **rate, bf16=mixed, **SHARDINGS[kind])
    arguments |= sharding.start(arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model_init: dict[str, Any] = {"dtype": "bfloat16" if mixed else "float32"}
    if method == "reward_trainer":
        model_init["num_labels"] = 1
    if quantized:
        base = ModelSpec(folder, "float32", quantization="nf4", sharded=kind == "fsdp")
        model_init["quantization_config"] = quantization(base)
    task = "SEQ_CLS" if method == "reward_trainer" else "CAUSAL_LM"
    adapter = peft_config(LORA, task) if lora else None
    torch.manual_seed(0)
    trainer = METHODS[method](
        Inputs(folder, model_init, tokenizer, adapter, rows_for(method), None, arguments, packed=False)
    )
    trainer.job, trainer.keep = {}, None
    if quantized:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # as dataset_loop does: TRL makes them bfloat16
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(out)
    if rank == 0:
        sharded = any(hasattr(one, "placements") or hasattr(one, "ds_id") for one in trainer.model.parameters())
        curve = [[entry["loss"], entry["grad_norm"]] for entry in trainer.state.log_history if "loss" in entry]
        Path(out, "losses.json").write_text(json.dumps({"curve": curve, "sharded": sharded}))
    torch.distributed.destroy_process_group()


def run(
    folder: Path,
    out: Path,
    method: str,
    lora: bool,
    kind: str,
    world: int,
    resume: Path | None = None,
    quantized: bool = False,
    mixed: bool = False,
) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = (str(folder), str(out), method, lora, kind, str(resume) if resume else None, quantized, mixed)
    arguments = (world, port, *job)
    torch.multiprocessing.spawn(train, arguments, nprocs=world)
    found: dict[str, Any] = json.loads((out / "losses.json").read_text())
    return found


def compare(folder: Path, tmp_path: Path, method: str, lora: bool, kind: str, quantized: bool = False) -> Path:
    """One process in whole against two in shards, and two that go on from the first checkpoint. Returns the result's folder."""
    one = run(folder, tmp_path / "one", method, lora, "none", 1, quantized=quantized)
    two = run(folder, tmp_path / "two", method, lora, kind, 2, quantized=quantized)
    assert two["sharded"] == (kind.startswith("fsdp") or kind == "zero3")
    torch.testing.assert_close(two["curve"], one["curve"], atol=1e-4, rtol=1e-4)
    # Ten times as far as the two may be apart; DPO begins at log 2 and moves little.
    assert one["curve"][0][0] != pytest.approx(one["curve"][-1][0], abs=1e-3), "nothing was learned"
    checkpoint = tmp_path / "two" / "checkpoint-2"
    storage.verify(checkpoint)
    resumed = run(folder, tmp_path / "resumed", method, lora, kind, 2, checkpoint, quantized)
    torch.testing.assert_close(resumed["curve"], two["curve"], atol=1e-5, rtol=1e-5)
    return tmp_path / "two"


def test_an_adapter_under_fsdp(folder: Path, tmp_path: Path) -> None:
    out = compare(folder, tmp_path, "sft", True, "fsdp")
    assert (out / "adapter_model.safetensors").stat().st_size < 100_000, "the frozen base is not part of the result"


@pytest.mark.parametrize(("method", "tied"), [("dpo", False), *(pytest.param(m, True, marks=pytest.mark.slow) for m in MORE)])
def test_mixed_precision_under_fsdp(tmp_path: Path, method: str, tied: bool) -> None:
    """With what a model returns in bfloat16, losses are 1e-2 apart."""
    (tmp_path / "model").mkdir()
    save_smollm2_llama(tmp_path / "model", tie_word_embeddings=tied, **SHAPE)
    one = run(tmp_path / "model", tmp_path / "one", method, True, "none", 1, mixed=True)
    two = run(tmp_path / "model", tmp_path / "two", method, True, "fsdp", 2, mixed=True)
    assert two["sharded"]
    torch.testing.assert_close(two["curve"], one["curve"], atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "fsdp, loaded by rank 0", "zero1", "zero2", "zero3"])
def test_a_whole_model(folder: Path, tmp_path: Path, kind: str) -> None:
    out = compare(folder, tmp_path, "sft", False, kind)
    tuned, base = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (out, folder))
    assert not torch.equal(tuned.model.embed_tokens.weight, base.model.embed_tokens.weight)
    assert tuned.num_parameters() == base.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero2"])
def test_a_quantized_base(folder: Path, tmp_path: Path, kind: str) -> None:
    compare(folder, tmp_path, "sft", True, kind, quantized=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_an_adapter_under_deepspeed(folder: Path, tmp_path: Path, kind: str) -> None:
    compare(folder, tmp_path, "sft", True, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
@pytest.mark.parametrize("method", ["dpo", "orpo", "reward_trainer"])
def test_other_methods(folder: Path, tmp_path: Path, method: str, kind: str) -> None:
    compare(folder, tmp_path, method, True, kind)
