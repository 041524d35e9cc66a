"""The policy-gradient loss of GRPO and its relatives, as pure functions of log-probabilities.

One optimizer step is one batch of sequences, cut into micro-batches of any size and spread over any number of
ranks. `token_weights` turns the counts of the whole step into one weight per sequence; `grpo_loss` sums
weighted token losses. The sum over micro-batches and ranks is then the loss of the step, however it was cut.
Nothing here knows a model, a tokenizer or a device. The numbers are those of `trl.GRPOTrainer` with its
defaults, except that the correction for the engine's log-probabilities truncates per token (see
`_engine_weights`).

A new loss type gets its name in LOSS_TYPES of specs.py, its token loss in `_policy_loss` and its normalizer in
`token_weights`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.specs import LossSpec


@dataclass(frozen=True)
class LossOutput:
    """The loss of a micro-batch, and sums over its tokens.

    All are scalars; only `loss` has a gradient. Sums of micro-batches and ranks add up;
    divide by the sum of `tokens`.
    """

    loss: Tensor  # this micro-batch's share of the step's loss
    tokens: Tensor  # completion tokens under the mask
    kl_sum: Tensor  # KL to the reference, as it enters the loss before beta; 0 when beta is 0
    ratio_sum: Tensor  # pi / pi_old
    clipped_sum: Tensor  # tokens with a clipped ratio, hence no policy gradient (cispo: a capped one)
    mismatch_sum: Tensor  # |log pi_old - log pi_engine|, nats
    importance_sum: Tensor  # weights pi_old / pi_engine after truncation
    truncated_sum: Tensor  # tokens whose weight was truncated


def token_weights(lengths_B: Tensor, *, sequences: int, tokens: int, spec: LossSpec) -> Tensor:
    """Weight of each completion token of each sequence in the loss of the step, [B] fp32.

    lengths_B: [B], completion tokens under the mask. `sequences` and `tokens` count the whole optimizer step:
    every micro-batch of every rank, and the sequences left out because their advantage is zero. A trainer
    whose ranks average their gradients (DDP, FSDP) multiplies by the number of ranks.

    Normalizers: grpo, mean of the means of the sequences (DeepSeekMath, arXiv:2402.03300, eq. 3); dr_grpo, a
    constant length (arXiv:2503.20783); dapo and cispo, the step's tokens (DAPO, arXiv:2503.14476, eq. 8);
    bnpo, the batch's tokens, and the batch is the whole step here.
    """
    if spec.loss_type == "grpo":
        return 1.0 / (lengths_B.float().clamp(min=1.0) * sequences)
    count = sequences * spec.max_completion_length if spec.loss_type == "dr_grpo" else max(tokens, 1)
    return torch.full(lengths_B.shape, 1.0 / count, dtype=torch.float32, device=lengths_B.device)


def grpo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    rollout_logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor | None,
    advantages_B: Tensor,
    mask_BT: Tensor,
    weights_B: Tensor,
    spec: LossSpec,
) -> LossOutput:
    """The weighted sum of the token losses of one micro-batch.

    logprobs_BT: [B, T], nats, of the policy being trained; the only input that takes a gradient.
    old_logprobs_BT: [B, T], of the trainer's policy before it first updates on these tokens; where that is
    the policy of `logprobs_BT` itself (one iteration per batch), `logprobs_BT.detach()`.
    rollout_logprobs_BT: [B, T], as the engine reported them while sampling; NaN = not reported, weight 1.
    ref_logprobs_BT: [B, T], of the reference policy; may be None when beta is 0.
    advantages_B: [B]. mask_BT: [B, T], bool or 0/1, true where a completion token counts; elsewhere every
    input may hold anything. weights_B: [B], from `token_weights`. All computed in fp32.
    """
    mask_BT = mask_BT.bool()
    # Padding becomes 0 in every input: exp() of what lies there could overflow, and inf * 0 is NaN.
    logprobs_BT = logprobs_BT.float().masked_fill(~mask_BT, 0.0)
    old_logprobs_BT = old_logprobs_BT.detach().float().masked_fill(~mask_BT, 0.0)
    rollout_logprobs_BT = rollout_logprobs_BT.detach().float().masked_fill(~mask_BT, 0.0)

    log_ratio_BT = logprobs_BT - old_logprobs_BT
    if spec.importance_sampling_level == "sequence":
        # GSPO, arXiv:2507.18071, eq. 7: one ratio per sequence, the geometric mean of its tokens' ratios.
        lengths_B1 = mask_BT.sum(-1, keepdim=True).clamp(min=1)
        log_ratio_BT = (log_ratio_BT.sum(-1, keepdim=True) / lengths_B1).expand_as(logprobs_BT)
    ratio_BT = torch.exp(log_ratio_BT)

    loss_BT, clipped_BT = _policy_loss(ratio_BT, logprobs_BT, advantages_B.float().unsqueeze(1), spec)

    mismatch_BT = torch.nan_to_num(old_logprobs_BT - rollout_logprobs_BT, nan=0.0)
    importance_BT, truncated_BT = _engine_weights(mismatch_BT, spec.importance_sampling_cap)
    loss_BT = loss_BT * importance_BT

    kl_BT = torch.zeros_like(loss_BT)
    if spec.beta != 0.0:
        assert ref_logprobs_BT is not None, "beta is not 0, so the loss needs the reference policy's logprobs"
        kl_BT = _kl(logprobs_BT, ref_logprobs_BT.detach().float().masked_fill(~mask_BT, 0.0), ratio_BT)
        loss_BT = loss_BT + spec.beta * kl_BT

    def token_sum(x_BT: Tensor) -> Tensor:
        return (x_BT.detach() * mask_BT).sum()

    return LossOutput(
        loss=(loss_BT * mask_BT * weights_B.float().unsqueeze(1)).sum(),
        tokens=mask_BT.sum(),
        kl_sum=token_sum(kl_BT),
        ratio_sum=token_sum(ratio_BT),
        clipped_sum=token_sum(clipped_BT),
        mismatch_sum=token_sum(mismatch_BT.abs()),
        importance_sum=token_sum(importance_BT),
        truncated_sum=token_sum(truncated_BT),
    )


def _policy_loss(
    ratio_BT: Tensor, logprobs_BT: Tensor, advantages_B1: Tensor, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """Token losses [B, T] without KL, and where the ratio was clipped, bool [B, T].

    cispo caps the ratio and keeps the gradient of every token (MiniMax-M1, arXiv:2506.13585, eq. 4 and 5,
    without a lower bound). The others are PPO's clipped surrogate (arXiv:1707.06347, eq. 7), with DAPO's two
    epsilons.
    """
    if spec.loss_type == "cispo":
        capped_BT = ratio_BT.detach().clamp(max=spec.epsilon_high)
        return -capped_BT * advantages_B1 * logprobs_BT, (ratio_BT > spec.epsilon_high) & (advantages_B1 > 0)
    low, high = 1.0 - spec.epsilon_low, 1.0 + spec.epsilon_high
    loss_BT = -torch.min(ratio_BT * advantages_B1, ratio_BT.clamp(low, high) * advantages_B1)
    clipped_BT = ((ratio_BT < low) & (advantages_B1 < 0)) | ((ratio_BT > high) & (advantages_B1 > 0))
    return loss_BT, clipped_BT


def _kl(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, ratio_BT: Tensor) -> Tensor:
    """KL(pi || pi_ref) per token: the k3 estimator (DeepSeekMath, arXiv:2402.03300, eq. 4) times the ratio.

    The tokens come from pi_old, so the ratio makes the estimate one under pi; and as the ratio takes a
    gradient, the gradient is that of the reverse KL, also where the ratio is 1 (DeepSeek-V3.2,
    arXiv:2512.02556).
    """
    log_ref_ratio_BT = ref_logprobs_BT - logprobs_BT
    return (torch.exp(log_ref_ratio_BT) - log_ref_ratio_BT - 1.0) * ratio_BT


def _engine_weights(mismatch_BT: Tensor, cap: float | None) -> tuple[Tensor, Tensor]:
    """Weights pi_old / pi_engine [B, T], at most `cap`, and where they were truncated, bool [B, T].

    The tokens were sampled by another program in another precision, perhaps with an older policy; truncated
    importance sampling bounds the variance of the correction (Ionides 2008, "Truncated Importance Sampling").
    Per token, for both levels of the policy ratio: the weight of a whole sequence is the product of its
    tokens' weights, so rounding noise alone drives it to 0 or to the cap as completions grow, and masking
    what lies above the cap, TRL's default, then drops the long completions.
    """
    if cap is None:
        return torch.ones_like(mismatch_BT), torch.zeros_like(mismatch_BT, dtype=torch.bool)
    weights_BT = torch.exp(mismatch_BT)
    return weights_BT.clamp(max=cap), weights_BT > cap
