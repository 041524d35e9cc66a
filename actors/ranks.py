"""How the ranks of an online job's trainer share the model and its gradients: whole copies, FSDP2, or DeepSpeed.

One class a way, all with the same methods; `share` chooses. The step's loss is the sum over ranks of what each computes, so
gradients are summed over ranks and never averaged. A new way is a class here and a line in `share`.
"""

import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from actors import device, model, network, sharding
from actors.errors import ActorError, CheckpointError
from actors.optimizers import OPTIMIZER_FILE, SHARD_FILE, load_optimizer, save_optimizer
from actors.specs import RankSpec, TrainerSpec

START_TIMEOUT_S = 1800  # that a rank waits for another one, which may still download the model


def meeting_place() -> str:
    """host:port on this node, free when asked, for the ranks to meet at."""
    with socket.socket() as free:
        free.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{free.getsockname()[1]}"


def meet(rank: RankSpec) -> None:
    """Waits for all ranks, at the address of the spec. Each sees its own device alone, so it is the first of its machine."""
    host, port = rank.address.rsplit(":", 1)
    os.environ |= {"RANK": str(rank.rank), "WORLD_SIZE": str(rank.world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
    network.use_node_interface()
    limit = timedelta(seconds=START_TIMEOUT_S)
    dist.init_process_group(device.collectives(), rank=rank.rank, world_size=rank.world, timeout=limit)


def join(rank: RankSpec, spec: TrainerSpec) -> Any:
    """Meets the other ranks, before the model is loaded. Returns transformers' arguments of the sharding; None = no shards."""
    if rank.world == 1 and not spec.sharding:
        return None
    meet(rank)
    if not spec.sharding:
        return None
    from transformers import TrainingArguments

    arguments = dict(spec.sharding)
    if "deepspeed" in arguments:
        # Micro-batches are counted by the trainer, whose rows hold as many completions as fit, and not by DeepSpeed.
        arguments["deepspeed"] = {**arguments["deepspeed"], "gradient_accumulation_steps": 1, "train_batch_size": "auto"}
    return TrainingArguments(
        output_dir=os.devnull,  # nothing is written there
        use_cpu=not device.has_gpu(),
        bf16="deepspeed" in arguments and spec.model.dtype == "bfloat16",
        per_device_train_batch_size=spec.micro_batch_size,
        max_grad_norm=spec.optimizer.max_grad_norm,
        report_to="none",
        **arguments,
        **sharding.start(arguments),
    )


@contextmanager
def loading(rank: RankSpec, spec: TrainerSpec) -> Iterator[None]:
    """While weights are read: with cpu_ram_efficient_loading transformers reads them where LOCAL_RANK is 0."""
    if not spec.sharding.get("fsdp"):
        yield  # DeepSpeed takes LOCAL_RANK for the number of the device
        return
    os.environ["LOCAL_RANK"] = str(rank.rank)
    yield
    os.environ["LOCAL_RANK"] = "0"


def share(arguments: Any, policy: Any, make_optimizer: Callable[[list[Any]], Any], world: int) -> "WholeCopies":
    """Cuts a policy into shards as `join` answered, and makes its optimizer."""
    if arguments is None:
        return WholeCopies(policy, make_optimizer(trained(policy)), world)
    kind = DeepSpeed if arguments.deepspeed else Fsdp
    return kind(arguments, policy, make_optimizer(trained(policy)), world)


def trained(policy: Any) -> list[Any]:
    return list(model.trained_parameters(policy).values())


class WholeCopies:
    """Every rank holds the whole model, and ranks sum their gradients once a step. Also one rank alone."""

    lockstep = False  # whether ranks must make the same number of forward passes

    def __init__(self, policy: Any, optimizer: Any, world: int) -> None:
        self.policy = policy  # a PeftModel, or transformers' model where all weights are trained
        self.model = policy  # what is called
        self.optimizer = optimizer  # torch's, with the groups that a schedule sets rates in
        self.world = world

    @property
    def parameters(self) -> list[Any]:
        """What is trained, as this rank holds it."""
        return trained(self.policy)

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value summed over ranks, in fp64."""
        if self.world == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=device.device())
        dist.all_reduce(sums)
        return dict(zip(values, sums.tolist(), strict=True))

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world == 1:
            return value
        largest = torch.tensor(value, device=device.device())
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sequence_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """As model.sequence_logprobs; all ranks call it."""
        return model.sequence_logprobs(self.model, token_ids)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds to the gradients. last: whether no other row of this step comes."""
        loss.backward()

    def step(self, max_norm: float, loss: float) -> float:
        """Clips and applies the gradients of all ranks; returns their norm before clipping.

        max_norm: 0 = no clipping. When `loss`, of the whole step, or the norm is not finite, nothing is applied.
        """
        self._sum_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if math.isfinite(grad_norm) and math.isfinite(loss):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    def _sum_gradients(self) -> None:
        if self.world == 1:
            return
        for parameter in self.parameters:
            if parameter.grad is None:  # this rank had no row
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(summed)

    def nbytes(self) -> dict[str, int]:
        """Bytes of each trained tensor, whole, by the names of model.trained_parameters."""
        sizes = model.trained_parameters(self.policy).items()
        return {name: getattr(p, "ds_numel", p.numel()) * p.element_size() for name, p in sizes}

    def whole(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those of the trained tensors, whole; all ranks call it. They may be the weights themselves."""
        parameters = model.trained_parameters(self.policy)
        return {name: parameters[name].detach() for name in names}

    def load(self, files: Sequence[Path]) -> None:
        """Puts saved tensors back; all ranks call it. Raises CheckpointError unless the files hold all that is trained."""
        tensors = self._saved(files)
        with torch.no_grad():
            for name, parameter in model.trained_parameters(self.policy).items():
                parameter.copy_(tensors[name])

    def _saved(self, files: Sequence[Path]) -> dict[str, Tensor]:
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        if missing := sorted(model.trained_parameters(self.policy).keys() - tensors.keys()):
            where = files[0].parent if files else "the checkpoint"
            raise CheckpointError(f"{where}: {len(missing)} trained tensors are missing, first {missing[0]}; use another one")
        return tensors

    def save_state(self, folder: Path, rank: int) -> None:
        """The optimizer's; all ranks call it."""
        if rank == 0:
            save_optimizer(self.optimizer, folder / OPTIMIZER_FILE)

    def load_state(self, folder: Path, rank: int) -> None:
        load_optimizer(self.optimizer, folder / OPTIMIZER_FILE)


class Fsdp(WholeCopies):
    """FSDP2: every rank holds a share of each weight, and gathers a layer when it needs it."""

    lockstep = True

    def __init__(self, arguments: Any, policy: Any, optimizer: Any, world: int) -> None:
        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin

        accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args))
        policy, wrapped = accelerator.prepare(policy, optimizer)
        super().__init__(policy, wrapped.optimizer, world)

    def backward(self, loss: Tensor, last: bool) -> None:
        (loss * self.world).backward()  # FSDP takes the mean over ranks

    def _sum_gradients(self) -> None:
        """The backward pass has."""

    def whole(self, names: Sequence[str]) -> dict[str, Tensor]:
        parts = super().whole(names)
        return {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parts.items()}

    def load(self, files: Sequence[Path]) -> None:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward pass without a backward pass leaves some of them whole
        tensors = self._saved(files)
        own = {id(p): name for name, p in self.policy.named_parameters()}
        state: dict[str, Any] = {own[id(p)]: tensors[name] for name, p in model.trained_parameters(self.policy).items()}
        options = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(self.policy, state, options=options)

    def save_state(self, folder: Path, rank: int) -> None:
        save_optimizer(self.optimizer, folder / SHARD_FILE.format(rank=rank))

    def load_state(self, folder: Path, rank: int) -> None:
        load_optimizer(self.optimizer, folder / SHARD_FILE.format(rank=rank))


class DeepSpeed(WholeCopies):
    """DeepSpeed's ZeRO: optimizer states, gradients and weights are cut, as many of them as its stage says."""

    lockstep = True  # each stage reduces gradients in the backward pass, of every row or of the last

    def __init__(self, arguments: Any, policy: Any, optimizer: Any, world: int) -> None:
        from accelerate import Accelerator

        arguments.hf_deepspeed_config.trainer_config_finalize(arguments, policy, 0)
        accelerator = Accelerator(deepspeed_plugin=arguments.deepspeed_plugin)
        self.engine, _ = accelerator.prepare(policy, optimizer)
        super().__init__(policy, getattr(self.engine.optimizer, "optimizer", self.engine.optimizer), world)
        self.model = self.engine
        sharding.use_state_files(self.engine)

    def sequence_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """DeepSpeed gathers weights ahead in the order of the pass before, and in training the head is no module of a pass."""
        logprobs = super().sequence_logprobs(token_ids)
        if offload := getattr(self.engine.optimizer, "parameter_offload", None):  # of stage 3
            order = offload.get_param_coordinator()
            if not order.is_invalid_trace():
                order._invalidate_trace()
        return logprobs

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=last)
        self.engine.backward(loss * self.world)  # DeepSpeed takes the mean over ranks

    def step(self, max_norm: float, loss: float) -> float:
        """DeepSpeed clips at its own gradient_clipping. Raises ActorError for a loss that is not finite."""
        if not math.isfinite(loss):
            raise ActorError("the loss is not finite, and DeepSpeed cannot leave a step out; lower learning_rate")
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def whole(self, names: Sequence[str]) -> dict[str, Tensor]:
        import deepspeed

        parameters = model.trained_parameters(self.policy)
        with deepspeed.zero.GatheredParameters([parameters[name] for name in names]):
            return {name: parameters[name].detach().clone() for name in names}

    def load(self, files: Sequence[Path]) -> None:
        """DeepSpeed's own state, which load_state reads, holds the weights too."""

    def save_state(self, folder: Path, rank: int) -> None:
        sharding.save_engine(self.engine, folder, trained_only=True)

    def load_state(self, folder: Path, rank: int) -> None:
        self.engine.load_checkpoint(str(folder), load_module_strict=False)
