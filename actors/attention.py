"""Attention over a packed row: each completion looks at its own prompt and at itself, and at no more than that is computed.

A row is one sequence for every other part of the model. Here its prompts become one batch, and its completions another,
whose keys are prompt and completion side by side, so that cost and memory grow with the completions and not with the square of
the row. Known to transformers under NAME; what is not packed goes through its own "sdpa".
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from actors.errors import ConfigError

NAME = "packed"
LAYERS = ("full_attention", "sliding_attention")  # kinds of layers whose tokens meet nowhere else
ALIGNMENT = 8  # the kernels for a mask on a GPU copy one whose rows are not a multiple of this


class PackedAttention(NamedTuple):
    """Where prompts and completions lie in a row of L positions. Padding points at position 0, and is not read."""

    prompts_GP: Tensor  # [G, P] int64: positions of each prompt
    queries_BT: Tensor  # [B, T] int64: positions of each completion
    keys_BS: Tensor  # [B, S] int64: positions of its prompt, padded, and then its own
    places_L: Tensor  # [L] int64: of each position, in all prompts and then all completions, padding included
    mask_B1TS: Tensor  # [B, 1, T, S], of the model's dtype: 0 where a position may look, the dtype's minimum elsewhere


def register() -> None:
    """Makes NAME an attn_implementation of transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def ensure_can_pack(config: Any, name: str) -> None:
    """Raises ConfigError for a model in which tokens of a row would meet outside of `attend`, or not as `attend` has it.

    config: transformers' of the text model.
    """
    kinds = set(getattr(config, "layer_types", None) or LAYERS)
    if other := sorted(kinds.difference(LAYERS)):
        raise _refusal(name, f"has layers of the kind {other[0]}, where the completions of a prompt would see each other")
    if getattr(config, "attn_logit_softcapping", None):
        raise _refusal(name, "caps its attention's scores, which is not implemented for rl: grpo yet")


def ensure_told(model: Any, name: str) -> None:
    """Raises ConfigError for a loaded model whose layers do not ask `attend`."""
    if not model._supports_attention_backend or getattr(model, "_is_stateful", False):
        raise _refusal(name, "has attention of its own, which cannot be told which completion belongs to which prompt")


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"base_model: {name} {why}; use a model of transformers whose layers are all plain attention")


def attend(
    module: Any,
    query_1HLD: Tensor,
    key_1JLD: Tensor,
    value_1JLD: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedAttention | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it; H heads, J heads of keys and values. Returns [1, L, H, D], and no weights.

    packed: None = one sequence that is not packed. Layers that look back a window only are asked for no more than that: a job's
    sequences fit into it. Raises ConfigError for attention that is more than a softmax of scaled products.
    """
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    if packed is None:
        out: tuple[Tensor, None] = sdpa_attention_forward(
            module, query_1HLD, key_1JLD, value_1JLD, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out
    if special := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise ConfigError(f"base_model: its attention uses {special[0]}, which is not implemented for rl: grpo yet")
    repeats = getattr(module, "num_key_value_groups", 1)
    query_LHD, key_LHD, value_LHD = (
        heads[0].transpose(0, 1) for heads in (query_1HLD, repeat_kv(key_1JLD, repeats), repeat_kv(value_1JLD, repeats))
    )

    def over(queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """[queries, H, D], padding included."""
        out_BHTD = scaled_dot_product_attention(
            _rows(query_LHD, queries),
            _rows(key_LHD, keys),
            _rows(value_LHD, keys),
            attn_mask=mask,
            is_causal=mask is None,
            dropout_p=dropout if module.training else 0.0,
            scale=scaling,
        )
        return out_BHTD.transpose(1, 2).flatten(0, 1)

    prompts = over(packed.prompts_GP, packed.prompts_GP, None)
    completions = over(packed.queries_BT, packed.keys_BS, packed.mask_B1TS)
    return torch.cat([prompts, completions]).index_select(0, packed.places_L)[None], None


def _rows(heads_LHD: Tensor, positions_BT: Tensor) -> Tensor:
    """[B, H, T, D]."""
    picked = heads_LHD.index_select(0, positions_BT.flatten())
    return picked.view(*positions_BT.shape, *picked.shape[1:]).transpose(1, 2)
