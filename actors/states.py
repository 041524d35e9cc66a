"""Nested states of tensors and plain values as one safetensors file, and back, without a pickle.

Optimizers and DeepSpeed keep such states. Another kind of plain value is a line in _encoded and one in _decoded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TREE = "tree"  # the file's metadata holds the state with names in place of its tensors


def save_state(state: Any, path: Path) -> None:
    """Raises TypeError for a value that is neither a tensor, nor plain, nor a collection of such."""
    tensors: dict[str, torch.Tensor] = {}
    tree = _encoded(state, "state", tensors)
    save_file(tensors, path, metadata={TREE: json.dumps(tree)})


def load_state(path: Path) -> Any:
    """What was saved, with its tensors on the CPU."""
    with safe_open(path, "pt") as file:
        tree = json.loads(file.metadata()[TREE])
    return _decoded(tree, load_file(path))


def _encoded(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # Copied, since some states are views of one tensor or the same tensor twice, which the format does not allow.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _encoded(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple | set):
        kind = next(kind.__name__ for kind in (list, tuple, set) if isinstance(value, kind))
        return {kind: [_encoded(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    raise TypeError(f"{name}: a {type(value).__name__} cannot be saved")


def _decoded(tree: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "mapping":
        return {key: _decoded(item, tensors) for key, item in value}
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "plain":
        return value
    return {"list": list, "tuple": tuple, "set": set}[kind](_decoded(item, tensors) for item in value)
