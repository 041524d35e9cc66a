"""The head's kernel on CPUs against torch's log_softmax and autograd, and inside TRL's fused head against a model's logits; and
which models have a head that it computes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniCPM3Config,
    ModernBertDecoderConfig,
    RobertaConfig,
)
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils
from trl.trainer.utils import add_fused_lm_head

from actors import device, head
from actors.errors import ConfigError
from tests.tiny import save_llama

N, H, V = 23, 12, 40  # positions, hidden numbers, words
CASES = {  # temperature, softcap, scale, whether there is a bias
    "plain": (1.0, None, 1.0, False),
    "capped": (0.7, 5.0, 0.5, True),
    "scaled": (1.3, None, 2.0, True),
}


def drawn(dtype: torch.dtype = torch.float32, *, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Hidden states, weights, bias and targets, half of which are the likeliest words."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH, weight_VH, bias_V = (torch.randn(shape, generator=generator).to(dtype) for shape in ((N, H), (V, H), (V,)))
    targets_N = torch.randint(V, (N,), generator=generator)
    targets_N[::2] = (hidden_NH.float() @ weight_VH.float().T).argmax(-1)[::2]
    return hidden_NH, weight_VH, bias_V if bias else None, targets_N


def expected(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float, softcap: float | None,
    scale: float,
) -> dict[str, Tensor]:  # fmt: skip
    logits_NV = scale * torch.nn.functional.linear(hidden_NH, weight_VH, bias_V)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    logits_NV = logits_NV / temperature
    logprobs_NV = logits_NV.log_softmax(-1)
    return {
        "log_probs": logprobs_NV.gather(-1, targets_N[:, None])[:, 0],
        "entropy": -(logprobs_NV.exp() * logprobs_NV).sum(-1),
        "log_sum_sq_probs": logprobs_NV.exp().square().sum(-1).log(),
        "mean_logits": logits_NV.mean(-1),
        "is_top1": logits_NV.argmax(-1) == targets_N,
    }


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of several parts each, the last ones shorter."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 10 * V)
    monkeypatch.setattr(head, "FP32_LOGITS_AT_ONCE", 4 * V)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, trained: bool) -> None:
    temperature, softcap, scale, bias = CASES[case]
    hidden_NH, weight_VH, bias_V, targets_N = drawn(bias=bias)
    leaves = [hidden_NH, *([weight_VH] if trained else []), *([bias_V] if trained and bias_V is not None else [])]
    for leaf in leaves:
        leaf.requires_grad_()
    right = expected(hidden_NH, weight_VH, bias_V, targets_N, temperature, softcap, scale)
    each_N = torch.linspace(-1, 2, N)
    gradients = torch.autograd.grad((right["log_probs"] * each_N).sum(), leaves)
    found = head.CpuKernel.apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, 0, softcap, scale, head.OPTIONAL)
    assert not any(values.requires_grad for values in found[1:])
    for values, right_N in zip(found, right.values(), strict=True):
        torch.testing.assert_close(values, right_N.detach(), rtol=1e-5, atol=1e-5)
    for gradient, right_gradient in zip(torch.autograd.grad((found[0] * each_N).sum(), leaves), gradients, strict=True):
        torch.testing.assert_close(gradient, right_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtypes", ["float32 bfloat16", "bfloat16 float32", "bfloat16 bfloat16"])
@pytest.mark.parametrize("learns", ["hidden", "weight", "bias", "hidden weight bias", ""])
def test_dtypes_and_gradients_are_those_of_trls_kernel(dtypes: str, autocast: bool, learns: str) -> None:
    """dtypes: of hidden states and weights. learns: what takes a gradient."""
    of_hidden, of_weights = (getattr(torch, name) for name in dtypes.split())

    def run(kernel: Any) -> tuple[list[Tensor], list[Tensor | None]]:
        hidden_NH, weight_VH, bias_V, targets_N = drawn(torch.bfloat16, bias=True)
        assert bias_V is not None
        leaves = {"hidden": hidden_NH.to(of_hidden), "weight": weight_VH.to(of_weights), "bias": bias_V.to(of_weights)}
        for name in learns.split():
            leaves[name].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = kernel.apply(*leaves.values(), targets_N, 0.9, V, None, 1.5, ("log_probs", "entropy"))
        if learns:
            (found[0] * torch.linspace(-1, 2, N)).sum().backward()
        return list(found[:2]), [leaf.grad for leaf in leaves.values()]

    outputs, gradients = run(head.CpuKernel)
    right_outputs, right_gradients = run(ChunkedLogProbFunction)
    exact = not autocast and of_hidden == torch.float32  # else logits are rounded, before the bias there and after it here
    for values, right in zip(outputs, right_outputs, strict=True):
        torch.testing.assert_close(values, right, **({"rtol": 1e-5, "atol": 1e-5} if exact else {"rtol": 0.0, "atol": 0.1}))
    for gradient, right_gradient in zip(gradients, right_gradients, strict=True):
        assert (gradient is None) == (right_gradient is None)
        if gradient is not None and right_gradient is not None:
            assert gradient.dtype == right_gradient.dtype
            off = (gradient - right_gradient).float().norm() / right_gradient.float().norm()
            assert off < (5e-3 if exact else 3e-2)


def test_autocast_says_in_which_dtype_products_are() -> None:
    hidden_NH, weight_VH, _, targets_N = drawn(bias=False)

    def logprobs(hidden_NH: Tensor, weight_VH: Tensor) -> Tensor:
        return head.CpuKernel.apply(hidden_NH, weight_VH, None, targets_N, 1.0, 0, None, 1.0, ())[0]

    rounded_N = logprobs(hidden_NH.bfloat16(), weight_VH.bfloat16())
    assert not torch.equal(logprobs(hidden_NH, weight_VH), rounded_N)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logprobs(hidden_NH, weight_VH), rounded_N)


def test_what_is_not_asked_for_is_none() -> None:
    found = head.CpuKernel.apply(*drawn(bias=False), 1.0, 0, None, 1.0, ("log_probs", "is_top1"))
    assert [values is not None for values in found] == [True, False, False, False, True]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_what_bfloat16_would_lose(temperature: float) -> None:
    """The digits of logits / temperature, and 1 - p where p is nearly 1, unless both meet before they are rounded."""
    hidden_NH, weight_VH, _, targets_N = drawn(torch.bfloat16, bias=False)
    weight_VH[targets_N] *= 2
    logits_NV = (hidden_NH @ weight_VH.T).double().requires_grad_()  # rounded, as the kernel has them
    logprobs_N = (logits_NV / temperature).log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]
    (slopes_NV,) = torch.autograd.grad(logprobs_N.sum(), logits_NV)
    right_NH = slopes_NV @ weight_VH.double()
    hidden_NH.requires_grad_()
    outputs = head.CpuKernel.apply(hidden_NH, weight_VH, None, targets_N, temperature, 0, None, 1.0, ())
    torch.testing.assert_close(outputs[0].double(), logprobs_N, rtol=0, atol=1e-5)
    (found_NH,) = torch.autograd.grad(outputs[0].sum(), hidden_NH)
    certain_N = (logprobs_N.exp() > 0.99) & (logprobs_N.exp() < 0.99999)  # above that fp32 has no digits of 1 - p either
    assert certain_N.sum() >= 3
    off_N = (found_NH - right_NH).norm(dim=-1) / right_NH.norm(dim=-1)
    assert off_N[certain_N].max() < 0.02


@pytest.mark.parametrize("labelled", [0, 1, 5])
@pytest.mark.parametrize("trained", [False, True])
def test_a_fused_head_gives_what_the_logits_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: bool, labelled: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path)).requires_grad_(trained)
    ids = torch.arange(3, 15).view(1, 12)
    labels = torch.full_like(ids, -100)
    labels[0, 12 - labelled :] = ids[0, 12 - labelled :]
    scales_11L = torch.linspace(1, 2, 12 * 32).view(1, 12, 32).requires_grad_()
    embedded = model.get_input_embeddings()(ids).detach() * scales_11L
    leaves = [scales_11L, *(model.parameters() if trained else ())]
    logprobs = model(inputs_embeds=embedded).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    right = (logprobs * (labels[:, 1:] != -100)).sum()
    gradients = torch.autograd.grad(right, leaves, allow_unused=True, retain_graph=True)
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    add_fused_lm_head(model)
    with head.kernel():
        found = model(inputs_embeds=embedded, labels=labels, fused_lm_head=True).log_probs.sum()
    assert found.item() == pytest.approx(right.item(), abs=1e-5)
    for gradient, right_gradient in zip(torch.autograd.grad(found, leaves, allow_unused=True), gradients, strict=True):
        if right_gradient is not None:
            torch.testing.assert_close(gradient, right_gradient, rtol=1e-4, atol=1e-6)


def test_trl_has_its_own_kernel_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: Any = utils._ChunkedLogProbFunction, utils._use_triton
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    with pytest.raises(RuntimeError), head.kernel():
        assert utils._ChunkedLogProbFunction is head.CpuKernel
        raise RuntimeError
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == theirs
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    with head.kernel():
        assert (utils._ChunkedLogProbFunction, utils._use_triton) == theirs


@pytest.mark.usefixtures("small_tiles")
def test_torch_compile_leaves_it_alone() -> None:
    """Or each number of positions would be compiled anew, until torch gives up."""
    compiled: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    hidden_NH, weight_VH, _, targets_N = drawn(bias=False)
    apply = torch.compile(lambda *tensors: 2 * head.CpuKernel.apply(*tensors, 1.0, 0, None, 1.0, ())[0], backend=backend)
    for count in range(5, N):
        apply(hidden_NH[:count], weight_VH, None, targets_N[:count])
    assert len(compiled) <= 2


SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
PLAIN = [
    LlamaConfig(**SHAPE),
    LlamaConfig(**SHAPE, tie_word_embeddings=True),
    GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2),
    Gemma2Config(**SHAPE, num_key_value_heads=2, head_dim=8),
    GraniteConfig(**SHAPE, logits_scaling=3.0),
    CohereConfig(**SHAPE, logit_scale=0.5),
    MiniCPM3Config(**SHAPE, q_lora_rank=16, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8),
]
MORE = [
    ModernBertDecoderConfig(**SHAPE, pad_token_id=0),
    RobertaConfig(**SHAPE, is_decoder=True),
    BertConfig(**SHAPE, is_decoder=True),
]


@pytest.mark.parametrize("config", PLAIN, ids=lambda config: str(config.model_type))
def test_a_head_that_is_one_product_is_fused(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head.ensure_plain(model, "it")
    add_fused_lm_head(model, 0.7)
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[6, 7, 8, 9]])
    with torch.no_grad(), head.kernel():
        found = model(input_ids=ids, shift_labels=labels, fused_lm_head=True).log_probs
        right = (model(input_ids=ids).logits / 0.7).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", MORE, ids=lambda config: str(config.model_type))
def test_a_head_that_is_more_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match="base_model: it has logits that are more than a product of its head"):
        head.ensure_plain(AutoModelForCausalLM.from_config(config), "it")


def test_logits_that_are_scaled_in_a_way_unknown_to_trl_are_refused() -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits / 3
            return out

    with pytest.raises(ConfigError, match="logits that are more"):
        head.ensure_plain(Scaled(LlamaConfig(**SHAPE)), "it")
