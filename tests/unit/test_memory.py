"""The memory model against what people know of real models, against papers' formulas, and against the code that it counts."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl.experimental.orpo import ORPOTrainer

from actors import device
from actors.formats.base import IGNORED
from actors.head import LOGITS_AT_ONCE, CpuKernel
from orchestrator.activations import PackedRows, PaddedRows, Setting, _run, alive, longest_row
from orchestrator.fit import fit, warnings
from orchestrator.hardware import GIB, said
from orchestrator.head_memory import Task, fused, whole_logits
from orchestrator.jobs import trained_lora
from orchestrator.memory import BYTES, longest_rows, resting_memory, trainer_memory
from orchestrator.model_shape import ModelShape, ModelSource, read_shape
from orchestrator.plan import Node, make_plan
from tests.models import CONFIGS, model_job, save_configs

GB = 10**9  # as rules of thumb count
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_configs(tmp_path_factory.mktemp("models"))


# Weights, as the makers count them.
PUBLISHED = {
    "Qwen2.5-1.5B": 1.54, "Qwen2.5-3B": 3.09, "Qwen2.5-7B": 7.62, "Qwen2.5-14B": 14.77, "Qwen2.5-32B": 32.76,
    "Qwen2.5-72B": 72.71, "Llama-3.1-8B": 8.03, "Llama-3.1-70B": 70.55,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_counted_from_the_configuration_alone(models: dict[str, str], name: str) -> None:
    assert read_shape(ModelSource(models[name]), None).weights / GB == pytest.approx(PUBLISHED[name], abs=0.01)


def test_where_the_weights_of_a_model_lie(models: dict[str, str]) -> None:
    shape = read_shape(ModelSource(models["Llama-3.1-8B"]), trained_lora(model_job("m", "lora")))
    attention, mlp = 2 * 4096 * 4096 + 2 * 4096 * 1024, 3 * 4096 * 14336
    assert shape.embedding == shape.head == 128256 * 4096
    assert shape.quantizable == 32 * (attention + mlp)
    assert shape.in_layers == 32 * (attention + mlp + 2 * 4096)
    assert shape.largest == 4096 * 14336
    assert shape.kv_per_token == 2 * 32 * 8 * 128
    # r (in + out) of each linear layer
    assert shape.trained == 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))


def test_a_run_is_told_before_it_starts_that_its_gpu_is_too_small(models: dict[str, str]) -> None:
    config = model_job(models["Qwen2.5-7B"], "lora", rl="grpo", gradient_accumulation_steps=8)

    def told(cluster: str) -> tuple[str, ...]:
        return warnings(config, make_plan(config, said(cluster), 100, "bfloat16"))

    assert told("2x80GB") == ()
    assert any(line.startswith("trainer 0 needs") and "`eagleray plan`" in line for line in told("2x12GB"))
    unknown = replace(config, base_model="no/such-model")
    assert warnings(unknown, make_plan(unknown, said("2x12GB"), 100, "bfloat16")) == (), "an estimate stops no job"
    assert warnings(config, make_plan(config, [Node("a", {"CPU": 2.0}, memory=1)], 100, "bfloat16")) == ()


# The table that people go by, with sequences of 512 to 2048 tokens and one or two of them at once. It keeps all activations of
# models up to 14B, and checkpoints those of larger ones.
SHORT: dict[str, Any] = {"sequence_len": 512}
MIDDLE: dict[str, Any] = {"sequence_len": 768}
LONG: dict[str, Any] = {"sequence_len": 1536}
LONGEST: dict[str, Any] = {"sequence_len": 2048, "micro_batch_size": 2}
SAVING: dict[str, Any] = {"sequence_len": 512, "gradient_checkpointing": True}
TABLE = [
    ("Qwen2.5-1.5B", "qlora", LONG, (6, 8)),
    ("Qwen2.5-3B", "lora", MIDDLE, (8, 12)),
    ("Qwen2.5-7B", "qlora", SHORT, (10, 14)),
    ("Qwen2.5-7B", "lora", SHORT, (16, 24)),
    ("Qwen2.5-7B", None, SHORT, (60, 80)),
    ("Qwen2.5-14B", "lora", SHORT, (28, 40)),
    ("Qwen2.5-32B", "qlora", {**LONGEST, "gradient_checkpointing": True}, (24, 32)),
    ("Llama-3.1-70B", "qlora", SAVING, (40, 48)),
]
MORE_OF_THE_TABLE = [
    ("Qwen2.5-1.5B", "lora", LONG, (8, 12)),
    ("Qwen2.5-1.5B", None, LONGEST, (24, 32)),
    ("Qwen2.5-3B", "qlora", MIDDLE, (6, 8)),
    ("Qwen2.5-3B", None, MIDDLE, (24, 32)),
    ("Llama-3.1-8B", "qlora", SHORT, (10, 14)),
    ("Llama-3.1-8B", "lora", SHORT, (16, 24)),
    ("Llama-3.1-8B", None, SHORT, (60, 80)),
    ("Qwen2.5-14B", "qlora", SHORT, (16, 20)),
    ("Qwen2.5-14B", None, SHORT, (120, 160)),
    ("Qwen2.5-32B", "lora", {**LONGEST, "gradient_checkpointing": True}, (64, 80)),
    ("Qwen2.5-72B", "qlora", SAVING, (40, 48)),
]


@pytest.mark.parametrize(
    ("name", "adapter", "rows", "expected"), [*TABLE, *(pytest.param(*cell, marks=SLOW) for cell in MORE_OF_THE_TABLE)]
)
def test_the_table_of_single_gpus(
    models: dict[str, str], name: str, adapter: str | None, rows: dict[str, Any], expected: tuple[int, int]
) -> None:
    memory = trainer_memory(model_job(models[name], adapter, **rows), "bfloat16", 1, gpu=True)
    assert expected[0] <= memory.total / GB <= expected[1], memory


@pytest.mark.parametrize(
    ("name", "adapter", "rl", "gpus"),
    [
        ("Llama-3.1-70B", "lora", None, 2),
        pytest.param("Qwen2.5-32B", None, "grpo", 4, marks=SLOW),
        pytest.param("Llama-3.1-70B", None, "grpo", 8, marks=SLOW),
    ],
)
def test_the_table_of_several_gpus(models: dict[str, str], name: str, adapter: str | None, rl: str | None, gpus: int) -> None:
    config = model_job(models[name], adapter, rl=rl, fsdp_version=2, micro_batch_size=1, **SAVING)
    assert trainer_memory(config, "bfloat16", gpus, gpu=True).total <= 80 * GIB
    assert trainer_memory(config, "bfloat16", gpus // 2, gpu=True).total > 80 * GIB


def test_the_reference_of_full_fine_tuning_is_whole_under_fsdp(models: dict[str, str]) -> None:
    """TRL has it as one piece, which is gathered to be computed with; ZeRO-3 goes through it layer by layer."""
    zero3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}

    def weights(rl: str | None, **sharded: Any) -> int:
        config = model_job(models["Qwen2.5-7B"], None, rl=rl, **sharded, **SAVING)
        return trainer_memory(config, "bfloat16", 8, gpu=True).terms["weights"]

    assert weights("dpo", fsdp_version=2) - weights(None, fsdp_version=2) == pytest.approx(2 * 7.6156e9, rel=1e-3)
    assert weights("dpo", **zero3) - weights(None, **zero3) == pytest.approx(2 * 7.6156e9 / 8, rel=1e-3)


def test_a_dataset_job_under_fsdp_has_masters_in_fp32(models: dict[str, str]) -> None:
    """accelerate puts them there where it computes in bfloat16, so that of 16 bytes a weight each rank has its share."""
    memory = trainer_memory(model_job(models["Qwen2.5-7B"], None, fsdp_version=2, **SAVING), "bfloat16", 8, gpu=True)
    held = sum(memory.terms[term] for term in ("weights", "gradients", "optimizer"))
    assert held == pytest.approx(16 * 7.6156e9 / 8, rel=1e-3)


@pytest.mark.parametrize(("name", "gpus"), [("Llama-3.1-70B", 8), pytest.param("Qwen2.5-32B", 4, marks=SLOW)])
def test_a_dataset_job_without_masters_fits_where_the_table_has_it(models: dict[str, str], name: str, gpus: int) -> None:
    config = model_job(models[name], None, fsdp_version=2, micro_batch_size=1, bf16="full", **SAVING)
    assert trainer_memory(config, "bfloat16", gpus, gpu=True).total <= 80 * GIB
    assert trainer_memory(replace(config, bf16=True), "bfloat16", gpus, gpu=True).total > 80 * GIB


GRPO_ROWS = {
    "rl": "grpo",
    "sequence_len": 1024,
    "trl__max_completion_length": 512,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 8,
}
SHARDED = {"fsdp_version": 2, "gradient_checkpointing": True}
COLOCATED = {"trl__vllm_mode": "colocate", "trl__vllm_enable_sleep_mode": True, "gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("name", "adapter", "changes", "cluster", "fits"),
    [
        ("Qwen2.5-3B", "lora", {}, "2x24GB", True),
        pytest.param("Qwen2.5-7B", "lora", {}, "2x24GB", False, marks=SLOW),
        pytest.param("Qwen2.5-7B", None, {}, "2x80GB", True, marks=SLOW),
        pytest.param("Qwen2.5-14B", "lora", {}, "2x80GB", True, marks=SLOW),
        pytest.param(
            "Qwen2.5-32B",
            "lora",
            {**SHARDED, "ray_num_workers": 2, "vllm__tensor_parallel_size": 2},
            "4x80GB",
            True,
            marks=SLOW,
        ),
        ("Qwen2.5-72B", "lora", {**SHARDED, "ray_num_workers": 4, "vllm__tensor_parallel_size": 4}, "8x80GB", True),
        ("Qwen2.5-72B", "lora", {**SHARDED, "ray_num_workers": 4, "vllm__tensor_parallel_size": 1}, "8x80GB", False),
        pytest.param("Qwen2.5-3B", "lora", {**COLOCATED, "vllm__gpu_memory_utilization": 0.6}, "1x24GB", True, marks=SLOW),
        ("Qwen2.5-7B", "lora", {**COLOCATED, "vllm__gpu_memory_utilization": 0.6}, "1x24GB", False),
    ],
)
def test_the_table_of_grpo(
    models: dict[str, str], name: str, adapter: str | None, changes: dict[str, Any], cluster: str, fits: bool
) -> None:
    config = model_job(models[name], adapter, **{**GRPO_ROWS, **changes})
    plan = make_plan(config, said(cluster), 100)
    assert (not [*plan.problems, *fit(config, plan).problems]) == fits


@pytest.mark.parametrize(
    ("stage", "states"),
    [(0, 2 + 2 + 12), (1, 2 + 2 + 12 / 64), (2, 2 + (2 + 12) / 64), (3, (2 + 2 + 12) / 64)],
)
def test_zero_cuts_what_its_paper_says(models: dict[str, str], stage: int, states: float) -> None:
    """arXiv:1910.02054, figure 1: bytes a weight of parameters, gradients and Adam's states, with K = 12 over 64 ranks."""
    zero = {"deepspeed": {"zero_optimization": {"stage": stage}}, "gradient_accumulation_steps": 2, **SAVING}
    memory = trainer_memory(model_job(models["Qwen2.5-7B"], None, **zero), "bfloat16", 64, gpu=True)
    held = sum(memory.terms[term] for term in ("weights", "gradients", "optimizer"))
    assert held / read_shape(ModelSource(models["Qwen2.5-7B"]), None).weights == pytest.approx(states, rel=1e-6)


def test_nf4_and_int8_by_hand(models: dict[str, str]) -> None:
    """QLoRA's constants take 0.127 bits a weight (arXiv:2305.14314, section 3)."""
    linear, rest = 6_979_321_856, 8_030_261_248 - 6_979_321_856

    def weights(adapter: str, **changes: Any) -> float:
        memory = resting_memory(model_job(models["Llama-3.1-8B"], adapter, **SAVING, **changes), "bfloat16", 1, gpu=True)
        return memory.terms["weights"] - 4 * 41_943_040  # r = 16 on all linear layers

    assert weights("qlora") == pytest.approx(linear * (4 + 0.127) / 8 + 2 * rest, rel=1e-4)
    rows = 32 * (2 * 4096 + 2 * 1024 + 2 * 14336 + 4096)
    assert weights("lora", load_in_8bit=True) == linear + 4 * rows + 2 * rest


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("adamw_torch_fused", 2 * 2), ("adamw_8bit", 2 * (1 + 4 / 256)), ("sgd", 0), ("lion_32bit", 4)]
)
def test_states_of_optimizers(models: dict[str, str], optimizer: str, expected: float) -> None:
    config = model_job(models["Qwen2.5-7B"], None, optimizer=optimizer, **SAVING)
    memory = resting_memory(config, "bfloat16", 1, gpu=True)
    assert memory.terms["optimizer"] == pytest.approx(expected * 7.6156e9, rel=1e-3)


def test_ranks_with_whole_copies_have_gradients_twice_under_ddp(models: dict[str, str]) -> None:
    alone, two = (resting_memory(model_job(models["Qwen2.5-7B"], None), "bfloat16", n, gpu=True) for n in (1, 2))
    assert two.terms["buffers"] - alone.terms["buffers"] == pytest.approx(2 * 7.6156e9, rel=1e-3)


def test_a_reference_is_a_second_model_unless_there_is_an_adapter(models: dict[str, str]) -> None:
    def weights(adapter: str | None, **changes: Any) -> int:
        config = model_job(models["Qwen2.5-1.5B"], adapter, **{**SAVING, "micro_batch_size": 2, **changes})
        return resting_memory(config, "bfloat16", 1, gpu=True).terms["weights"]

    base = 2 * read_shape(ModelSource(models["Qwen2.5-1.5B"]), None).weights
    assert weights(None, rl="dpo") == weights(None, rl="kto") == 2 * base
    assert weights(None, rl="orpo") == weights(None) == base
    assert weights("lora", rl="dpo") == weights("lora")
    assert weights(None, rl="grpo", trl__beta=0.1) == 2 * base
    assert weights(None, rl="grpo", trl__beta=0.0) == base


def test_at_rest_a_rank_keeps_weights_and_optimizer(models: dict[str, str]) -> None:
    rest = resting_memory(model_job(models["Qwen2.5-7B"], None, **GRPO_ROWS), "bfloat16", 1, gpu=True)
    assert {name for name, nbytes in rest.terms.items() if nbytes} == {"weights", "optimizer", "buffers", "overhead"}


def test_pairs_go_through_the_model_together() -> None:
    def rows(rl: str | None, **changes: Any) -> Any:
        return longest_rows(model_job("m", "lora", rl=rl, micro_batch_size=2, sequence_len=100, **changes), gpu=False)

    assert rows("dpo") == rows("orpo") == rows("reward_trainer") == PaddedRows(4, 100, masked=True)
    assert rows(None) == rows("kto") == PaddedRows(2, 100, masked=True)
    assert rows(None, attn_implementation="flash_attention_2") == PaddedRows(2, 100, masked=True), "its kernels are for GPUs"
    flash = model_job("m", "lora", micro_batch_size=2, sequence_len=100, attn_implementation="flash_attention_2")
    assert longest_rows(flash, gpu=True) == PaddedRows(2, 100, masked=False)
    assert longest_rows(model_job("m", "lora", sequence_len=100), gpu=False) == PaddedRows(1, 100, masked=False)
    packed = {"micro_batch_size": 2, "sequence_len": 100, "sample_packing": True}
    assert longest_rows(model_job("m", "lora", **packed), gpu=False) == PaddedRows(1, 200, masked=True, packs=2)
    eager = model_job("m", "lora", **packed, attn_implementation="eager")
    assert longest_rows(eager, gpu=False) == PaddedRows(1, 200, masked=True), "told nothing, it masks all of the row"
    compiled = model_job("m", "lora", **packed, torch_compile=True)
    assert longest_rows(compiled, gpu=False) == PaddedRows(1, 200, masked=True)
    grpo = rows("grpo", trl__num_generations=8, trl__max_completion_length=30)
    assert grpo == PackedRows(groups=1, prompt=70, completions=2, length=30)
    assert (grpo.tokens, grpo.predicting) == (69 + 2 * 30, 2 * 30)
    row = longest_row(grpo)
    assert (row.labels != IGNORED).sum() == grpo.predicting and row.input_ids.numel() == grpo.tokens


# What the passes keep.


def test_what_a_forward_pass_keeps_is_what_autograd_saves(base: str) -> None:
    """On a real model with data, counted by another instrument: the hooks that autograd calls for each tensor that it saves."""
    rows = PaddedRows(2, 24, masked=False)
    counted = alive(Setting(ModelSource(base), None, rows, "float32", eager=False, checkpointing=False))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    ids = torch.zeros(2, 24, dtype=torch.long)
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own | {ids.untyped_storage().data_ptr()}:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    storage = hidden.untyped_storage()
    saved[storage.data_ptr()] = storage.nbytes()
    assert counted.kept == pytest.approx(sum(saved.values()), rel=0.01)


@pytest.mark.parametrize(
    ("adapter", "checkpointing"),
    [(None, True), ("lora", False), pytest.param(None, False, marks=SLOW), pytest.param("lora", True, marks=SLOW)],
)
def test_one_and_two_layers_tell_of_four(tmp_path: Path, adapter: str | None, checkpointing: bool) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_hidden_layers": 4, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIGS["Llama-3.1-8B"], **small}))
    lora = trained_lora(model_job(str(tmp_path), adapter))
    rows = PackedRows(groups=2, prompt=9, completions=6, length=8)
    setting = Setting(ModelSource(str(tmp_path)), lora, rows, "float32", eager=False, checkpointing=checkpointing)
    found, direct = alive(setting), _run(setting, 4)
    assert (found.kept, found.forward, found.backward) == (direct.kept, direct.forward, direct.backward)
    if checkpointing:
        assert found.kept - _run(setting, 3).kept == rows.tokens * 64 * 4  # what goes into a layer


def test_packs_cost_what_their_documents_cost_alone(base: str, tmp_path: Path) -> None:
    """Where attention is told of them, and but for what it gathers; else a mask of the row's square comes with every layer."""

    def kept(source: str, rows: PaddedRows) -> int:
        return alive(Setting(ModelSource(source), None, rows, "float32", eager=False, checkpointing=False)).kept

    apart, packs = PaddedRows(8, 64, masked=False), PaddedRows(1, 8 * 64, masked=True, packs=8)
    assert kept(base, apart) < kept(base, packs) < 1.5 * kept(base, apart)
    config = json.loads((Path(base) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "mistral", "sliding_window": 64}))
    layers = config["num_hidden_layers"]
    assert kept(str(tmp_path), packs) - kept(str(tmp_path), apart) > 0.9 * layers * (8 * 64) ** 2 * 4


# Heads: the formulas against the code that they are of.

H, V = 16, 40_000  # hidden numbers, words


def task(rows: PaddedRows | PackedRows, dtype: str, *, trains: bool, hidden: int = H, stored: str | None = None) -> Task:
    numbers = dict.fromkeys(("layers", "intermediate", "heads", "kv_heads", "head_dim", "weights", "in_layers"), 0)
    quantized = dict.fromkeys(("quantizable", "quantizable_rows", "largest", "trained"), 0)
    shape = ModelShape(**numbers, **quantized, hidden=hidden, vocabulary=V, embedding=V * hidden, head=0)
    return Task(rows, shape, BYTES[dtype], BYTES[stored or dtype], trains, gpu=False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("dtype", "stored"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
def test_the_head_on_cpus(dtype: str, stored: str, trains: bool) -> None:
    """With data, since torch has copies inside of an operation; in two tiles."""
    positions, hidden = 1000, 512
    assert LOGITS_AT_ONCE // V < positions < 2 * LOGITS_AT_ONCE // V
    states = torch.randn(positions, hidden, dtype=getattr(torch, dtype), requires_grad=True)
    weights = torch.randn(V, hidden, dtype=getattr(torch, stored), requires_grad=trains)
    targets = torch.zeros(positions, dtype=torch.long)

    def logprobs() -> Tensor:
        return CpuKernel.apply(states[:], weights, None, targets, 1.0, 0, None, 1.0, ("log_probs", "entropy", "is_top1"))[0]

    before = device.tensor_bytes()
    with device.measured() as forward:
        loss = logprobs().sum()
    kept = device.tensor_bytes() - before
    with device.measured() as backward:
        gradients = torch.autograd.grad(loss, [states, *([weights] if trains else [])])
    head = fused(task(PaddedRows(1, positions + 1, masked=False), dtype, trains=trains, hidden=hidden, stored=stored))
    assert len(gradients) == 1 + trains
    if not trains:  # else what is kept are the hidden states, which are there already
        assert head.kept == pytest.approx(kept, rel=0.03)
    at_once = states.nbytes  # of what has the size of the hidden states, one may be there or not
    assert head.kept + head.forward == pytest.approx(forward() - before, rel=0.03, abs=at_once)
    assert head.backward == pytest.approx(backward() - before - kept, rel=0.03, abs=at_once)


def test_the_head_of_orpo() -> None:
    """With data and on the CPU's allocator: autograd adds gradients up in place, which it does not without data."""
    rows = PaddedRows(4, 20, masked=True)
    labels = torch.zeros(rows.sequences, rows.length, dtype=torch.long)
    logits = torch.randn(rows.sequences, rows.length, V, requires_grad=True)

    def loss(logits: Tensor) -> Tensor:
        """As ORPOTrainer.concatenated_forward has it."""
        chosen = logits[:2, :-1].contiguous().view(-1, V)
        likelihood = torch.nn.functional.cross_entropy(chosen, labels[:2, 1:].contiguous().view(-1))
        return likelihood - ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True).mean()

    before = device.tensor_bytes()
    with device.measured() as peak:
        loss(1.0 * logits).backward()  # times 1: what goes into the head is no leaf, and is counted
    head = whole_logits(task(rows, "float32", trains=False))
    assert head.kept + head.backward == pytest.approx(peak() - before, rel=0.05)
