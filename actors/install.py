"""A snapshot into a running vLLM engine, without a file: methods that vLLM's workers gain.

    fused     the touched weights become W0 + scaling * B A, always from the pristine W0, so nothing drifts;
              sampling then runs at the speed of the base model
    adapter   a LoRA slot of vLLM: several policies at once, at a price in decoding
    weights   all weights as they come, bucket by bucket: what full fine-tuning trains

The worker is vLLM's own class plus PolicyInstaller (`worker_extension_cls`). Another way is a method here and a name in the
engine.
"""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from actors import device, hub, snapshot
from actors.snapshot import Bucket
from actors.types import TensorEntry

logger = logging.getLogger("eagleray")

PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class BaseWeights:
    """The checkpoint that policies are built on."""

    folder: str
    quantized: frozenset[str] = frozenset()  # names of the weights that the trainer's base has in fewer bits
    quantization: str | None = None  # nf4 | int8; None = none are


class PolicyInstaller:
    """Mixed into vLLM's worker, whose `model_runner` it uses. Method names begin with eagleray_ to clash with none."""

    model_runner: Any

    def eagleray_fuse(
        self, base: BaseWeights, entries: Sequence[TensorEntry], buckets: Sequence[Bucket], scaling: float
    ) -> None:
        """Reloads the base weights with the LoRA tensors of a snapshot merged in; no entries are the base itself."""
        self._fuse(base, snapshot.unpack(entries, *buckets), scaling)

    def eagleray_fuse_file(
        self, folder: str, quantized: Sequence[str], quantization: str | None, file: str, scaling: float
    ) -> None:
        """The same from an adapter's file, for engines whose workers are in processes that take plain values only.

        folder, quantized, quantization: of BaseWeights.
        """
        self._fuse(BaseWeights(folder, frozenset(quantized), quantization), load_file(file), scaling)

    def _fuse(self, base: BaseWeights, tensors: Mapping[str, Tensor], scaling: float) -> None:
        runner = self.model_runner
        self.eagleray_begin()
        try:
            self._load(merged_weights(base, tensors, scaling, runner.model_config.dtype, runner.device))
        finally:
            self.eagleray_finish()

    def eagleray_begin(self) -> None:
        """All weights are about to be loaded, by `eagleray_load`, and then `eagleray_finish` is called."""
        from vllm.model_executor.model_loader.reload.layerwise import initialize_layerwise_reload

        model = self.model_runner.get_model()
        if not serves_as_loaded(model):
            initialize_layerwise_reload(model)

    def eagleray_load(self, entries: Sequence[TensorEntry], bucket: Bucket) -> None:
        """Loads the weights of one bucket of a snapshot. entries: of that bucket."""
        runner = self.model_runner
        upload = device.upload_to(runner.device)
        tensors = snapshot.views(entries, bucket).items()
        self._load((name, upload(tensor).to(runner.model_config.dtype)) for name, tensor in tensors)

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        with torch.no_grad():
            self.model_runner.get_model().load_weights(weights)

    def eagleray_finish(self) -> None:
        """What was loaded is served from now on. Also after a load that failed half way: the next one can begin then, and the
        caller installs what was served before.
        """
        from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

        runner = self.model_runner
        model = runner.get_model()
        if not serves_as_loaded(model):
            with torch.no_grad():
                finalize_layerwise_reload(model, runner.model_config)
        runner.reset_lora_state()
        runner.reset_encoder_cache()
        runner.reset_mm_cache()

    def eagleray_pack_heads(self) -> None:
        """Makes heads that are the embedding follow it: on a CPU vLLM packs them into a copy, once, when it starts."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

        for module in self.model_runner.get_model().modules():
            if isinstance(module, ParallelLMHead) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
                module.quant_method.process_weights_after_loading(module)

    def eagleray_add_adapter(
        self, slot: int, entries: Sequence[TensorEntry], buckets: Sequence[Bucket], config: Mapping[str, Any]
    ) -> None:
        """Loads LoRA tensors into a slot id that is not in use, without touching the others."""
        from vllm.lora.lora_model import LoRAModel
        from vllm.lora.peft_helper import PEFTHelper

        worker_manager = self.model_runner.lora_manager
        manager = worker_manager._adapter_manager
        lora_config = worker_manager.lora_config
        helper = PEFTHelper.from_dict(dict(config))
        helper.validate_legal(lora_config)
        mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
        lora = LoRAModel.from_lora_tensors(
            slot,
            # vLLM scales B in place: a view of the object store would change what every reader sees.
            {name: tensor.clone() for name, tensor in snapshot.unpack(entries, *buckets).items()},
            helper,
            device="cpu",
            dtype=lora_config.lora_dtype,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        manager.add_adapter(lora)
        manager.activate_adapter(slot)

    def eagleray_remove_adapter(self, slot: int) -> None:
        self.model_runner.lora_manager.remove_adapter(slot)


def serves_as_loaded(model: nn.Module) -> bool:
    """Whether vLLM's model computes with the tensors that its weights are loaded into, so that others are written over them: as
    far as its layers say what they do after loading.

    Where it does not, vLLM loads every layer anew and makes of it what that layer computes with, which takes several times as
    long: linear layers are packed on a CPU; quantized, MoE and MLA layers make other tensors of theirs everywhere.
    """
    return device.has_gpu() and all(_serves_as_loaded(module) for module in model.modules())


def _serves_as_loaded(module: nn.Module) -> bool:
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.attention.backend import AttentionImplBase

    method = getattr(module, "quant_method", None)
    if isinstance(module, Attention):
        plain = AttentionImplBase.process_weights_after_loading
        return method is None and type(module.impl).process_weights_after_loading is plain
    if method is None:
        return not hasattr(module, "process_weights_after_loading")
    return type(method) in (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


@functools.cache
def _checkpoint(folder: str) -> dict[str, Tensor]:
    """Its weights by name, views of files that are mapped for as long as this process lives; nobody may write to them."""
    files = hub.weight_files(Path(folder))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def merged_weights(
    base: BaseWeights, tensors: Mapping[str, Tensor], scaling: float, dtype: torch.dtype, where: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the base's checkpoint, those with LoRA tensors merged: W0 + scaling * B A.

    Where the trainer's base is quantized, W0 is what that comes to: quantized and back, in `dtype`.

    The product and the sum are fp32, rounded once to `dtype`, on `where`. The checkpoint is memory-mapped, so W0 costs no
    memory beyond the page cache; on a CPU a weight without LoRA tensors may be a view of it, so nobody may write to it.
    Raises KeyError for a LoRA module whose weight is not in the checkpoint.
    """
    upload = device.upload_to(where)
    pending = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    for name, stored in _checkpoint(base.folder).items():
        weight = upload(stored)
        if name in base.quantized:
            weight = _quantized_and_back(weight.to(dtype), base.quantization)
        module = PEFT_PREFIX + name.removesuffix(".weight")
        if module in pending:
            pending.discard(module)
            a, b = (upload(tensors[f"{module}.lora_{half}.weight"]).float() for half in "AB")
            weight = torch.addmm(weight.float(), b, a, alpha=scaling)
        yield name, weight.to(dtype)
    if pending:
        raise KeyError(f"no weight in {base.folder} for {len(pending)} LoRA modules, first {sorted(pending)[0]}")


def _quantized_and_back(weight: Tensor, quantization: str | None) -> Tensor:
    """What bitsandbytes multiplies with, as model.quantization configures it."""
    from bitsandbytes import functional

    if quantization == "int8":
        int8, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return torch.mul(int8, scales[:, None] / 127)
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    whole: Tensor = functional.dequantize_4bit(packed, state)
    return whole
