"""Bytes that a rank of a trainer needs, by what they are for, at the moment when they are most.

What the layers keep is counted (activations.py). All else follows from the numbers of weights (model_shape.py) by formulas
whose source stands beside them, and what comes after the layers is in head_memory.py. Rows count as the longest that the
configuration allows. What an engine needs is in engine_memory.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from actors.attention import may_pack
from actors.model import task_of
from actors.specs import WITH_REFERENCE
from orchestrator import sharding
from orchestrator.activations import PackedRows, PaddedRows, Setting, alive
from orchestrator.hardware import GIB
from orchestrator.head_memory import HEADS, Task
from orchestrator.jobs import attention, quantization, trained_lora
from orchestrator.model_shape import ModelSource, read_shape
from orchestrator.schema import JobConfig

MIB = 2**20
BYTES = {"float32": 4, "bfloat16": 2}
TERMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "kv cache", "overhead")

# NF4 (QLoRA, arXiv:2305.14314, section 3): 4 bits, a constant of 8 bits a block of 64, one of 32 bits a block of 256 of these.
NF4_CONSTANTS = 1 / 64 + 4 / (64 * 256)
# An optimizer's states of a trained number: copies in its dtype, or bytes. bitsandbytes has a constant a block of 256; what is
# paged moves to host memory when there is no room; adafactor keeps a row and a column, and sgd nothing.
COPIES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adagrad": 1, "rmsprop": 1}
BLOCKWISE = 1 + 4 / 256
STATE_BYTES = {"adamw_bnb_8bit": 2 * BLOCKWISE, "adamw_8bit": 2 * BLOCKWISE, "lion_8bit": BLOCKWISE, "lion_32bit": 4.0}

CUDA_CONTEXT = GIB // 2  # of a process, with the kernels of torch
NCCL = GIB // 2  # buffers of a process that talks to others
HOLES = 0.03  # between the blocks of torch's allocator on a GPU, as a share of what is in them
CUBLAS = 2 * 32 * MIB  # torch's workspaces on Hopper: the main thread's, and autograd's
PROCESS = 700 * MIB  # resident in a process on a CPU that has imported all that it needs


@dataclass(frozen=True)
class Memory:
    """Of one rank or engine."""

    moment: str  # when it is the most
    terms: Mapping[str, int]  # bytes by a name of TERMS

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.terms.values())

    @property
    def tensors(self) -> int:
        """Bytes without what torch's allocator does not know of."""
        return self.total - self.terms["overhead"]


def source_of(config: JobConfig) -> ModelSource:
    return ModelSource(config.base_model, config.trust_remote_code, task_of(config.rl))


def longest_rows(config: JobConfig, *, gpu: bool) -> PaddedRows | PackedRows:
    """A micro-batch of the longest rows that the configuration allows."""
    size, length = config.micro_batch_size, config.sequence_len
    if config.rl == "grpo":
        longest = config.trl.max_completion_length
        return PackedRows(-(-size // config.trl.num_generations), length - longest, size, longest)
    asked = attention(config, gpu)
    flash = (asked or "").startswith("flash")  # needs no mask
    if config.rl is None and config.sample_packing:
        told = flash or may_pack(asked, compiled=config.torch_compile is True)
        return PaddedRows(1, size * length, masked=not flash, packs=size if told else 0)
    sequences = size if config.rl in (None, "kto") else 2 * size  # chosen and rejected go through the model together
    return PaddedRows(sequences, length, masked=sequences > 1 and not flash)


def trainer_memory(config: JobConfig, dtype: str, workers: int, *, gpu: bool) -> Memory:
    """Of one rank of the trainer, or worker of a dataset job, once the optimizer has its states.

    dtype: of the computation. Raises ConfigError for a model that cannot be had.
    """
    return max(_Rank(config, dtype, workers, gpu).moments(), key=lambda memory: memory.total)


def resting_memory(config: JobConfig, dtype: str, workers: int, *, gpu: bool) -> Memory:
    """As `trainer_memory`, while the rank computes nothing and has given back what it can."""
    return _Rank(config, dtype, workers, gpu).at_rest()


class _Rank:
    """One of `workers`: of each term it holds all, or its share."""

    def __init__(self, config: JobConfig, dtype: str, workers: int, gpu: bool) -> None:
        self.config = config
        self.workers = workers
        self.gpu = gpu
        self.online = config.rl == "grpo"
        self.quantized = quantization(config)
        self.kind = sharding.kind(config)
        self.options: Mapping[str, Any] = sharding.sharding_arguments(config, gpu)
        self.dtype = dtype
        self.size = BYTES[dtype]
        self.lora = trained_lora(config)
        self.full = self.lora is None
        self.shape = read_shape(source_of(config), self.lora)
        self.rows = longest_rows(config, gpu=gpu)

    def moments(self) -> Iterator[Memory]:
        """The moments at which a rank may need the most."""
        layers = alive(
            Setting(
                source=source_of(self.config),
                lora=self.lora,
                rows=self.rows,
                dtype=self.dtype,
                eager=self.config.attn_implementation == "eager",
                checkpointing=sharding.checkpoints_activations(self.config),
            )
        )
        trains_head = self.lora is None or "lm_head" in self.lora.modules_to_save
        stored = self._trained_size() if trains_head else self.size
        head = HEADS[self.config.rl](Task(self.rows, self.shape, self.size, stored, trains_head, self.gpu))
        gradients = self._gradients()
        # Gradients of an earlier micro-batch are there all the time; those of the only one come as it goes back.
        before = gradients if self.config.gradient_accumulation_steps > 1 else 0
        yield self._memory("forward pass", before, layers.forward)
        yield self._memory("head's forward pass", before, layers.kept, head.kept + head.forward)
        if self.config.rl in WITH_REFERENCE:
            again = layers.forward - layers.kept + self.rows.tokens * self.shape.hidden * self.size
            yield self._memory("reference", before, layers.kept + again, head.kept + head.forward)
        yield self._memory("head's backward pass", before, layers.kept, head.kept + head.backward)
        after_head = max(before, self._share(head.gradient, "zero2", "zero3", "fsdp"))
        yield self._memory("backward pass", after_head, layers.backward)
        yield self._memory("end of the backward pass", gradients, max(layers.last, layers.embedding))
        yield self._memory("optimizer step", gradients, buffers=self._step())
        if self.online and self.kind:
            whole = self.shape.trained * self._trained_size()
            yield self._memory("publishing", 0, buffers=min(whole, self.config.ray.sync_bucket_mib * MIB))

    def at_rest(self) -> Memory:
        return self._memory("between steps", 0)

    def _memory(self, moment: str, gradients: int, activations: int = 0, logits: int = 0, buffers: int = 0) -> Memory:
        computing = activations > 0
        if computing and self.quantized:
            activations += self.shape.largest * self.size  # dequantized while it is multiplied with
        if computing and self.quantized == "int8":
            activations += self._inputs_of_int8()
        terms = {
            "weights": self._weights(),
            "gradients": gradients,
            "optimizer": self._optimizer(),
            "activations": activations,
            "logits": logits,
            "buffers": buffers + (CUBLAS if self.gpu else 0) + (self._gathered() if computing else 0) + self._buckets(),
        }
        outside = CUDA_CONTEXT + (NCCL if self.workers > 1 else 0) + round(HOLES * sum(terms.values())) if self.gpu else PROCESS
        return Memory(moment, {**terms, "overhead": outside})

    def _share(self, nbytes: float, *kinds: str) -> int:
        """What a rank has of something that these kinds of sharding cut: ZeRO (arXiv:1910.02054, figure 1), FSDP2."""
        return round(nbytes / self.workers if self.kind in kinds else nbytes)

    def _trained_size(self) -> int:
        """Bytes of a trained number. Adapters are fp32; all weights have the job's dtype, or are FSDP's masters."""
        if self.full:
            return 4 if sharding.has_masters(self.config) else self.size  # accelerate 1.15, fsdp2_prepare_model
        in_base_dtype = self.kind == "zero3" and not self.online and not self.quantized  # TRL 1.16, autocast_adapter_dtype
        return self.size if in_base_dtype else 4

    def _weights(self) -> int:
        shape, config = self.shape, self.config
        trained = shape.trained * self._trained_size()
        compares = config.rl in WITH_REFERENCE or (self.online and config.trl.beta)
        if self.full:
            reference = shape.weights * self.size if compares else 0  # FSDP2 has it in one piece, whole while it computes
            return self._share(trained, "zero3", "fsdp") + self._share(reference, "zero3")
        if compares and config.lora_model_dir:
            trained *= 2  # the adapter as it was
        rest = shape.weights - shape.quantizable
        rest *= 4 if self.quantized and config.rl == "orpo" else self.size  # TRL's ORPO puts what is not quantized into fp32
        # LLM.int8() (arXiv:2208.07339, section 3.1): a byte, and a constant of 32 bits a row.
        quantized = {None: self.size, "nf4": 0.5, "int8": 1}[self.quantized] * shape.quantizable
        constants = {None: 0.0, "nf4": NF4_CONSTANTS * shape.quantizable, "int8": 4 * shape.quantizable_rows}[self.quantized]
        return self._share(trained + quantized + rest, "zero3", "fsdp") + round(constants)  # every rank has all constants

    def _gradients(self) -> int:
        return self._share(self.shape.trained * self._trained_size(), "zero2", "zero3", "fsdp")

    def _optimizer(self) -> int:
        """States; with DeepSpeed also the weights in fp32 that it steps on (ZeRO, section 3.1: K = 12)."""
        if self._zero("offload_optimizer", {}).get("device", "none") != "none":
            return 0  # in host memory
        name, deepspeed = self.config.optimizer, "deepspeed" in self.options
        size = 4 if deepspeed else self._trained_size()
        states = STATE_BYTES.get(name, COPIES.get(name, 0) * size) + (4 if deepspeed else 0)
        return self._share(self.shape.trained * states, "zero1", "zero2", "zero3", "fsdp")

    def _step(self) -> int:
        """What the optimizer's step needs for a moment."""
        trained = self.shape.trained * self._trained_size()
        if "deepspeed" in self.options:
            return self._share(trained + 4 * self.shape.trained, "zero1", "zero2", "zero3")  # gradients, flat, and in fp32
        roots = self.config.optimizer == "adamw_torch" and self.gpu  # of all at once, in torch's for-each loop
        flat = self.online and self.workers > 1 and self.kind is None  # gradients as one buffer (actors/ranks.py)
        return max(self._share(trained, "fsdp") if roots else 0, trained if flat else 0)

    def _buckets(self) -> int:
        """In which gradients go to the other ranks."""
        if self.workers > 1 and self.kind is None and not self.online:
            return self._gradients()  # torch's DDP has all of them twice
        if "deepspeed" not in self.options:
            return 0
        size = self._of_hidden("reduce_bucket_size", 5e8)
        both = 2 if self._zero("overlap_comm", False) is True else 1
        return round(min(size * both, self.shape.trained) * self.size)

    def _gathered(self) -> int:
        """Weights that are whole for a moment."""
        shape = self.shape
        if self.kind == "zero3":
            return round(min(float(self._zero("stage3_max_live_parameters", 1e9)), shape.weights) * self.size)
        if self.kind != "fsdp":
            return 0
        layer = shape.in_layers / shape.layers
        at_once = shape.layers if self.options["fsdp_config"].get("reshard_after_forward") is False else 2  # this and the next
        gathered = at_once * layer * (0.5 if self.quantized else self.size)
        sums = 4 if sharding.has_masters(self.config) else self.size  # actors/methods/base.py, ExactSums
        head = shape.head or shape.embedding
        # Gradients of a layer, and what is summed of the one before: of the last layer that is the head.
        reduced = layer * self.size + max(layer, head) * sums if self.full else 0
        return round(gathered + reduced + head * self.size)

    def _inputs_of_int8(self) -> int:
        """bitsandbytes 0.50 keeps what each int8 layer multiplies: attention's input and output, the MLP's, and its middle."""
        if sharding.checkpoints_activations(self.config):
            return 0
        shape = self.shape
        numbers = 2 * shape.hidden + shape.heads * shape.head_dim + shape.intermediate
        return shape.layers * self.rows.tokens * numbers * self.size

    def _zero(self, name: str, default: Any) -> Any:
        """An option of DeepSpeed's zero_optimization."""
        found = self.options.get("deepspeed", {}).get("zero_optimization", {}).get(name)
        return default if found is None else found

    def _of_hidden(self, name: str, default: float) -> float:
        """As `_zero`; transformers makes "auto" the square of the hidden size."""
        found = self._zero(name, default)
        return float(self.shape.hidden**2 if found == "auto" else found)
