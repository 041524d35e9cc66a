"""A group of trainer ranks on gloo: whole copies and shards learn what one rank learns, and go on from a checkpoint."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors import adapter, model, snapshot, storage
from actors.ranks import meeting_place
from actors.specs import LossSpec, ModelSpec, OptimizerSpec, RankSpec
from actors.trainer import Trainer
from tests.tiny import published, random_group, save_llama, save_smollm2_llama, trainer_spec

ZERO = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
SHARDINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}},
    "fsdp, loaded by rank 0": {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": True}},
    "zero1": {"deepspeed": {"zero_optimization": {"stage": 1}, **ZERO}},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}, **ZERO}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}, **ZERO}},
}
GROUPS = [random_group(p, c, seed=i) for i, (p, c) in enumerate(((5, [4, 1, 7]), (9, [2, 2]), (3, [6, 5, 1, 1])))]
WHOLE = ([[1.0, -0.5, 0.25], [None, 0.8], [0.0, -1.2, 0.3, 0.9]], (0, 1, 2))
# The last group is cut in two, and the first rank has two rows more than the second.
SHARES = (
    ([[1.0, -0.5, 0.25], [None, 0.8], [0.0, -1.2, 0.3, None]], (0, 1, 2)),
    ([[None, None, None, 0.9]], (2,)),
)
LORA_NORM, FULL_NORM = 0.05, 0.005  # gradients are clipped at
SLOW = ("fsdp, loaded by rank 0", "zero1", "zero2", "zero3")
NOT_COMPARED = "computed_tokens"  # a prompt that two ranks share is computed by both


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def train(rank: int, world: int, address: str, folder: str, kind: str, full: bool, out: str, resume: str | None) -> None:
    """Two steps, a checkpoint after the first; rank 0 leaves the statistics in stats.json."""
    torch.set_num_threads(1)
    rate, norm = (1e-3, FULL_NORM) if full else (1e-2, LORA_NORM)
    optimizer = OptimizerSpec(rate, "linear", 0, 4, max_grad_norm=norm, weight_decay=0.1)
    loss = LossSpec(beta=0.0 if full else 0.1, max_completion_length=8)
    spec = trainer_spec(folder, micro_batch_size=2, loss=loss, optimizer=optimizer)
    if full:
        spec = replace(spec, lora=None, bucket_bytes=2**20)
    trainer = Trainer(replace(spec, sharding=SHARDINGS[kind]), RankSpec(rank, world, address))
    trainer.set_probe([5, 6, 7, 8, 9])
    advantages, groups = WHOLE if world == 1 else SHARES[rank]
    stats = []
    if resume:
        trainer.restore(resume)
    else:
        stats.append(trainer.train(advantages, *(GROUPS[g] for g in groups)))
        trainer.save(out + "/checkpoint")
    stats.append(trainer.train(advantages, *(GROUPS[g] for g in groups)))
    base = trainer.base_logprobs()
    header, *buckets = published(trainer)
    trainer.save_policy(out)
    if rank == 0:
        save_file(snapshot.unpack(header.entries, *buckets), Path(out, "published.safetensors"))
        found = {"stats": [asdict(one) for one in stats], "probe": header.probe_logprobs, "base": base}
        Path(out, "stats.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(
    folder: str, out: Path, kind: str, world: int, resume: Path | None = None, full: bool = False
) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    arguments = (world, meeting_place(), folder, kind, full, str(out), str(resume) if resume else None)
    torch.multiprocessing.spawn(train, arguments, nprocs=world)
    found: dict[str, Any] = json.loads((out / "stats.json").read_text())
    for one in found["stats"]:
        del one[NOT_COMPARED]
    return found


@pytest.mark.parametrize("kind", ["whole", "fsdp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_two_ranks_learn_what_one_does(folder: str, tmp_path: Path, kind: str) -> None:
    learn_alike(folder, tmp_path, kind, adapter.WEIGHTS_FILE)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "fsdp", *SLOW])
def test_two_ranks_train_all_weights_as_one_does(tmp_path: Path, kind: str) -> None:
    """Of a model whose head is its embedding, which must stay one weight."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    folder = save_smollm2_llama(tmp_path / "tied", tie_word_embeddings=True, **shape)
    learn_alike(folder, tmp_path, kind, "model.safetensors", full=True)
    published, saved = (load_file(tmp_path / "two" / name) for name in ("published.safetensors", "model.safetensors"))
    assert published.keys() == model.expected_shapes(ModelSpec(folder, "float32"), None).keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in saved.items())
    assert model.load_base(ModelSpec(str(tmp_path / "two"), "float32")).lm_head.weight.shape == (49152, 32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_head_of_its_own_is_trained_as_one_does(folder: str, tmp_path: Path, kind: str) -> None:
    """It is in no layer's shards, and is read by the loss and not as a module of the model."""
    learn_alike(folder, tmp_path, kind, "model.safetensors", full=True)


def learn_alike(folder: str, tmp_path: Path, kind: str, weights: str, full: bool = False) -> None:
    one = run(folder, tmp_path / "one", "whole", 1, full=full)
    two = run(folder, tmp_path / "two", kind, 2, full=full)
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-5, equal_nan=True)  # no KL without beta
    assert one["stats"][0]["grad_norm"] > (FULL_NORM if full else LORA_NORM), "the gradient was clipped"
    assert max(abs(a - b) for a, b in zip(one["probe"], one["base"], strict=True)) > 1e-3, "nothing was learned"
    ours, theirs = (load_file(tmp_path / name / weights) for name in ("two", "one"))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    storage.seal(tmp_path / "two" / "checkpoint")
    resumed = run(folder, tmp_path / "resumed", kind, 2, tmp_path / "two" / "checkpoint", full)
    torch.testing.assert_close(resumed["stats"], two["stats"][1:], atol=1e-6, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(resumed["probe"], two["probe"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(resumed["base"], two["base"], atol=1e-6, rtol=1e-6)


def test_a_group_of_one_rank_may_be_in_shards(folder: str, tmp_path: Path) -> None:
    whole = run(folder, tmp_path / "whole", "whole", 1)
    torch.testing.assert_close(run(folder, tmp_path / "fsdp", "fsdp", 1), whole, atol=1e-5, rtol=1e-5)
