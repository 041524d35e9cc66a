"""The trainer on a tiny model, against plain torch on one completion at a time and against itself after a restart."""

import pickle
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from actors import model
from actors.adapter import WEIGHTS_FILE
from actors.errors import CheckpointError
from actors.specs import LossSpec, OptimizerSpec, TrainerSpec
from actors.trainer import Trainer
from actors.types import RolloutGroup, TrainStats
from tests.tiny import alone_logprobs, fill_adapter, published, random_group, save_llama, trainer_spec

pytestmark = pytest.mark.usefixtures("one_thread")
BETA1 = 0.9
CAP = 1.5
GROUPS = [random_group(p, c, seed=i) for i, (p, c) in enumerate(((5, [4, 1, 7]), (9, [2, 2]), (3, [6, 5, 1, 1])))]
# One sample dropped, one without advantage: the second counts in the mean of the loss, the first does not.
ADVANTAGES: list[list[float | None]] = [[1.0, -0.5, 0.25], [None, 0.8], [0.0, -1.2, 0.3, 0.9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


def make(spec: TrainerSpec, *, size: float = 0.1) -> Trainer:
    trainer = Trainer(spec)
    fill_adapter(trainer.policy, seed=1, size=size)
    trainer.set_probe([5, 6, 7, 8, 9])
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.lora_tensors(trainer.policy).items()}


def gradients(trainer: Trainer) -> list[Tensor]:
    """Of the first step, from Adam's first moment, which is (1 - beta1) times the gradient after one step."""
    return [trainer.shared.optimizer.state[p]["exp_avg"] / (1 - BETA1) for p in trainer.shared.parameters]


def losses(stats: TrainStats) -> dict[str, Any]:
    return {name: value for name, value in asdict(stats).items() if name != "seconds"}


def plain_loss(
    policy: Any,
    old: dict[tuple[int, int], Tensor],
    temperature: float,
    beta: float = 0.0,
    reference: Any = None,
    written: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """DAPO's loss (arXiv:2503.14476, eq. 8) with engine weights and KL, a loop over completions; no packing."""
    counted = [(g, i) for g, row in enumerate(ADVANTAGES) for i, a in enumerate(row) if a is not None]
    masks = {(g, i): mask_of(written[g][i] if written else "w" * len(GROUPS[g].completion_ids[i])) for g, i in counted}
    tokens = sum(float(mask_T.sum()) for mask_T in masks.values())
    total = torch.zeros(())
    for g, row in enumerate(ADVANTAGES):
        for i, advantage in enumerate(row):
            if advantage is None:
                continue
            logprobs_T, _ = alone_logprobs(policy, GROUPS[g], i, temperature)
            old_T = old.setdefault((g, i), logprobs_T.detach())
            engine_T = torch.from_numpy(GROUPS[g].logprobs[i])
            ratio_T = torch.exp(logprobs_T - old_T)
            surrogate_T = torch.min(ratio_T * advantage, ratio_T.clamp(0.8, 1.2) * advantage)
            loss_T = -surrogate_T * torch.exp(old_T - engine_T).clamp(max=CAP)
            if beta:
                with torch.no_grad(), nullcontext() if reference else policy.disable_adapter():
                    ref_T, _ = alone_logprobs(reference or policy, GROUPS[g], i, temperature)
                loss_T = loss_T + beta * (torch.exp(ref_T - logprobs_T) - (ref_T - logprobs_T) - 1) * ratio_T
            total = total + (loss_T * masks[g, i]).sum() / tokens
    return total


def mask_of(written: str) -> Tensor:
    return torch.tensor([letter == "w" for letter in written])


# Of the completions of GROUPS, which tokens the model wrote, and which are what it was answered.
WRITTEN = [["wwaw", "w", "aawwaaw"], ["ww", "aw"], ["waawaw", "wwwww", "w", "w"]]


def conversations() -> list[RolloutGroup]:
    return [
        replace(group, written=tuple(mask_of(letters).numpy() for letters in row))
        for group, row in zip(GROUPS, WRITTEN, strict=True)
    ]


@pytest.mark.parametrize("written", [None, WRITTEN], ids=["one turn", "several turns"])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_the_gradient_is_that_of_a_loop_over_completions(folder: str, beta: float, written: list[list[str]] | None) -> None:
    loss = LossSpec(importance_sampling_cap=CAP, beta=beta)
    trainer = make(trainer_spec(folder, loss=loss, temperature=0.7))
    expected_loss = plain_loss(trainer.policy.eval(), {}, 0.7, beta, written=written)
    expected = torch.autograd.grad(expected_loss, trainer.shared.parameters)
    stats = trainer.train(ADVANTAGES, *(conversations() if written else GROUPS))
    assert stats.loss == pytest.approx(float(expected_loss), abs=1e-5)
    norm = float(torch.stack([g.square().sum() for g in expected]).sum().sqrt())
    assert stats.grad_norm == pytest.approx(norm, rel=1e-4) and norm > 0.1
    for found, gradient in zip(gradients(trainer), expected, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-4 * norm)


def test_two_iterations_are_two_clipped_steps_of_adam(folder: str) -> None:
    optimizer = OptimizerSpec(0.03, "linear", 0, 10, weight_decay=0.1, max_grad_norm=0.5, epsilon=1e-3)
    spec = trainer_spec(folder, optimizer=optimizer, loss=LossSpec(importance_sampling_cap=CAP), num_iterations=2)
    trainer, plain = make(spec), make(spec)
    stats = trainer.train(ADVANTAGES, *GROUPS)
    adam = torch.optim.AdamW(plain.shared.parameters, lr=0.03, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.1)
    old: dict[tuple[int, int], Tensor] = {}
    for rate in (0.03, 0.03 * 0.9):  # linear to 0 in ten steps
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        plain_loss(plain.policy, old, 1.0).backward()
        torch.nn.utils.clip_grad_norm_(plain.shared.parameters, 0.5)
        adam.step()
    assert stats.version == 1 and stats.clip_fraction > 0.05  # else the second step's ratios were not put to the test
    assert stats.learning_rate == pytest.approx(0.027)
    for name, expected in weights(plain).items():
        torch.testing.assert_close(weights(trainer)[name], expected, rtol=1e-4, atol=1e-4)


def test_all_weights_are_trained_and_the_reference_stays(folder: str) -> None:
    """Three steps of a plain loop with torch's AdamW, in which no norm decays, against a model of its own."""
    optimizer = OptimizerSpec(1e-3, "constant", 0, 10, max_grad_norm=0.05, weight_decay=0.1)
    loss = LossSpec(beta=0.2, importance_sampling_cap=CAP, max_completion_length=8)
    trainer = Trainer(replace(trainer_spec(folder, optimizer=optimizer, loss=loss), lora=None))
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for _ in range(2))
    norms = [p for name, p in policy.named_parameters() if "norm" in name]
    others = [p for name, p in policy.named_parameters() if "norm" not in name]
    adam = torch.optim.AdamW([{"params": others}, {"params": norms, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1)
    for _ in range(3):
        stats = trainer.train(ADVANTAGES, *GROUPS)
        expected = plain_loss(policy, {}, 1.0, 0.2, reference)
        expected.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.05)
        adam.step()
        adam.zero_grad()
        assert (stats.loss, stats.grad_norm) == pytest.approx((float(expected.detach()), float(norm)), rel=1e-4, abs=1e-6)
    assert stats.kl > 1e-6, "the policy has not left the reference"
    found = dict(trainer.policy.named_parameters())
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter, atol=1e-5, rtol=1e-4)


def test_micro_batches_do_not_change_the_update(folder: str) -> None:
    optimizer = OptimizerSpec(1e-2, "constant", 0, 10, epsilon=1e-3, max_grad_norm=1e9)
    found = []
    for size in (1, 2, 3, 100):
        trainer = make(trainer_spec(folder, micro_batch_size=size, optimizer=optimizer))
        stats = trainer.train(ADVANTAGES, *GROUPS)
        found.append((stats, gradients(trainer), weights(trainer)))
    first_stats, first_gradients, first_weights = found[0]
    # Rows of one completion compute a prompt per completion, one row for all each prompt once; what ends one predicts nothing.
    assert [stats.computed_tokens for stats, _, _ in found][0::3] == [3 * 4 + 8 + 3 * 2 + 21, 4 + 8 + 2 + 21]
    for stats, grads, tensors in found[1:]:
        assert stats.trained_tokens == first_stats.trained_tokens == 12 + 2 + 7
        assert (stats.loss, stats.grad_norm) == pytest.approx((first_stats.loss, first_stats.grad_norm), abs=1e-5)
        assert stats.entropy == pytest.approx(first_stats.entropy, abs=1e-5)
        for a, b in zip(grads, first_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        for name in tensors:
            torch.testing.assert_close(tensors[name], first_weights[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("written", [None, WRITTEN], ids=["one turn", "several turns"])
def test_statistics_are_those_of_a_loop_over_completions(folder: str, written: list[list[str]] | None) -> None:
    trainer = make(trainer_spec(folder, loss=LossSpec(importance_sampling_cap=CAP), temperature=0.7))
    trained = [(g, i) for g, row in enumerate(ADVANTAGES) for i, a in enumerate(row) if a]
    with torch.no_grad():
        alone = [alone_logprobs(trainer.policy.eval(), GROUPS[g], i, 0.7) for g, i in trained]
    gap_N = torch.cat([a for a, _ in alone]) - torch.cat([torch.from_numpy(GROUPS[g].logprobs[i]) for g, i in trained])
    entropy_N = torch.cat([torch.distributions.Categorical(logits=logits).entropy() for _, logits in alone])
    if written:
        mask_N = torch.cat([mask_of(written[g][i]) for g, i in trained])
        gap_N, entropy_N = gap_N[mask_N], entropy_N[mask_N]
    stats = trainer.train(ADVANTAGES, *(conversations() if written else GROUPS))
    assert stats.engine_gap == pytest.approx(float(gap_N.abs().mean()), abs=1e-5)
    assert stats.importance_ratio == pytest.approx(float(gap_N.exp().clamp(max=CAP).mean()), abs=1e-5)
    assert stats.entropy == pytest.approx(float(entropy_N.mean()), abs=1e-5)
    assert (stats.clip_fraction, stats.left_out) == (0.0, 0) and np.isnan(stats.kl)
    assert (stats.trained_completions, stats.trained_tokens) == (len(trained), len(gap_N)) == (7, 15 if written else 21)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_words_of_others_at_the_end_change_nothing(folder: str, loss_type: str, level: str) -> None:
    """Nothing that the model wrote comes after them, so a batch with them is the batch without, whatever they are."""
    loss = LossSpec(loss_type, beta=0.1, importance_sampling_level=level)
    found = []
    for more in ([], [5, 6, 7], [9]):
        ids = tuple(np.array([*ids, *more], dtype=np.int32) for ids in GROUPS[0].completion_ids)
        logprobs = tuple(np.array([*values, *[-50.0] * len(more)], dtype=np.float32) for values in GROUPS[0].logprobs)
        mine = tuple(np.arange(len(now)) < len(before) for now, before in zip(ids, GROUPS[0].completion_ids, strict=True))
        trainer = make(trainer_spec(folder, loss=loss))
        stats = trainer.train(ADVANTAGES, replace(GROUPS[0], completion_ids=ids, logprobs=logprobs, written=mine), *GROUPS[1:])
        found.append((losses(stats), gradients(trainer)))
    for stats, grads in found[1:]:
        assert stats.pop("computed_tokens") > found[0][0]["computed_tokens"]
        assert stats == pytest.approx({name: found[0][0][name] for name in stats}, abs=1e-6)
        for a, b in zip(grads, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_truncated_completions_are_masked(folder: str, beta: float) -> None:
    def truncated(group: RolloutGroup, index: int) -> RolloutGroup:
        return RolloutGroup(**{**vars(group), "truncated": tuple(i == index for i in range(len(group.texts)))})

    spec = trainer_spec(folder, loss=LossSpec("dapo", beta=beta), mask_truncated_completions=True)
    masked, dropped = make(spec), make(spec)
    masked.train(ADVANTAGES, truncated(GROUPS[0], 2), *GROUPS[1:])
    # DAPO's mean is over tokens, so a masked completion is one that is not there.
    dropped.train([[1.0, -0.5, None], *ADVANTAGES[1:]], *GROUPS)
    for a, b in zip(gradients(masked), gradients(dropped), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_groups_without_advantage_change_no_weight(folder: str) -> None:
    # Weight decay and momentum would move the weights if a step were taken.
    optimizer = OptimizerSpec(1e-2, "linear", 0, 10, weight_decay=0.1)
    trainer = make(trainer_spec(folder, optimizer=optimizer))
    trainer.train(ADVANTAGES, *GROUPS)
    before = weights(trainer)
    stats = trainer.train([[0.0] * 3, [None] * 2, [0.0] * 4], *GROUPS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    assert stats.left_out == 0 and (stats.loss, stats.grad_norm, stats.computed_tokens) == (0.0, 0.0, 0)
    assert stats.version == 2
    assert trainer.train(ADVANTAGES, *GROUPS).learning_rate == pytest.approx(1e-2 * 0.8)  # the schedule went on


def test_a_gradient_that_is_not_finite_skips_the_step_and_leaves_no_trace(folder: str) -> None:
    trainer, plain = make(trainer_spec(folder)), make(trainer_spec(folder))
    before = weights(trainer)
    hook = trainer.shared.parameters[3].register_hook(lambda gradient: gradient * float("nan"))
    stats = trainer.train(ADVANTAGES, *GROUPS)
    hook.remove()
    assert stats.left_out == 1 and np.isfinite(stats.loss) and not np.isfinite(stats.grad_norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    after, expected = trainer.train(ADVANTAGES, *GROUPS), plain.train(ADVANTAGES, *GROUPS)
    assert after.left_out == 0 and after.loss == expected.loss
    assert all(torch.equal(tensor, weights(plain)[name]) for name, tensor in weights(trainer).items())


def test_a_loss_that_is_not_finite_skips_the_step(folder: str) -> None:
    trainer = make(trainer_spec(folder))
    before = weights(trainer)
    stats = trainer.train([[float("inf"), 0.0, 0.0], [None] * 2, [0.0] * 4], *GROUPS)
    assert stats.left_out == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())


def test_the_reference_is_the_model_without_its_adapter(folder: str) -> None:
    spec = trainer_spec(folder, loss=LossSpec(beta=0.1), optimizer=OptimizerSpec(0.05, "constant", 0, 10))
    trainer = Trainer(spec)  # B is 0 as yet, so policy and reference are one
    assert trainer.train(ADVANTAGES, *GROUPS).kl == pytest.approx(0.0, abs=1e-7)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values = []
    with torch.no_grad():
        for g, row in enumerate(ADVANTAGES):
            for i, advantage in enumerate(row):
                if advantage is None:
                    continue
                log_ratio_T = alone_logprobs(base, GROUPS[g], i, 1.0)[0] - alone_logprobs(trainer.policy, GROUPS[g], i, 1.0)[0]
                values.append(torch.exp(log_ratio_T) - log_ratio_T - 1)
    expected = float(torch.cat(values).mean())
    assert expected > 1e-3
    stats = trainer.train(ADVANTAGES, *GROUPS)
    assert stats.kl == pytest.approx(expected, rel=1e-3)
    assert stats.trained_completions == 8  # with a KL term, one of advantage 0 is computed too


def batch(step: int) -> tuple[list[list[float]], list[RolloutGroup]]:
    groups = [random_group(p, c, seed=10 * step + i) for i, (p, c) in enumerate(((4, [3, 5]), (6, [2, 4, 4])))]
    return np.random.default_rng(step).normal(size=5).round(3).tolist(), groups


def step(trainer: Trainer, number: int) -> dict[str, Any]:
    flat, groups = batch(number)
    return losses(trainer.train([flat[:2], flat[2:]], *groups))


def resumable(folder: str) -> TrainerSpec:
    optimizer = OptimizerSpec(1e-2, "cosine", 1, 6, weight_decay=0.01, max_grad_norm=0.5)
    return trainer_spec(folder, optimizer=optimizer, dropout=0.3)


def test_a_resumed_run_repeats_the_one_that_went_on(folder: str, tmp_path: Path) -> None:
    straight = make(resumable(folder))
    expected = [step(straight, n) for n in range(5)]

    stopped = make(resumable(folder))
    older = []
    for n in range(2):
        assert step(stopped, n) == expected[n]
        header, buffer = published(stopped)  # which must not draw: `straight` publishes nothing
        older.append((header, buffer.copy()))
    step(stopped, 2)
    stopped.save(str(tmp_path), *older[0], *older[1])

    resumed = Trainer(resumable(folder))
    resumed.set_probe([5, 6, 7, 8, 9])
    restored = resumed.restore(str(tmp_path))
    assert [header for header, _ in restored] == [header for header, _ in older]
    for (_, found), (_, buffer) in zip(restored, older, strict=True):
        assert found.dtype == np.uint8 and np.array_equal(found, buffer)
    assert [step(resumed, n) for n in (3, 4)] == expected[3:]
    assert resumed.version == straight.version == 5
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    assert published(resumed)[0] == published(straight)[0]


def test_a_resumed_run_without_the_saved_draws_would_differ(folder: str, tmp_path: Path) -> None:
    """That the test above can fail: dropout makes the losses depend on the generator's state."""
    trainer = make(resumable(folder))
    step(trainer, 0)
    trainer.save(str(tmp_path))
    expected = step(trainer, 1)
    resumed = Trainer(resumable(folder))
    resumed.restore(str(tmp_path))
    torch.manual_seed(999)
    assert step(resumed, 1)["loss"] != expected["loss"]


def test_a_checkpoint_before_the_first_step_restores(folder: str, tmp_path: Path) -> None:
    trainer = make(resumable(folder))
    trainer.save(str(tmp_path))
    expected = [step(trainer, n) for n in range(2)]
    resumed = Trainer(resumable(folder))
    assert resumed.restore(str(tmp_path)) == []
    assert [step(resumed, n) for n in range(2)] == expected


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_in_the_checkpoint_is_never_opened(folder: str, tmp_path: Path) -> None:
    trainer = make(resumable(folder))
    step(trainer, 0)
    checkpoint, marker = tmp_path / "checkpoint", tmp_path / "marker"
    trainer.save(str(checkpoint))
    assert {file.suffix for file in checkpoint.iterdir()} <= {".safetensors", ".json", ".md"}
    names = ["adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "optimizer.bin", "optimizer.pt"]
    names += ["trainer.pt", "trainer.pkl", "scheduler.pt", "rng_state.pth", "training_args.bin", "policy-0.bin"]
    for name in names:
        (checkpoint / name).write_bytes(pickle.dumps(Payload(marker)))
    Trainer(resumable(folder)).restore(str(checkpoint))
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json"):
        hidden = (checkpoint / name).rename(tmp_path / name)
        with pytest.raises(FileNotFoundError):
            Trainer(resumable(folder)).restore(str(checkpoint))
        hidden.rename(checkpoint / name)
    assert not marker.exists()
    pickle.loads((checkpoint / names[0]).read_bytes())
    assert marker.exists(), "the payload does nothing, so the test proved nothing"


def test_max_grad_norm_0_clips_nothing(folder: str) -> None:
    def weights_after(limit: float) -> dict[str, torch.Tensor]:
        trainer = make(trainer_spec(folder, optimizer=OptimizerSpec(1e-2, "constant", 0, 10, max_grad_norm=limit)))
        trainer.train(ADVANTAGES, *GROUPS)
        return weights(trainer)

    unclipped, off = weights_after(1e9), weights_after(0.0)
    assert all(torch.equal(tensor, unclipped[name]) for name, tensor in off.items())
    assert any(tensor.abs().sum() > 0 for name, tensor in off.items() if "lora_B" in name)


def test_a_checkpoint_without_all_that_is_trained_is_refused(folder: str, tmp_path: Path) -> None:
    trainer = make(trainer_spec(folder))
    trainer.save(str(tmp_path))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    lost = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=f"1 trained tensors are missing, first {re.escape(lost)}"):
        make(trainer_spec(folder)).restore(str(tmp_path))
