"""TRL's fused head on CPUs: log-probabilities of tokens out of hidden states, without all logits in memory at once.

TRL 1.16 has a kernel for GPUs. Without one its torch code computes every position, also those that train nothing, makes several
fp32 copies of the logits, and a frozen head's logits once more in the backward pass; of a small model's step that is 40 %. The
kernel here works on logits in the processor's cache. All around it is TRL's: which models scale or cap their logits, and what
gathers sharded weights. Models that TRL would compute other logits of are refused by `ensure_plain`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors import attention, device
from actors.errors import ConfigError

LOGITS_AT_ONCE = 2**25  # so many that reading the head's weights is not what takes the time
FP32_LOGITS_AT_ONCE = 2**21  # 8 MiB, which stay in a processor's cache
WORDS_AT_ONCE = 4096  # whose gradients are summed: torch first copies to fp32 what it adds to fp32
# Keys of configurations by which TRL knows what becomes of logits
SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")  # in the order of what TRL's kernel returns


class FusedHead:
    """Mixed into trainers whose loss calls `model(..., fused_lm_head=True)`."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        with kernel():
            return super().compute_loss(*args, **kwargs)  # type: ignore[misc]


def kernel() -> AbstractContextManager[None]:
    """In it, heads that TRL fused compute with the device's kernel; a GPU's is TRL's own."""
    return nullcontext() if device.has_gpu() else _in_place_of_trl()


@contextmanager
def _in_place_of_trl() -> Iterator[None]:
    from trl.trainer import utils

    theirs, only_labels = utils._ChunkedLogProbFunction, utils._use_triton
    utils._ChunkedLogProbFunction, utils._use_triton = CpuKernel, lambda device: True
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = theirs, only_labels


def ensure_plain(model: Any, name: str) -> None:
    """Raises ConfigError for a loaded model whose logits are not its head's product with what its layers put out, so that TRL's
    fused head would compute others.

    Seen at a first layer without weights. What cannot be built so is taken for a plain one.
    """
    seen: dict[str, Any] = {}

    def watch(layer: Any) -> None:
        layer.base_model.register_forward_hook(lambda module, given, out: seen.update(states=out[0]))
        layer.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.update(given=given[0], made=out))

    attention.register()
    try:
        # With attention that transformers does not know, since it looks into no mask then.
        seen["logits"] = attention.first_layer_out(type(model), model.config, attention.NAME, watch).logits
    except Exception:  # the code of any model runs here
        return
    config = model.config.get_text_config()
    scaled = any(getattr(config, key, None) is not None for key in SCALES)
    if not scaled and not (_one_memory(seen["states"], seen["given"]) and _one_memory(seen["made"], seen["logits"])):
        text = "has logits that are more than a product of its head, whose log-probabilities are not implemented yet"
        raise ConfigError(f"base_model: {name} {text}; use a model of transformers whose head is one linear layer")


def _one_memory(one: Tensor, other: Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


@dataclass(frozen=True)
class LogitShape:
    """What becomes of W h + b: z = softcap tanh(scale (W h + b) / softcap) / temperature."""

    scale: float
    softcap: float | None  # None = no cap
    temperature: float

    def apply_(self, logits: Tensor) -> Tensor:
        """z, in place of W h + b."""
        if self.softcap is None:
            return logits.mul_(self.scale / self.temperature)
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope_(self, z: Tensor) -> Tensor | float:
        """dz / d(W h + b), in place of z."""
        steepest = self.scale / self.temperature
        if self.softcap is None:
            return steepest
        return z.mul_(self.temperature / self.softcap).square_().neg_().add_(1).mul_(steepest)


class CpuKernel(torch.autograd.Function):
    """log softmax(z) at each position's target; is called as TRL's ChunkedLogProbFunction is.

    Of a frozen head the gradient's direction in h is known in the forward pass, d log p(t) / dh = sum over v of
    ((1 if v is t else 0) - p(v)) dz(v) / dh, and takes no more room than h. Of one that is trained the backward pass makes the
    logits again.
    """

    @staticmethod
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled anew for each number of positions
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        scale: float,
        outputs: Sequence[str],
    ) -> tuple[Tensor | None, ...]:
        """Log-probabilities and those of OPTIONAL that are asked for, each [N] fp32 (is_top1 bool); None for the others.

        The log-probabilities alone take a gradient. Products have the dtype of autocast or, without it, of hidden_NH; all else
        is fp32, sums over several products too. chunk_size: of TRL's kernel.
        """
        kind = hidden_NH.device.type
        ctx.product_dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden_NH.dtype
        ctx.shape = LogitShape(scale, softcap, temperature)
        ctx.trained = any(ctx.needs_input_grad[1:3])
        differentiate = ctx.needs_input_grad[0] and not ctx.trained
        names = ["log_probs", *(name for name in OPTIONAL if name in outputs)]
        hidden, weight = hidden_NH.to(ctx.product_dtype), weight_VH.to(ctx.product_dtype)
        tiles: list[dict[str, Tensor]] = []
        direction_NH = torch.empty_like(hidden) if differentiate else None
        for here, measured, slopes in _tiles(hidden, weight, bias_V, targets_N, ctx.shape, names, slopes=differentiate):
            tiles.append(measured)
            if direction_NH is not None:
                torch.mm(slopes, weight, out=direction_NH[here])
        found = _joined(tiles)
        ctx.hidden_dtype = hidden_NH.dtype
        ctx.save_for_backward(*((hidden_NH, weight_VH, bias_V, targets_N) if ctx.trained else [direction_NH]))
        optional = [found.get(name) for name in OPTIONAL]
        ctx.mark_non_differentiable(*(values for values in optional if values is not None))
        return found["log_probs"], *optional

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            (direction_NH,) = ctx.saved_tensors
            return (grad_N[:, None] * direction_NH).to(ctx.hidden_dtype), *[None] * 8
        from trl.trainer.utils import maybe_gather_lm_head_ctx

        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        with maybe_gather_lm_head_ctx(weight_VH, bias_V):
            hidden, weight = hidden_NH.to(ctx.product_dtype), weight_VH.to(ctx.product_dtype)
            grad_NH = torch.empty_like(hidden_NH)
            grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
            grad_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
            for here, _, slopes in _tiles(hidden, weight, bias_V, targets_N, ctx.shape, [], slopes=True):
                grad_n1 = grad_N[here, None]
                grad_NH[here] = grad_n1 * (slopes @ weight)
                weighted_nH = (grad_n1 * hidden[here]).to(ctx.product_dtype)
                for first in range(0, len(weight), WORDS_AT_ONCE):
                    words = slice(first, first + WORDS_AT_ONCE)
                    grad_VH[words] += slopes[:, words].T @ weighted_nH
                    if grad_V is not None:
                        grad_V[words] += (grad_n1 * slopes[:, words]).sum(0)
            return grad_NH, grad_VH.to(weight_VH.dtype), None if grad_V is None else grad_V.to(bias_V.dtype), *[None] * 6


def _tiles(
    hidden: Tensor,
    weight: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    shape: LogitShape,
    names: Sequence[str],
    *,
    slopes: bool,
) -> Iterator[tuple[slice, dict[str, Tensor], Tensor]]:
    """A few positions after the other: which they are, what there is to know of them, and d log p(target) / d(W h + b), [n, V].

    hidden and weight: of one dtype, which is also that of the slopes; these are to be read before the next ones are asked for.
    slopes: without them the last part means nothing.
    """
    at_once, in_cache = (max(1, elements // len(weight)) for elements in (LOGITS_AT_ONCE, FP32_LOGITS_AT_ONCE))
    room = hidden.new_empty(min(at_once, len(hidden)), len(weight))
    z_room, p_room = torch.empty(2, min(in_cache, len(hidden)), len(weight))
    for start in range(0, max(1, len(hidden)), at_once):
        here = slice(start, start + at_once)
        tile = torch.mm(hidden[here], weight.T, out=room[: len(hidden[here])])
        parts: list[dict[str, Tensor]] = []
        for part, targets_k in zip(tile.split(in_cache), targets_N[here].split(in_cache), strict=True):
            z_kV, p_kV = z_room[: len(part)].copy_(part), p_room[: len(part)]
            if bias_V is not None:
                z_kV.add_(bias_V)
            parts.append(_measure(shape.apply_(z_kV), p_kV, targets_k, names))
            if slopes:
                ones_k1 = torch.ones(len(part), 1)
                part.copy_(p_kV.neg_().scatter_add_(-1, targets_k[:, None], ones_k1).mul_(shape.slope_(z_kV)))
        yield here, _joined(parts), tile


def _joined(measured: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in measured]) for name in measured[0]}


def _measure(z_kV: Tensor, p_kV: Tensor, targets_k: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What is asked for of each position, [k]; writes softmax(z) to p_kV."""
    top_k1 = z_kV.amax(-1, keepdim=True)
    norm_k1 = torch.sub(z_kV, top_k1, out=p_kV).exp_().sum(-1, keepdim=True)
    p_kV.div_(norm_k1)
    log_norm_k = (top_k1 + norm_k1.log()).squeeze(-1)
    of: dict[str, Callable[[], Tensor]] = {
        "log_probs": lambda: z_kV.gather(-1, targets_k[:, None]).squeeze(-1) - log_norm_k,
        "entropy": lambda: log_norm_k - (p_kV * z_kV).sum(-1),
        "log_sum_sq_probs": lambda: p_kV.square().sum(-1).log(),
        "mean_logits": lambda: z_kV.mean(-1),
        "is_top1": lambda: z_kV.argmax(-1) == targets_k,
    }
    return {name: of[name]() for name in names}
