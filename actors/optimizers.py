"""An optimizer's state to a file and back: any of torch or bitsandbytes, and of a rank's shards under FSDP2.

What was learnt comes back; what the configuration says (rates, betas, decay) is what it says now, since a resumed job may have
other values than the one that saved, as trials of population based training do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from actors.states import load_state, save_state

OPTIMIZER_FILE = "optimizer.safetensors"
SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")  # of a group of parameters, which a configuration says
SHARD_FILE = "optimizer-{rank}.safetensors"  # of each rank under FSDP2; DeepSpeed has names of its own


def save_optimizer(optimizer: Any, path: Path) -> None:
    """The state of the parameters that this process holds; of sharded ones, its own shard."""
    state = optimizer.state_dict()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    save_state({"state": _mapped(_local, state["state"]), "param_groups": groups}, path)


def load_optimizer(optimizer: Any, path: Path) -> None:
    """Puts a saved state back; the parameters must be those it was saved with, in the same order."""
    saved = load_state(path)
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**group, **{key: now[key] for key in ("params", *SETTINGS) if key in now}}
        for group, now in zip(saved["param_groups"], current, strict=True)
    ]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: _mapped(lambda value, parameter=parameters[index]: _like(value, parameter), values)
        for index, values in saved["state"].items()
    }
    # torch puts each tensor where its optimizer wants it: a fused one also counts its steps on the GPU.
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_schedule(scheduler: Any, saved: Mapping[str, Any]) -> None:
    """Goes on where a learning rate schedule was, with this job's own highest rates."""
    now = scheduler.state_dict()
    state = {**now, **saved}
    rates, before = now.get("base_lrs"), saved.get("base_lrs")
    if rates and before and rates != before:
        last = zip(saved["_last_lr"], rates, before, strict=True)
        state |= {"base_lrs": rates, "_last_lr": [rate * new / old if old else rate for rate, new, old in last]}
    scheduler.load_state_dict(state)
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    for group, rate in zip(inner.optimizer.param_groups, inner.get_last_lr(), strict=True):
        group["lr"] = rate


def _mapped(function: Any, values: Any) -> Any:
    """bitsandbytes keeps its quantized moments in a mapping of their own."""
    if isinstance(values, Mapping):
        return {key: _mapped(function, value) for key, value in values.items()}
    return function(values)


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """A moment of a sharded parameter is sharded as that is."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.to_local().shape:
        local = value.to(parameter.to_local().device)
        return DTensor.from_local(
            local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
        )
    return value
