"""What the methods' trainers share: rows that are prepared already, sums in fp32, and checkpoints without a pickle.

They are mixed into TRL's trainers, before them. Everything else is TRL's and transformers' own.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import convert_to_fp32
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy

from actors import device, sharding, storage
from actors.optimizers import OPTIMIZER_FILE, SHARD_FILE, load_optimizer, load_schedule, save_optimizer

SCHEDULER_FILE = "scheduler.json"
RNG_FILE = "rng-{rank}"
# What a checkpoint holds beside the result that it would be.
OF_TRAINING = (
    "optimizer*", SCHEDULER_FILE, storage.STATE, "rng-*", "trainer_state.json", storage.MANIFEST, "global_step*", "latest"
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """What every trainer is built from, made in the worker that trains."""

    model: Any  # a path: TRL loads it as its method needs it
    model_init: dict[str, Any]  # keyword arguments of from_pretrained
    tokenizer: Any
    peft_config: Any | None  # None = full fine-tuning
    train: Any  # datasets.Dataset of prepared rows
    held_out: Any | None
    arguments: dict[str, Any]  # of the method's configuration
    packed: bool  # rows hold several documents each

    def for_trainer(self) -> dict[str, Any]:
        """The arguments that every trainer takes under the same names."""
        return {
            "train_dataset": self.train,
            "eval_dataset": self.held_out,
            "processing_class": self.tokenizer,
            "peft_config": self.peft_config,
        }


class PreparedRows:
    """Rows come tokenized, masked and cut, so TRL's own preparation has nothing to do."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


class ExactSums:
    """FSDP2 whose outputs and sums of gradients are fp32, as in mixed precision with one worker, and whose gradients are cut.

    Accelerate has outputs and sums in bfloat16, which holds a log-probability of -1000 nats to the nearest 4; and between the
    micro-batches of a step it keeps whole gradients on each rank.
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fsdp_plugin_args is not None and self.args.bf16:
            # Logits, where TRL takes them: in ORPO and reward models.
            self.model.register_forward_hook(lambda module, inputs, output: convert_to_fp32(output))

    def create_accelerator_and_postprocess(self) -> None:
        if self.args.fsdp_plugin_args is not None:
            # Nor could torch keep them whole in fp32: it would look for those of a head, whose weights TRL gathers by itself.
            self.args.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True}
            if self.args.bf16:
                policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
                self.args.fsdp_plugin_args["mixed_precision_policy"] = policy
        super().create_accelerator_and_postprocess()  # type: ignore[misc]


class SafeCheckpoints:
    """Optimizer, schedule and random states as safetensors and JSON; the manifest comes last, with a digest a file.

    A folder without its manifest is not whole, whatever else it holds, so a kill in the middle leaves no checkpoint that
    could be mistaken for one.
    """

    args: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    state: Any
    job: Mapping[str, object]
    keep: int | None  # checkpoints; None = all

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        weights = sharding.trainable_weights(self.model)  # transformers would gather a frozen base too
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, weights)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None and self.is_fsdp_enabled:
            self._load_whole(resume_from_checkpoint)  # before the weights are cut into shards
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[misc]
        if self.is_deepspeed_enabled:
            sharding.use_state_files(self.model_wrapped)
        if resume_from_checkpoint is not None:
            if self.is_deepspeed_enabled:
                from transformers.integrations.deepspeed import deepspeed_load_checkpoint

                deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=not self._has_adapter)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    @property
    def _has_adapter(self) -> bool:
        from peft import PeftModel

        return isinstance(self.model, PeftModel)

    def _load_whole(self, checkpoint: str) -> None:
        """The adapter or the model of a checkpoint into weights that are not sharded yet."""
        if self._has_adapter:
            self.model.load_adapter(checkpoint, self.model.active_adapter, is_trainable=True)
            return
        for file in sorted(Path(checkpoint).glob("model*.safetensors")):
            self.model.load_state_dict(load_file(file), strict=False)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)  # a pickle nobody reads

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # every rank's random state is in the folder
        if self.args.should_save:
            from transformers.trainer_utils import rotate_checkpoints

            folder = storage.checkpoint_path(Path(self.args.output_dir), self.state.global_step)
            storage.write_json(folder / storage.STATE, {"step": self.state.global_step, "job": dict(self.job)})
            storage.seal(folder)
            # Only now, since transformers would rotate before the new one is whole.
            rotate_checkpoints(
                self.args.output_dir,
                save_total_limit=self.keep,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            sharding.save_engine(self.model_wrapped, Path(output_dir), trained_only=self._has_adapter)
        elif self.is_fsdp_enabled or self.args.should_save:
            save_optimizer(self.optimizer, self._optimizer_file(output_dir))
        if self.args.should_save:
            schedule = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
            storage.write_json(Path(output_dir) / SCHEDULER_FILE, schedule)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            if not self.is_deepspeed_enabled:
                load_optimizer(self.optimizer, self._optimizer_file(checkpoint))
            schedule = json.loads((Path(checkpoint) / SCHEDULER_FILE).read_text(encoding="utf-8"))
            load_schedule(self.lr_scheduler, schedule)

    def _optimizer_file(self, folder: str) -> Path:
        sharded = SHARD_FILE.format(rank=self.args.process_index)
        path = Path(folder) / (sharded if self.is_fsdp_enabled else OPTIMIZER_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)  # another rank may be here first
        return path

    def _save_rng_state(self, output_dir: str) -> None:
        stem = Path(output_dir) / RNG_FILE.format(rank=self.args.process_index)
        stem.parent.mkdir(parents=True, exist_ok=True)  # another rank may be here first
        save_file(device.rng_state(), stem.with_suffix(".safetensors"))
        _, keys, *rest = np.random.get_state()
        version, internal, gauss = random.getstate()
        storage.write_json(stem.with_suffix(".json"), {
            "python": [version, list(internal), gauss],
            "numpy": [np.asarray(keys).tolist(), *map(float, rest)],
        })  # fmt: skip

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        stem = Path(checkpoint) / RNG_FILE.format(rank=self.args.process_index)
        if not stem.with_suffix(".json").is_file():
            return  # saved by fewer ranks than there are now
        device.set_rng_state(load_file(stem.with_suffix(".safetensors")))
        state = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), int(position), int(has_gauss), cached))
