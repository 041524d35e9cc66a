"""An adapter in a folder, as PEFT writes it: what it is, and a policy that starts from it.

A policy that starts from an adapter may need two of it: the one that learns, and a frozen copy that is the reference.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from actors import snapshot, storage
from actors.errors import CheckpointError, ConfigError
from actors.snapshot import Bucket
from actors.types import SnapshotHeader

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
POLICY, REFERENCE = "default", "ref"  # names of adapters in a PeftModel; the second is the one that TRL looks for
HEADS = ("classifier", "score")  # what PEFT itself adds to modules_to_save for the task SEQ_CLS


def read_config(folder: Path) -> Any:
    """PEFT's configuration of the adapter in a folder.

    Raises CheckpointError when there is none, when it is no LoRA, or when its weights are a pickle.
    """
    from peft import LoraConfig, PeftConfig

    if not (folder / CONFIG_FILE).is_file() or not (folder / WEIGHTS_FILE).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "its adapter is a pickle, which is never read; save it again as safetensors" if pickled else (
            f"it holds no adapter ({CONFIG_FILE} and {WEIGHTS_FILE})" if folder.is_dir() else "there is no such folder"
        )  # fmt: skip
        raise CheckpointError(f"{folder}: {why}")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE} cannot be read ({error}); use another copy of it") from error
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder}: its adapter is of type {config.peft_type}; only LoRA and its kin are known here")
    return config


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each of the adapter's tensors, from the file's header. Raises CheckpointError when it is damaged."""
    path = folder / WEIGHTS_FILE
    try:
        with safe_open(path, framework="pt") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); use another copy of it") from error


def load(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The adapter's tensors, by name.

    expected: name and shape of each that the base model has a place for. Raises CheckpointError unless they are those, and
    finite.
    """
    found = read_shapes(folder)
    if found != expected:
        name = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))[0]
        is_, should = (f"of shape {list(shapes[name])}" if name in shapes else "missing" for shapes in (found, expected))
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {name} is {is_}, and to the base_model {should}; "
            "use another copy of the adapter, or the base_model that it was trained on"
        )
    tensors: dict[str, torch.Tensor] = load_file(folder / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity; use another checkpoint")
    return tensors


def is_of_linear_layers(folder: Path) -> bool:
    """Whether the adapter is nothing but B A beside linear layers other than the head: what an engine can merge, or keep in a
    slot. Not so DoRA, and weights that are saved whole.
    """
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in read_shapes(folder)}
    halves = all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in read_shapes(folder))
    return halves and not modules & {"lm_head", "embed_tokens"}


def as_snapshot(
    tensors: Mapping[str, torch.Tensor], *, base_model: str, rank: int, scaling: float, version: int
) -> tuple[SnapshotHeader, Bucket]:
    """An adapter that was saved as a policy that engines install. Nobody computed its probe."""
    entries, bucket, digest = snapshot.pack(tensors)
    return SnapshotHeader(version, base_model, rank, scaling, entries, bucket.nbytes, digest, ()), bucket


@functools.cache
def digest(folder: str) -> str:
    """What tells this adapter from others; asked for again at every checkpoint."""
    return storage.digest_of(Path(folder) / WEIGHTS_FILE)


def start_from(policy: Any, folder: str, *, reference: bool) -> None:
    """Gives a fresh PeftModel the adapter of a folder, and if need be a frozen copy of it as the reference.

    The policy's own adapter has the shape of the one in the folder. Raises ConfigError when the folder is not here.
    """
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        raise ConfigError(f"lora_model_dir: {path} is not on this node; use storage that all nodes mount")
    tensors = load_file(path)
    _load(policy, tensors, POLICY)
    if reference:
        config = deepcopy(policy.peft_config[POLICY])
        config.lora_dropout = 0.0
        policy.add_adapter(REFERENCE, config)
        _load(policy, tensors, REFERENCE)
        # Else PEFT writes the reference too, and transformers then resumes from that one.
        policy.save_pretrained = functools.partial(policy.save_pretrained, selected_adapters=[POLICY])


def _load(policy: Any, tensors: dict[str, Any], name: str) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    fresh = get_peft_model_state_dict(policy, adapter_name=name)
    if unknown := sorted(tensors.keys() - fresh.keys()):
        raise ConfigError(f"lora_model_dir: {len(unknown)} tensors have no place in the model, first {unknown[0]}")
    # What it does not have is the head of a reward model that starts from another method's adapter.
    set_peft_model_state_dict(policy, {**fresh, **tensors}, adapter_name=name)


@contextmanager
def as_reference(policy: Any) -> Iterator[None]:
    """The policy as it was when training started: its frozen copy, or the base model where the adapter was new."""
    if REFERENCE not in policy.peft_config:
        with policy.disable_adapter():
            yield
        return
    policy.set_adapter(REFERENCE)
    try:
        yield
    finally:
        policy.set_adapter(POLICY)
