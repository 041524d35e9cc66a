"""An optimizer's state to a file and back, without a pickle: any of torch or bitsandbytes."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def save_optimizer(optimizer: Any, path: Path) -> None:
    """A torch or bitsandbytes optimizer's state as one safetensors file: tensors, and numbers in its metadata."""
    state = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for index, values in state["state"].items():
        for name, value in _flat(values):
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().clone().contiguous()  # some are one tensor, shared by all
            elif isinstance(value, int | float):
                numbers[f"{index}.{name}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    save_file(tensors, path, metadata={"param_groups": json.dumps(groups), "numbers": json.dumps(numbers)})


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes keeps its quantized moments in a mapping of their own, and reads them without it too."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield name, value


def load_optimizer(optimizer: Any, path: Path) -> None:
    """Puts a saved state back; the parameters must be those it was saved with, in the same order."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    values: dict[int, dict[str, Any]] = {}
    for key, value in [*load_file(path).items(), *json.loads(metadata["numbers"]).items()]:
        index, _, name = key.partition(".")
        values.setdefault(int(index), {})[name] = value
    current = optimizer.state_dict()["param_groups"]
    saved_groups = json.loads(metadata["param_groups"])
    merged = [{**saved, "params": group["params"]} for saved, group in zip(saved_groups, current, strict=True)]
    # torch puts each tensor where its optimizer wants it: a fused one also counts its steps on the GPU.
    optimizer.load_state_dict({"state": values, "param_groups": merged})
