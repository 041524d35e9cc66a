"""Attention over a packed row: what belongs together looks at itself, and at no more than that is computed.

A row is one sequence for every other part of the model. Here its parts become batches: of rl: grpo its prompts are one, and its
completions another, whose keys are prompt and completion side by side; of packed documents those of about the same length are
one. So cost and memory grow with the parts and not with the square of the row. Known to transformers under NAME; what is not
packed goes through its own "sdpa".
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from actors.errors import ConfigError

NAME = "packed"
ASKING = "packed, asked"  # of a model that shows whether its layers hand on what they are told
LAYERS = ("full_attention", "sliding_attention")  # kinds of layers whose tokens meet nowhere else
ALIGNMENT = 8  # the kernels for a mask on a GPU copy one whose rows are not a multiple of this


class Block(TypedDict):
    """Parts of a row that are computed side by side. Padding points at position 0, and is not read."""

    queries_BT: Tensor  # [B, T] int64: positions of each part
    keys_BS: Tensor  # [B, S] int64: positions of what it may look at
    mask_B1TS: Tensor | None  # of the model's dtype: 0 where a position may look, the dtype's minimum elsewhere; None = causal


class PackedAttention(TypedDict):
    """Where the parts of a row of L positions lie; plain containers, whose tensors a trainer moves to its device."""

    blocks: list[Block]
    places_L: Tensor  # [L] int64: of each position, in the queries of all blocks one after the other, padding included


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
    """Raises ConfigError for a loaded model whose layers do not ask `attend`, or not with what it needs."""
    plain = model._supports_attention_backend and not getattr(model, "_is_stateful", False)
    if not plain or _is_deaf(type(model), model.config):
        raise _refusal(name, "has attention of its own, which cannot be told which completion belongs to which prompt")


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"base_model: {name} {why}; use a model of transformers whose layers are all plain attention")


def takes_documents(config: Any) -> bool:
    """Whether `attend` computes packed documents as the model's own attention would, which is sdpa.

    config: transformers' of the whole model. Windows are left to sdpa, as are models with code of their own.
    """
    from transformers import AutoModelForCausalLM

    cls = AutoModelForCausalLM._model_mapping.get(type(config), None)
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if cls is None or own or config.get_text_config() is not config:
        return False
    kinds = getattr(config, "layer_types", None)
    whole = set(kinds) == {"full_attention"} if kinds else not getattr(config, "sliding_window", None)
    capped = getattr(config, "attn_logit_softcapping", None)
    plain = cls._supports_sdpa and cls._supports_attention_backend and not cls._is_stateful
    return bool(whole and plain and not capped) and not _is_deaf(cls, config)


class _Asked(Exception):
    """Ends a forward pass at its first attention."""

    def __init__(self, told: bool) -> None:
        self.told = told


def _is_deaf(cls: Any, config: Any) -> bool:
    """Whether layers of a class of models do not hand on what a packed row needs, or make a mask of their own beside it.

    Seen at a first layer without weights. What cannot be built so is taken for one that listens.
    """
    from transformers import AttentionInterface

    def ask(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, packed: Any = None, **_: Any) -> None:
        raise _Asked(packed is not None and attention_mask is None)

    AttentionInterface.register(ASKING, ask)
    try:
        first_layer_out(cls, config, ASKING, packed=True)
    except _Asked as asked:
        return not asked.told
    except Exception:  # the code of any model runs here
        return False
    return True


def first_layer_out(
    cls: Any, config: Any, implementation: str, watch: Callable[[Any], object] = lambda model: None, **kwargs: Any
) -> Any:
    """What a model of a first layer alone, without weights, puts out for two tokens. May raise what the model's code raises.

    implementation: of its attention. watch: is given the model before they go through it.
    """
    first = first_layers(config, 1)
    first._attn_implementation = implementation
    with torch.device("meta"):
        model = cls(first)  # not from_config, which DeepSpeed would have cut the weights
        watch(model)
        ids = torch.zeros(1, 2, dtype=torch.long)
        return model(input_ids=ids, position_ids=ids, use_cache=False, **kwargs)


def first_layers(config: Any, count: int) -> Any:
    """transformers' configuration of a model that is the first so many layers of another one."""
    first = deepcopy(config)
    text = first.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return first


def may_pack(asked: str | None, *, compiled: bool) -> bool:
    """Whether documents may be told to `attend` in a job that asks for an attn_implementation, or for none.

    compiled: by torch.compile, which would begin anew for each number of blocks.
    """
    return asked in (None, "sdpa") and not compiled


def uneven(length: int) -> list[int]:
    """Two documents of a pack for which memory is counted: `documents` pads them by a third of it, where the most is half."""
    return [length - length // 3, length // 3]


def documents(lengths: Sequence[int]) -> PackedAttention:
    """Of documents that lie one after the other in a row, in few blocks: each is padded by half of what it holds at most."""
    alike: list[list[int]] = []  # numbers of documents, longest first
    held = width = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        held += lengths[number]
        if not alike or width * (len(alike[-1]) + 1) > 1.5 * held:
            alike.append([])
            held = width = lengths[number]
        alike[-1].append(number)
    ends = np.cumsum(lengths)
    blocks: list[Block] = []
    places_L = np.empty(ends[-1], dtype=np.int64)
    before = 0  # places in the blocks so far
    for numbers in alike:
        width = lengths[numbers[0]]
        own_BT = np.zeros((len(numbers), width), dtype=np.int64)
        for place, number in enumerate(numbers):
            own = np.arange(lengths[number])
            positions = ends[number] - len(own) + own
            own_BT[place, : len(own)] = positions
            places_L[positions] = before + place * width + own
        before += own_BT.size
        rows_BT = torch.from_numpy(own_BT)
        blocks.append(Block(queries_BT=rows_BT, keys_BS=rows_BT, mask_B1TS=None))
    return PackedAttention(blocks=blocks, places_L=torch.from_numpy(places_L))


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
        raise ConfigError(f"base_model: its attention uses {special[0]}, which is not implemented for packed rows yet")
    repeats = getattr(module, "num_key_value_groups", 1)
    query_LHD, key_LHD, value_LHD = (
        heads[0].transpose(0, 1) for heads in (query_1HLD, repeat_kv(key_1JLD, repeats), repeat_kv(value_1JLD, repeats))
    )

    def over(block: Block) -> Tensor:
        """[queries, H, D], padding included."""
        out_BHTD = scaled_dot_product_attention(
            _rows(query_LHD, block["queries_BT"]),
            _rows(key_LHD, block["keys_BS"]),
            _rows(value_LHD, block["keys_BS"]),
            attn_mask=block["mask_B1TS"],
            is_causal=block["mask_B1TS"] is None,
            dropout_p=dropout if module.training else 0.0,
            scale=scaling,
        )
        return out_BHTD.transpose(1, 2).flatten(0, 1)

    outs = [over(block) for block in packed["blocks"]]
    return (torch.cat(outs) if len(outs) > 1 else outs[0]).index_select(0, packed["places_L"])[None], None


def _rows(heads_LHD: Tensor, positions_BT: Tensor) -> Tensor:
    """[B, H, T, D]."""
    picked = heads_LHD.index_select(0, positions_BT.flatten())
    return picked.view(*positions_BT.shape, *picked.shape[1:]).transpose(1, 2)
