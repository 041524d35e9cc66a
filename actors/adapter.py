"""An adapter in a folder, as PEFT writes it: what it is, and a policy that starts from it.

A policy that starts from an adapter may need two of it: the one that learns, and a frozen copy that is the reference.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from actors import storage
from actors.errors import CheckpointError, ConfigError

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
