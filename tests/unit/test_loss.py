"""The GRPO loss against TRL's own trainer: same model, same batch, loss and gradients of every parameter.

TRL generates nothing here: its `_generate` hands out a fixed batch with the engine's log-probabilities, and
everything after it (scoring, importance weights, reference, loss) is TRL's.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from actors.errors import ConfigError
from actors.loss import LossOutput, grpo_loss, token_weights
from actors.specs import LOSS_TYPES, LossSpec
from orchestrator.credit import combine_rewards, group_advantages

VOCAB = 24
GROUP = 4
PROMPTS = ([3, 4, 5], [6, 7])  # one group each, of different length
COMPLETION_LENGTHS = (7, 3, 5, 1, 6, 7, 2, 4)
MAX_COMPLETION_LENGTH = 9  # longer than any completion: dr_grpo divides by this, not by the padded length
LENGTH_REWARD = (1.0, 0.0, 0.5, None, 2.0, -1.0, 0.25, 0.5)
STYLE_REWARD = (None, 0.5, 0.0, None, 1.0, 0.0, 0.0, None)
REWARD_WEIGHTS = {"length": 1.0, "style": 0.5}
CAP = 1.5
MODEL_INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
STATISTICS = (
    "tokens",
    "kl_sum",
    "ratio_sum",
    "clipped_sum",
    "mismatch_sum",
    "importance_sum",
    "truncated_sum",
)
UNREPORTED = (2, 1)  # sequence, token whose logprob the engine did not report
RELATIVE = 1e-5

CASES = [
    pytest.param(loss_type, level, beta, id=f"{loss_type}-{level}-beta{beta}")
    for loss_type, level, beta in itertools.product(LOSS_TYPES, ("token", "sequence"), (0.0, 0.1))
]


class FixedRollouts(GRPOTrainer):
    """TRL's trainer, with `rollouts` (what its `_generate` returns) in place of generation."""

    rollouts: tuple

    def _generate(self, prompts):
        return self.rollouts


@dataclass(frozen=True)
class Batch:
    """One batch as TRL scored it, and the engine's logprobs, padded with NaN [B, T]."""

    trainer: GRPOTrainer
    model: nn.Module
    inputs: dict[str, Tensor]
    rollout_logprobs_BT: Tensor


def length_reward(completions, **columns):
    return list(LENGTH_REWARD)


def style_reward(completions, **columns):
    return list(STYLE_REWARD)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is too small to share: threads would only wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama and a tokenizer of VOCAB words, on disk, where TRL loads its policies from."""
    path = tmp_path_factory.mktemp("policy")
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def perturb(model: nn.Module, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def model_logprobs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logprobs of the completion tokens [B, T] by the plain forward pass, without TRL's fused head."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1]
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
    return logprobs[:, -inputs["completion_ids"].shape[1] :]


def trl_batch(policy_dir: Path, spec: LossSpec, output_dir: Path, scale_rewards: str = "group") -> Batch:
    """TRL's trainer and the batch it scored. Reference, old policy, current policy and engine all differ."""
    args = GRPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=len(COMPLETION_LENGTHS),
        num_generations=GROUP,
        max_completion_length=spec.max_completion_length,
        loss_type=spec.loss_type,
        epsilon=spec.epsilon_low,
        epsilon_high=spec.epsilon_high,
        beta=spec.beta,
        importance_sampling_level=spec.importance_sampling_level,
        vllm_importance_sampling_correction=spec.importance_sampling_cap is not None,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=spec.importance_sampling_cap or 3.0,
        scale_rewards=scale_rewards,
        reward_weights=list(REWARD_WEIGHTS.values()),
        model_init_kwargs={"dtype": "float32"},
        steps_per_generation=1,
        num_iterations=2,  # so that TRL computes old_per_token_logps when it does not correct for the engine
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    trainer = FixedRollouts(
        model=str(policy_dir),
        reward_funcs=[length_reward, style_reward],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "w3"}]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(policy_dir),
    )
    # Set late, so that no engine starts; TRL still does with the logprobs what it does with those of vLLM.
    trainer.use_vllm = True
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model
    assert isinstance(model, nn.Module)
    model.train()
    perturb(model, seed=1, size=0.02)

    generator = torch.Generator().manual_seed(2)
    prompts = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    completions = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in COMPLETION_LENGTHS]
    noise_BT = 0.3 * torch.randn(len(completions), max(COMPLETION_LENGTHS), generator=generator)
    rollout: list[list[float | None]] = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1], dim=-1)
        chosen = logprobs.gather(-1, torch.tensor(completion).unsqueeze(-1)).squeeze(-1)
        rollout.append((chosen + noise_BT[row, : len(completion)]).tolist())
    rollout[UNREPORTED[0]][UNREPORTED[1]] = None

    texts = ["".join(f"w{i} " for i in completion) for completion in completions]
    trainer.rollouts = (prompts, completions, None, texts, rollout, {}, None, None)
    inputs = trainer._generate_and_score_completions([{"prompt": "w3"} for _ in prompts])
    perturb(model, seed=3, size=0.04)

    rollout_BT = torch.full(inputs["completion_ids"].shape, math.nan)
    for row, reported in enumerate(rollout):
        rollout_BT[row, : len(reported)] = torch.tensor([math.nan if x is None else x for x in reported])
    return Batch(trainer, model, inputs, rollout_BT)


def our_loss(batch: Batch, spec: LossSpec, rows: list[int] | None = None, advantages_B: Tensor | None = None):
    """Our loss of the given rows, as a part of a step of the whole batch."""
    inputs = batch.inputs
    rows = list(range(len(COMPLETION_LENGTHS))) if rows is None else rows
    part = {name: inputs[name][rows] for name in MODEL_INPUTS}
    advantages_B = inputs["advantages"] if advantages_B is None else advantages_B
    mask_BT = part["completion_mask"]
    weights_B = token_weights(
        mask_BT.sum(-1), sequences=len(COMPLETION_LENGTHS), tokens=sum(COMPLETION_LENGTHS), spec=spec
    )
    return grpo_loss(
        model_logprobs(batch.model, part),
        inputs["old_per_token_logps"][rows],
        batch.rollout_logprobs_BT[rows],
        inputs["ref_per_token_logps"][rows] if spec.beta else None,
        advantages_B[rows],
        mask_BT,
        weights_B,
        spec,
    )


def gradients(model: nn.Module) -> Tensor:
    """All gradients as one vector, and none left behind."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


def case_spec(loss_type: str, level: str, beta: float, cap: float | None = CAP) -> LossSpec:
    """Bounds so near to 1 that some ratios of the batch lie beyond each of them, at either level."""
    epsilon_high = 1.03 if loss_type == "cispo" else 0.03
    return LossSpec(loss_type, 0.02, epsilon_high, beta, level, cap, MAX_COMPLETION_LENGTH)


@pytest.mark.parametrize(("loss_type", "level", "beta"), CASES)
def test_loss_and_gradients_are_those_of_trl(loss_type, level, beta, policy_dir, tmp_path):
    spec = case_spec(loss_type, level, beta)
    batch = trl_batch(policy_dir, spec, tmp_path)
    model = batch.model

    theirs = batch.trainer.compute_loss(model, batch.inputs)
    theirs.backward()
    their_gradients = gradients(model)

    ours = our_loss(batch, spec)
    ours.loss.backward()

    assert ours.loss.item() == pytest.approx(theirs.item(), rel=RELATIVE)
    assert relative_error(gradients(model), their_gradients) < RELATIVE
    assert_statistics_are_those_of_trl(ours, batch.trainer, spec)

    # The comparison says nothing about clipping and truncation unless both happen.
    assert 0 < ours.truncated_sum < ours.tokens
    ratio_BT, advantages_BT = policy_ratios(batch, spec)
    if loss_type == "cispo":
        assert (ratio_BT > spec.epsilon_high).any() and (ratio_BT < spec.epsilon_high).any()
    else:
        assert ((ratio_BT < 1 - spec.epsilon_low) & (advantages_BT < 0)).any()
        assert ((ratio_BT > 1 + spec.epsilon_high) & (advantages_BT > 0)).any()
        assert 0 < ours.clipped_sum < ours.tokens


def policy_ratios(batch: Batch, spec: LossSpec) -> tuple[Tensor, Tensor]:
    """pi / pi_old and advantages of the tokens under the mask, flat, sequence by sequence."""
    mask_BT = batch.inputs["completion_mask"].bool()
    with torch.no_grad():
        log_ratio_BT = model_logprobs(batch.model, batch.inputs) - batch.inputs["old_per_token_logps"]
    if spec.importance_sampling_level == "sequence":
        means = [row[mask].mean() for row, mask in zip(log_ratio_BT, mask_BT, strict=True)]
        log_ratio_BT = torch.stack(means).unsqueeze(1).expand_as(log_ratio_BT)
    advantages_BT = batch.inputs["advantages"].unsqueeze(1).expand_as(log_ratio_BT)
    return log_ratio_BT[mask_BT].exp(), advantages_BT[mask_BT]


def assert_statistics_are_those_of_trl(ours: LossOutput, trainer: GRPOTrainer, spec: LossSpec) -> None:
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    tokens = ours.tokens.item()
    assert tokens == sum(COMPLETION_LENGTHS)
    assert (ours.importance_sum / tokens).item() == pytest.approx(
        metrics["sampling/importance_sampling_ratio/mean"], rel=1e-5
    )
    # TRL averages the difference over the tokens that the engine reported; ours counts the others as 0.
    assert (ours.mismatch_sum / (tokens - 1)).item() == pytest.approx(
        metrics["sampling/sampling_logp_difference/mean"], rel=1e-4
    )
    if spec.beta:
        assert (ours.kl_sum / tokens).item() == pytest.approx(metrics["kl"], rel=1e-4)
    else:
        assert ours.kl_sum == 0
    if spec.importance_sampling_level == "token":  # at sequence level TRL counts sequences, we count tokens
        clipped = "cispo_clip_ratio" if spec.loss_type == "cispo" else "clip_ratio/region_mean"
        assert (ours.clipped_sum / tokens).item() == pytest.approx(metrics[clipped], rel=1e-5)


def test_without_a_cap_the_engine_is_trusted_as_in_trl(policy_dir, tmp_path):
    spec = case_spec("dapo", "token", 0.0, cap=None)
    batch = trl_batch(policy_dir, spec, tmp_path)
    theirs = batch.trainer.compute_loss(batch.model, batch.inputs)
    assert "importance_sampling_ratio" not in batch.inputs
    assert our_loss(batch, spec).loss.item() == pytest.approx(theirs.item(), rel=RELATIVE)
    with_cap = our_loss(batch, case_spec("dapo", "token", 0.0))
    assert with_cap.loss.item() != pytest.approx(theirs.item(), rel=1e-3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(scale, policy_dir, tmp_path):
    batch = trl_batch(policy_dir, LossSpec(), tmp_path, scale_rewards=scale)
    rewards = combine_rewards({"length": LENGTH_REWARD, "style": STYLE_REWARD}, REWARD_WEIGHTS)
    groups = group_advantages([rewards[:GROUP], rewards[GROUP:]], scale)
    ours = [0.0 if advantage is None else advantage for group in groups for advantage in group]
    assert ours == pytest.approx(batch.inputs["advantages"].tolist(), rel=1e-5, abs=1e-6)


def test_rloo_is_dr_grpo_times_a_constant():
    """Of the first update on a batch, as TRL's RLOOTrainer has it: baselines leave one out, ratios are of whole sequences."""
    groups, size, tokens = 3, 4, 5
    rewards_GN = torch.rand(groups, size, generator=torch.Generator().manual_seed(0))
    logprobs_BT = torch.randn(groups * size, tokens, generator=torch.Generator().manual_seed(1)).requires_grad_()
    mask_BT = torch.arange(tokens)[None] < torch.randint(1, tokens + 1, (groups * size, 1))

    baselines_GN = (rewards_GN.sum(1, keepdim=True) - rewards_GN) / (size - 1)
    ratios_B = torch.exp(((logprobs_BT - logprobs_BT.detach()) * mask_BT).sum(-1))
    (rloo_BT,) = torch.autograd.grad(-(ratios_B * (rewards_GN - baselines_GN).flatten()).mean(), logprobs_BT)

    spec = LossSpec("dr_grpo", importance_sampling_cap=None, max_completion_length=7)
    advantages_B = torch.tensor(group_advantages(rewards_GN.tolist(), "none")).flatten()
    lengths_B = mask_BT.sum(-1)
    weights_B = token_weights(lengths_B, sequences=groups * size, tokens=int(lengths_B.sum()), spec=spec)
    now = logprobs_BT.detach()
    loss = grpo_loss(logprobs_BT, now, now, None, advantages_B, mask_BT, weights_B, spec).loss
    (ours_BT,) = torch.autograd.grad(loss, logprobs_BT)
    torch.testing.assert_close(ours_BT * spec.max_completion_length * size / (size - 1), rloo_BT)


@pytest.fixture(scope="module")
def batch(policy_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    """A batch with reference logprobs, for the tests that compare our loss with itself under another cut."""
    return trl_batch(policy_dir, case_spec("dapo", "token", 0.1), tmp_path_factory.mktemp("trl"))


@pytest.mark.parametrize(("loss_type", "level", "beta"), CASES)
def test_micro_batches_of_any_size_add_up_to_the_batch(loss_type, level, beta, batch):
    spec = case_spec(loss_type, level, beta)
    whole = our_loss(batch, spec)
    whole.loss.backward()
    whole_gradients = gradients(batch.model)

    parts = [our_loss(batch, spec, rows) for rows in ([5], [0, 3, 7], [1, 2, 4, 6])]
    for part in parts:
        part.loss.backward()

    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=RELATIVE)
    assert relative_error(gradients(batch.model), whole_gradients) < RELATIVE
    for name in STATISTICS:
        total = sum(getattr(part, name).item() for part in parts)
        assert total == pytest.approx(getattr(whole, name).item(), rel=RELATIVE), name


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sequences_of_zero_advantage_may_be_left_out(loss_type, level, batch):
    spec = case_spec(loss_type, level, 0.0)
    advantages_B = batch.inputs["advantages"].clone()
    advantages_B[[0, 4, 5]] = 0.0
    our_loss(batch, spec, advantages_B=advantages_B).loss.backward()
    with_them = gradients(batch.model)
    rows = [row for row in range(len(COMPLETION_LENGTHS)) if advantages_B[row] != 0.0]
    assert len(rows) == 4  # the unscored one is left out as well
    our_loss(batch, spec, rows, advantages_B).loss.backward()
    assert relative_error(gradients(batch.model), with_them) < RELATIVE


def test_a_hand_computed_batch():
    """Two sequences, three tokens in all, every rule of the token loss once.

    token      ratio  advantage  min(ratio A, clipped A)     engine weight       token loss
    a0         1.5    1          min(1.5, 1.2)  = 1.2        2, below the cap    -2.4
    a1         0.5    1          min(0.5, 0.8)  = 0.5        8, truncated to 3   -1.5
    b0         0.5    -2         min(-1, -1.6)  = -1.6       not reported: 1      1.6
    """
    old = torch.tensor([[-1.0, -2.0], [-3.0, 50.0]])
    logprobs = (old + torch.log(torch.tensor([[1.5, 0.5], [0.5, 1.0]]))).requires_grad_()
    rollout = old - torch.log(torch.tensor([[2.0, 8.0], [math.nan, math.nan]]))
    mask = torch.tensor([[1, 1], [1, 0]])
    advantages = torch.tensor([1.0, -2.0])
    expected = {"dapo": -2.3 / 3, "grpo": ((-2.4 - 1.5) / 2 + 1.6) / 2, "dr_grpo": -2.3 / (2 * 10)}
    for loss_type, loss in expected.items():
        spec = LossSpec(loss_type=loss_type, max_completion_length=10)
        weights = token_weights(mask.sum(-1), sequences=2, tokens=3, spec=spec)
        out = grpo_loss(logprobs, old, rollout, None, advantages, mask, weights, spec)
        assert out.loss.item() == pytest.approx(loss, rel=1e-6), loss_type
        assert (out.tokens, out.clipped_sum, out.truncated_sum) == (3, 2, 1)
        assert out.ratio_sum.item() == pytest.approx(2.5)
        assert out.importance_sum.item() == pytest.approx(6.0)
        assert out.mismatch_sum.item() == pytest.approx(math.log(2) + math.log(8))

    # Only a1 is unclipped: d loss / d logprob = -ratio * advantage * engine weight / (2 * 10).
    out.loss.backward()
    assert logprobs.grad.tolist() == [[0.0, pytest.approx(-0.5 * 3 / 20)], [0.0, 0.0]]


def test_kl_is_weighted_by_a_ratio_that_takes_a_gradient():
    """pi_ref / pi = 2 and ratio 1: k3 = 2 - ln 2 - 1; its gradient: -1 from k3 itself, k3 from the ratio."""
    logprobs = torch.tensor([[-1.0]], requires_grad=True)
    ref = torch.tensor([[-1.0 + math.log(2)]])
    spec = LossSpec(beta=0.5)
    one = torch.ones(1)
    out = grpo_loss(
        logprobs, logprobs.detach(), logprobs.detach(), ref, torch.zeros(1), torch.ones(1, 1), one, spec
    )
    out.loss.backward()
    k3 = 2 - math.log(2) - 1
    assert out.kl_sum.item() == pytest.approx(k3, rel=1e-6)
    assert out.loss.item() == pytest.approx(0.5 * k3, rel=1e-6)
    assert logprobs.grad.item() == pytest.approx(0.5 * (k3 - 1), rel=1e-6)


def test_padding_may_hold_anything():
    logprobs = torch.tensor([[-1.0, 500.0, -math.inf]], requires_grad=True)
    spec = LossSpec(beta=0.1)
    filler = torch.tensor([[-1.0, -500.0, math.nan]])
    out = grpo_loss(
        logprobs, filler, filler, filler, torch.ones(1), torch.tensor([[1, 0, 0]]), torch.ones(1), spec
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(-1.0)
    assert logprobs.grad.tolist() == [[pytest.approx(-1.0), 0.0, 0.0]]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"loss_type": "ppo"}, "dr_grpo"),
        ({"importance_sampling_level": "word"}, "sequence"),
        ({"importance_sampling_cap": 0.0}, "importance_sampling_cap"),
    ],
)
def test_an_impossible_spec_names_the_fix(fields, named):
    with pytest.raises(ConfigError, match=named):
        LossSpec(**fields)
