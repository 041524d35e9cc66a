"""What each worker of a dataset job does under Ray Train: load, train with TRL's trainer, report, save.

Consumes Arrow files of prepared rows; produces records for the driver's display, checkpoints, and the adapter or model in
output_dir. Ranks meet in the collectives of torch.distributed, which Ray Train has set up before this runs.
"""

import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from datasets import Dataset, concatenate_datasets

from actors import adapter, attention, device, hub, model, sharding, storage
from actors.errors import ActorError, ConfigError, DataError
from actors.methods import METHODS
from actors.methods.base import OF_TRAINING, Inputs
from actors.specs import WITH_REFERENCE, DatasetTrainSpec

log = logging.getLogger("eagleray")

SHUFFLED_ROWS = 1000  # of a stream that a worker holds, of which it draws the next one


class Reports:
    """The records of rank 0, on their way to the driver. An actor, since the driver asks while training goes on."""

    def __init__(self) -> None:
        self.records: list[tuple[str, dict[str, float]]] = []  # kind, record

    def add(self, kind: str, record: dict[str, float]) -> None:
        """kind: train | eval | start, of the workers, with the step that they go on from."""
        self.records.append((kind, record))

    def since(self, count: int) -> list[tuple[str, dict[str, float]]]:
        """All but the first `count` records."""
        return self.records[count:]


def train_loop(config: dict[str, Any]) -> None:
    """Entry point of Ray Train: config holds the spec, the handle of Reports, and path and content of the driver's marker.

    Ray Train calls it again when workers were lost or have come back, and it goes on from the newest checkpoint.
    """
    storage.ensure_shared(*config["marker"])
    spec = as_of_now(config["spec"], ray.train.get_context().get_world_size())
    if ray.train.get_context().get_world_rank() == 0:
        step = storage.read_state(Path(spec.resume_from))["step"] if spec.resume_from else 0
        config["reports"].add.remote("start", {"step": step})
    device.set_threads(spec.threads)
    try:
        trainer = build_trainer(spec, config["reports"])
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise ConfigError(f"lora_target_modules: {error}") from error  # PEFT names those that the model has not
    trainer.train(resume_from_checkpoint=spec.resume_from)
    save_result(trainer, spec)


def as_of_now(spec: DatasetTrainSpec, workers: int) -> DatasetTrainSpec:
    """The spec for so many workers, who go on from the newest checkpoint. A step has the same rows with any number of them."""
    newest = storage.newest_checkpoint(Path(spec.output_dir))
    rows_at_once = spec.arguments["per_device_train_batch_size"] * workers
    arguments = {**spec.arguments, "gradient_accumulation_steps": spec.rows_per_step // rows_at_once}
    resume = str(newest) if newest else spec.resume_from
    if resume:
        arguments["eval_on_start"] = False
    return replace(spec, arguments=arguments, resume_from=resume)


def build_trainer(spec: DatasetTrainSpec, reports: Any) -> Any:
    """The method's trainer on this worker's device. Raises ConfigError for what that cannot train."""
    if spec.model.quantization == "int8" and spec.lora and spec.lora.use_dora and not device.has_gpu():
        raise ConfigError(
            "peft_use_dora: on a base of 8 bits needs a GPU, since on a CPU PEFT 0.21 loses the scales of its weights; use "
            "load_in_4bit, or leave it out"
        )
    stream = Stream(ray.train.get_dataset_shard("train"), spec.arguments["seed"]) if spec.streamed else None
    inputs = Inputs(
        model=hub.resolve(spec.model.name),
        model_init=model_init_arguments(spec),
        tokenizer=_tokenizer(spec),
        peft_config=model.peft_config(spec.lora, model.task_of(spec.method)) if spec.lora else None,
        train=Dataset.from_list([stream.first]) if stream else dataset_of(spec.train_files),
        held_out=dataset_of(spec.held_out_files) if spec.held_out_files else None,
        arguments={**spec.arguments, **sharding.start(spec.arguments)},
        packed=spec.packed,
    )
    trainer = METHODS[spec.method](inputs)
    if stream:
        feed(trainer, stream)
    trainer.job = spec.job
    trainer.keep = spec.save_total_limit
    if spec.model.quantization:
        model.keep_gradients(trainer.model)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # TRL makes them bfloat16, which loses small updates
    if trainer.accelerator.native_amp:
        model.take_inputs_as_they_are(trainer.model)
    if spec.lora and spec.lora.start:
        adapter.start_from(trainer.model, spec.lora.start, reference=spec.method in WITH_REFERENCE)
    trainer.add_callback(reporter(reports))
    if spec.early_stopping_patience is not None:
        from transformers import EarlyStoppingCallback

        trainer.add_callback(EarlyStoppingCallback(spec.early_stopping_patience))
    if spec.loss_watchdog is not None:
        trainer.add_callback(watchdog(*spec.loss_watchdog))
    return trainer


class Stream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """This worker's share of the rows; each time it is read is an epoch, with an order of its own."""

    def __init__(self, shard: Any, seed: int) -> None:
        """Waits for the first row. Raises DataError if there is none."""
        self.shard = shard  # of ray.train.get_dataset_shard
        self.seed = seed
        self.epoch = 0
        self.begun = self._rows()
        first = next(self.begun, None)
        if first is None:
            raise DataError("datasets: no row that can be used; quarantine.json has their places and reasons")
        self.first = first

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self.epoch == 0:
            yield self.first
        else:
            self.begun = self._rows()
        self.epoch += 1
        yield from self.begun

    def _rows(self) -> Iterator[dict[str, Any]]:
        batches = self.shard.iter_batches(
            batch_size=64,
            batch_format="pyarrow",
            local_shuffle_buffer_size=SHUFFLED_ROWS,
            local_shuffle_seed=self.seed + self.epoch,
        )
        for batch in batches:
            yield from batch.to_pylist()


def feed(trainer: Any, stream: Stream) -> None:
    """Lets a trainer that was built on the stream's first row train on all of it.

    Accelerate would cut a stream into shards once more.
    """
    trainer.train_dataset = stream
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader(
        stream, batch_size=trainer.args.per_device_train_batch_size, collate_fn=trainer.data_collator
    )


def dataset_of(files: Sequence[str]) -> Any:
    """The rows of Arrow files, memory-mapped: they cost no memory beyond the page cache."""
    return concatenate_datasets([Dataset.from_file(file) for file in files])


def save_result(trainer: Any, spec: DatasetTrainSpec) -> None:
    """The adapter, or the whole model, and the tokenizer, into output_dir, by rank 0."""
    best = trainer.state.best_model_checkpoint
    if spec.early_stopping_patience is None or best is None:
        trainer.save_model(spec.output_dir)
    elif trainer.args.should_save:
        shutil.copytree(best, spec.output_dir, ignore=shutil.ignore_patterns(*OF_TRAINING), dirs_exist_ok=True)
    if trainer.args.should_save and spec.lora:
        from peft import PeftConfig

        # So that it loads anywhere: the name from the configuration, and not this machine's path.
        config = PeftConfig.from_pretrained(spec.output_dir)
        config.base_model_name_or_path = spec.model.name
        config.save_pretrained(spec.output_dir)


def _tokenizer(spec: DatasetTrainSpec) -> Any:
    tokenizer = model.load_tokenizer(spec.model)
    # Masked wherever it pads, but a reward is read at the last token that is not this one.
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def model_init_arguments(spec: DatasetTrainSpec) -> dict[str, Any]:
    """Keyword arguments of from_pretrained."""
    init: dict[str, Any] = {"dtype": spec.model.dtype, "trust_remote_code": spec.model.trust_remote_code}
    asked = spec.model.attn_implementation
    if asked and asked.startswith("flash") and find_spec("flash_attn") is None:
        log.warning("attn_implementation: %s needs the package flash-attn, which is not here; sdpa takes its place", asked)
        asked = "sdpa"  # the same result
    compiled = bool(spec.arguments.get("torch_compile"))
    if spec.packed and attention.may_pack(asked, compiled=compiled) and model.takes_documents(spec.model):
        attention.register()
        asked = attention.NAME
    if asked:
        init["attn_implementation"] = asked
    if spec.method == "reward_trainer":
        init["num_labels"] = 1
    if spec.model.quantization:
        init["quantization_config"] = model.quantization(spec.model)
    return init


# name in TRL's log: name in ours
LOGGED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "epoch": "epoch",
    "entropy": "entropy",
    "mean_token_accuracy": "token_accuracy",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "pair_accuracy",
    "margin": "reward_margin",
    "accuracy": "pair_accuracy",
    "mean_reward": "mean_reward",
    "kl": "kl",
    "log_odds_ratio": "log_odds_ratio",
}


def reporter(reports: Any) -> Any:
    """A callback that sends rank 0's records to the driver, and evaluations of all ranks to Ray Train.

    Ray Train takes a report as a barrier that its controller lifts once a second or so, which is no way to end a step.
    """
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.step_began = time.perf_counter()
            self.last: dict[str, float] = {}
            self.sent: Any = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.step_began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            device.wait()  # what the step started may still run, and would be counted nowhere
            self.last["step_s"] = time.perf_counter() - self.step_began
            if state.global_step >= state.max_steps:
                control.should_log = True  # the last step is told of, whatever logging_steps says

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            named = record_of({**(logs or {}), "step": state.global_step})
            if named is None:
                return
            kind, record = named
            if kind == "train":
                record |= self.last
            if state.is_world_process_zero:
                self.sent = reports.add.remote(kind, record)
            if kind == "eval":
                ray.train.report(record)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.sent is not None:
                ray.get(self.sent)  # calls arrive in order, so all records have

    return Reporter()


def watchdog(threshold: float, patience: int) -> Any:
    """A callback that ends a job whose loss was above the threshold, or no number, at `patience` records in a row."""
    from transformers import TrainerCallback

    class Watchdog(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.above = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if logs is None or "loss" not in logs:
                return
            self.above = 0 if logs["loss"] <= threshold else self.above + 1
            if self.above >= patience:
                raise ActorError(
                    f"loss_watchdog_threshold: the loss was above {threshold:g} at {self.above} records in a row, "
                    f"{logs['loss']:g} at step {state.global_step}; lower learning_rate, or look at the rows"
                )

    return Watchdog()


def record_of(logs: dict[str, Any]) -> tuple[str, dict[str, float]] | None:
    """An entry of transformers' log as kind and record under our names; None for its summary at the end."""
    if "train_runtime" in logs:
        return None
    evaluation = any(name.startswith("eval_") for name in logs)
    source, target = ("eval_", "eval/") if evaluation else ("", "")
    record: dict[str, float] = {"step": logs["step"]}
    for logged, name in LOGGED.items():
        value = logs.get(f"{source}{logged}")
        if isinstance(value, int | float):
            record[f"{target}{name}"] = float(value) if math.isfinite(value) else math.nan
    return "eval" if evaluation else "train", record

