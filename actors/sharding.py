"""FSDP2 and DeepSpeed where transformers leaves something to do: on CPUs, and in checkpoints without a pickle."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from actors import device
from actors.states import load_state, save_state

# Objects in DeepSpeed's states that it makes anew: the loss scaler of fp16, and hints for its tool that converts checkpoints.
MADE_ANEW = ("loss_scaler", "param_slice_mappings")
OPTIMIZER_STATE = "optimizer_state_dict"


def use_state_files(engine: Any) -> None:
    """Makes DeepSpeed's engine read and write its checkpoints as safetensors, under its own file names."""
    engine.checkpoint_engine = _state_files(getattr(engine.optimizer, "loss_scaler", None))


def save_engine(engine: Any, folder: Path, *, trained_only: bool) -> None:
    """All ranks call it. trained_only: without frozen weights."""
    engine.save_checkpoint(str(folder), exclude_frozen_parameters=trained_only)
    if engine.global_rank == 0:
        (folder / "zero_to_fp32.py").unlink(missing_ok=True)  # reads pickles, which these files are not


def _state_files(loss_scaler: Any) -> Any:
    """loss_scaler: of the engine's optimizer."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    class StateFiles(CheckpointEngine):  # type: ignore[misc]
        def create(self, info: Any) -> None:
            pass

        def save(self, state_dict: Mapping[str, Any], path: str) -> None:
            save_state(_without_objects(state_dict), Path(path))

        def load(self, path: str, map_location: Any = None) -> Any:
            state = load_state(Path(path))
            if OPTIMIZER_STATE in state:
                state[OPTIMIZER_STATE]["loss_scaler"] = loss_scaler
            return state

        def commit(self, info: Any) -> bool:
            return True

    return StateFiles()


def _without_objects(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_objects(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
        if key not in MADE_ANEW
    }


def start(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What must happen before a model is loaded, by TrainingArguments; returns what has to be added to them."""
    if arguments.get("deepspeed"):
        import deepspeed

        # So that weights are cut while they are loaded.
        deepspeed.init_distributed(dist_backend=device.collectives(), auto_mpi_discovery=False)
        return _sharding_on_cpu("DEEPSPEED")
    if not arguments.get("fsdp"):
        return {}
    if arguments["fsdp_config"].get("cpu_ram_efficient_loading"):
        # transformers reads these, and loads weights on rank 0 alone.
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    return _sharding_on_cpu("MULTI_GPU")


def _sharding_on_cpu(distributed_type: str) -> dict[str, Any]:
    """Accelerate shards on GPUs only. On CPUs it is told here that they are such, for transformers to take as it is."""
    from accelerate.state import DistributedType, PartialState

    if device.has_gpu():
        return {}
    PartialState(cpu=True).distributed_type = DistributedType[distributed_type]
    return {"accelerator_config": {"use_configured_state": True}}


def trainable_weights(model: Any) -> dict[str, Any]:
    """The trained weights of a model under FSDP2, whole, on the CPU of rank 0; all ranks call it. Frozen ones are left out."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return dict(get_model_state_dict(model, options=options))
