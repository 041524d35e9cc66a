"""What the passes over one micro-batch keep alive, counted by running them on tensors that have shapes and no data.

The model's own code runs here, with PEFT, autocast and checkpointing as a job has them, under torch's FakeTensorMode, and each
storage is counted from its first tensor to its last: nothing that could differ from the code is written down. Layers are
alike, so one and two of them say what all of them need; attention counts as the fused kernel that it is (FlashAttention,
arXiv:2205.14135: it keeps queries, keys, values, its output and a number a row). Weights, their gradients and the optimizer
are not in it, nor is the head that follows: memory.py adds them.
"""

import functools
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from actors import attention, model
from actors.attention import PackedAttention
from actors.errors import ConfigError, EaglerayError
from actors.packing import PackedRow, Sample, pack_row
from actors.specs import LoraSpec
from actors.types import RolloutGroup
from orchestrator.model_shape import ModelSource, build, read_config, read_shape, with_adapter


@dataclass(frozen=True)
class PaddedRows:
    """A micro-batch of a dataset job."""

    sequences: int
    length: int  # tokens of each, padding included
    masked: bool  # whether attention gets a mask: some sequence is shorter, or holds documents of which it is not told
    packs: int = 0  # that the one sequence is, each of two documents; 0 = attention is not told where documents lie

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    @property
    def predicting(self) -> int:
        """Positions that need logits: all of a sequence but its end."""
        return self.tokens - self.sequences


@dataclass(frozen=True)
class PackedRows:
    """A micro-batch of rl: grpo, one row: each prompt once, and then its completions."""

    groups: int
    prompt: int  # tokens of each
    completions: int  # of all groups
    length: int  # tokens of each

    @property
    def tokens(self) -> int:
        """The end of a prompt stands before each of its completions, in place of theirs."""
        return self.groups * (self.prompt - 1) + self.predicting

    @property
    def predicting(self) -> int:
        """Positions that need logits."""
        return self.completions * self.length


@dataclass(frozen=True)
class Setting:
    """What a micro-batch goes through."""

    source: ModelSource
    lora: LoraSpec | None
    rows: PaddedRows | PackedRows
    dtype: str  # of the weights, and of the computation
    eager: bool  # whether attention keeps its scores, as eager attention does and no other; packed rows have their own
    checkpointing: bool


@dataclass(frozen=True)
class Alive:
    """Bytes."""

    kept: int  # between the forward pass and the backward pass
    forward: int  # the most in the forward pass
    backward: int  # the most in the backward pass of the layers, the head's part over
    last: int  # as `backward`, when all layers but the first are done
    embedding: int  # the most in the backward pass of the embedding


@functools.lru_cache(maxsize=256)
def alive(setting: Setting) -> Alive:
    """Of a whole model, all layers alike. Raises ConfigError."""
    lora = replace(setting.lora, start=None) if setting.lora else None  # the shape of its weights is all that counts
    setting = replace(setting, lora=lora)
    try:
        one, two = (_run(setting, layers) for layers in (1, 2))
    except EaglerayError:
        raise
    except Exception as error:  # the code of any model runs here, and may ask for numbers that are not there
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no more is known'}"
        raise ConfigError(f"base_model: what {setting.source.name} needs in memory cannot be counted ({why})") from error
    more = read_shape(setting.source, lora).layers - 1
    grown = {f.name: getattr(one, f.name) + more * (getattr(two, f.name) - getattr(one, f.name)) for f in fields(Alive)}
    return Alive(**{**grown, "last": one.backward})


def _run(setting: Setting, layers: int) -> Alive:
    policy = _policy(setting, layers)
    dtype = getattr(torch, setting.dtype)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        policy.to_empty(device="cpu").train()
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        inputs, laid = _inputs(setting, fake)
        counted = _Counted([*policy.parameters(), *(p.grad for p in policy.parameters()), *policy.buffers(), *inputs.values()])
        decoder = policy.get_base_model() if setting.lora else policy
        with counted:
            embedded = _watch_embedding(policy, counted)
            with torch.autocast("cpu", dtype) if dtype != torch.float32 else nullcontext():
                packed = {"packed": laid} if laid else {}
                hidden = decoder.base_model(**inputs, **packed, use_cache=False).last_hidden_state
            kept, forward = counted.now, counted.restart()
            if hidden.requires_grad:
                hidden.backward(torch.empty_like(hidden))
        backward = embedded.pop() if embedded else counted.most
        return Alive(kept, forward, backward, backward, counted.most)


def _policy(setting: Setting, layers: int) -> Any:
    attention.register()
    # Of attention that it does not know transformers makes no mask; without one and unpacked it is sdpa.
    masked = isinstance(setting.rows, PaddedRows) and (setting.rows.masked or setting.eager) and not _told(setting)
    own = "eager" if setting.eager else None  # None = the model's choice
    base = build(setting.source, setting.dtype, own if masked else attention.NAME, layers)
    if setting.checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.enable_input_require_grads()
    if setting.lora is None:
        return base
    if isinstance(setting.rows, PackedRows):
        return model.with_lora(base, setting.lora)
    adapted = with_adapter(base, setting.lora, setting.source.task)
    model.take_inputs_as_they_are(adapted)
    return adapted


def _told(setting: Setting) -> bool:
    """Whether attention is told where the documents of packs lie, as actors/dataset_loop.py decides it; flash attention, too,
    since packages for it may be missing where the job runs.
    """
    rows = setting.rows
    return isinstance(rows, PaddedRows) and bool(rows.packs) and _takes_documents(setting.source)


@functools.lru_cache(maxsize=32)
def _takes_documents(source: ModelSource) -> bool:
    return attention.takes_documents(read_config(source))


def _inputs(setting: Setting, fake: FakeTensorMode) -> tuple[dict[str, Tensor], PackedAttention | None]:
    """Of the decoder; and of its attention."""
    rows = setting.rows
    if isinstance(rows, PackedRows):
        row = PackedRow(**{name: fake.from_tensor(tensor) for name, tensor in vars(longest_row(rows)).items()})
        return {"input_ids": row.input_ids, "position_ids": row.position_ids}, row.attention(getattr(torch, setting.dtype))
    ids = torch.zeros(rows.sequences, rows.length, dtype=torch.long)
    if _told(setting):
        laid = attention.documents(attention.uneven(rows.length // rows.packs) * rows.packs)
        return {"input_ids": ids}, tree_map_only(Tensor, fake.from_tensor, laid)
    # As transformers makes it of a mask with padding, or of positions that begin anew.
    mask = torch.ones(rows.sequences, 1, rows.length, rows.length, dtype=torch.bool)
    return {"input_ids": ids, **({"attention_mask": mask} if rows.masked else {})}, None


def longest_row(rows: PackedRows) -> PackedRow:
    """The micro-batch as the trainer lays it out, completions dealt to the groups in turn."""
    token, logprob = np.zeros(rows.length, dtype=np.int32), np.zeros(rows.length, dtype=np.float32)
    of_group = [len(range(g, rows.completions, rows.groups)) for g in range(rows.groups)]
    groups = [
        RolloutGroup(0, np.zeros(rows.prompt, dtype=np.int32), (token,) * n, (logprob,) * n, (False,) * n, ("",) * n)
        for n in of_group
    ]
    return pack_row(groups, [Sample(g, i, 1.0) for g, n in enumerate(of_group) for i in range(n)])


def _watch_embedding(policy: Any, counted: "_Counted") -> list[int]:
    """Gets what was the most alive once the backward pass has come to the embedding, and counts anew from there."""
    found: list[int] = []

    def begins(_: Tensor) -> None:
        found.append(counted.restart())

    def watch(module: Any, inputs: Any, embedded: Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(begins)

    policy.get_input_embeddings().register_forward_hook(watch)
    return found


class _Counted(TorchDispatchMode):
    """Counts bytes of storages that come to life within it."""

    def __init__(self, apart: Iterable[Tensor | None]) -> None:
        """apart: tensors that do not count, however they are looked at."""
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()
        # Kept, so that no other storage gets the place of one of them.
        self.apart = [tensor.untyped_storage() for tensor in apart if tensor is not None]
        self.known.update(storage._cdata for storage in self.apart)

    def restart(self) -> int:
        """The most so far; from here on it is counted anew."""
        most, self.most = self.most, self.now
        return most

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._see, out)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known.add(storage._cdata)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, place: int, nbytes: int) -> None:
        self.known.discard(place)
        self.now -= nbytes
