"""A dataset job from configuration to result: check, prepare rows with Ray Data, train with Ray Train, save, clean up.

Consumes a checked configuration; produces metrics, checkpoints and the adapter or model. Waits for the preparation and for
the workers; Ctrl-C ends both within seconds.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from actors import device, hub, network, storage
from actors.dataset_loop import Reports, record_of, train_loop
from actors.errors import ActorError, EaglerayError
from actors.reading import BadRow
from actors.specs import DatasetTrainSpec, ModelSpec
from actors.streaming import Quarantine
from orchestrator import checkpoints, cluster, starting_adapter, waits
from orchestrator.arguments import training_arguments
from orchestrator.data import ensure_usable
from orchestrator.dataset_plan import METHOD_NAMES, DatasetPlan, describe, make_dataset_plan, packs
from orchestrator.display import DATASET_COLUMNS, Display
from orchestrator.environment import worker_environment
from orchestrator.fit import warnings
from orchestrator.jobs import (
    RunResult,
    metrics_log,
    quantization,
    special_tokens,
    tell_stop,
    trained_lora,
    unusable,
    write_config,
    write_quarantine,
)
from orchestrator.metrics import MetricsLog, read
from orchestrator.plan import Node, ensure_placeable
from orchestrator.prepare import check, prepare, stream
from orchestrator.prepared import Prepared
from orchestrator.row_sources import chat_template_text, fingerprint
from orchestrator.schema import JobConfig
from orchestrator.sharding import kind
from orchestrator.watch import watched

MAX_RESTARTS = 5  # of a job with a range of workers
WATCHDOG_PATIENCE = 3  # records with too high a loss, as Axolotl has it
JUDGED_ROWS = 1000  # of a stream: of fewer, nobody knows what share is bad
POLL_S = 0.5  # how often the driver asks for new records


def plan_job(config: JobConfig, nodes: list[Node]) -> DatasetPlan:
    """The plan of a job on these nodes; finds its files and formats, starts nothing."""
    check(config, config.source.folders)
    return make_dataset_plan(config, nodes, device.fastest_dtype(gpu=False))


def run(config: JobConfig, display: Display) -> RunResult:
    """Runs a job, its paths absolute, to its end.

    Raises EaglerayError for anything a person can act on, waits.Interrupted on Ctrl-C or SIGTERM.
    """
    output_dir = Path(config.output_dir)
    hub.resolve(config.base_model)
    starting_adapter.ensure_fits(config)
    plan_job(config, cluster.local_nodes())
    display.columns = DATASET_COLUMNS[config.rl]
    with checkpoints.claimed(output_dir) as marker:
        resume = checkpoints.resume_point(config, output_dir, display.warn)
        step = 0
        if resume is not None:
            state = storage.read_state(resume)
            step = int(state["step"])
            checkpoints.ensure_same_job(state["job"], identity(config), resume)
            for aside in checkpoints.set_newer_aside(resume, step, output_dir):
                display.note(f"a checkpoint of a later step than the one resumed from lies in {aside} now")
        write_config(config, output_dir)
        with waits.interruptible(), watched(config, display) as watch, ExitStack() as stack:
            with display.phase("starting Ray"):
                here = stack.enter_context(cluster.connected())
            watch.begin(here)
            stack.enter_context(watch.looking())
            plan = make_dataset_plan(config, cluster.nodes(), device.fastest_dtype(gpu=False))
            ensure_placeable(plan.problems)
            title = f"{METHOD_NAMES[config.rl]}: {config.base_model} -> {output_dir}"
            display.header(title, [*describe(config, plan), f"dashboard   {here}"])
            for text in warnings(config, plan):
                display.warn(text)
            rows = stack.enter_context(prepared_rows(config, output_dir, display))
            watch.planned(plan.total_steps(config, rows.train.rows), step)
            result = _Training(config, plan, rows, output_dir, display).run(resume, step, marker)
        return result


@contextmanager
def prepared_rows(config: JobConfig, output_dir: Path, display: Display) -> Iterator[Prepared]:
    """Prepares the rows, and removes them at its end unless dataset_prepared_path keeps them."""
    folder = output_dir / ".prepared"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    write_quarantine(output_dir, ())  # rows of an earlier run may have been mended

    def told(count: int, bad: Sequence[BadRow]) -> None:
        write_quarantine(output_dir, bad)
        display.warn(unusable(count))

    try:
        with display.phase("preparing rows"):
            rows = prepare(config, folder, config.source.folders, display.note, display.progress, told)
        _tell(rows, display, config.streaming)
        yield rows
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _tell(rows: Prepared, display: Display, streaming: bool) -> None:
    train, held_out = rows.train, rows.held_out
    packed = f" (of {train.documents} documents)" if train.documents != train.rows else ""
    besides = f", {held_out.rows} held out" if held_out.rows else ""
    lengths = f"{train.tokens} tokens, {train.trained_tokens} of them trained; the longest row has {train.longest}"
    if streaming:
        display.note(f"rows to train on are read as training goes on{besides}")
    else:
        display.note(f"{train.rows} rows{packed} to train on{besides}; {lengths}")


class _Training:
    """One run of Ray Train on a connected cluster."""

    def __init__(self, config: JobConfig, plan: DatasetPlan, rows: Prepared, output_dir: Path, display: Display) -> None:
        self.config = config
        self.plan = plan
        self.rows = rows
        self.output_dir = output_dir
        self.display = display
        self.step = 0
        self.starts = 0
        self.evaluations: list[dict[str, Any]] = []
        self.bad_rows = 0  # of a stream, so far
        self.bad: list[BadRow] = []  # the first of them
        self.total = plan.total_steps(config, rows.train.rows)

    def run(self, resume: Path | None, step: int, marker: str) -> RunResult:
        reports = cluster.start_free(Reports, "reports")
        quarantine = cluster.start_free(Quarantine, "quarantine") if self.config.streaming else None
        self.step = step
        log = metrics_log(self.config, step, self.display)
        if resume is not None:
            self._complete(log, resume)
            self.display.note(f"resumed from {resume}")
        with log, self._trained(reports, quarantine, resume, marker) as training, self.display.phase("training"):
            try:
                self._follow(training, reports, quarantine, log)
            except waits.Interrupted:
                tell_stop(self.display, self.output_dir, self.step)
                raise
            training.raise_if_failed()
            log.keep_result()
        what = "adapter" if self.config.adapter else "model"
        self.display.summary(
            f"done: {self.step} steps",
            [
                f"{what:<8} {self.output_dir}",
                f"metrics  {log.path}",
                f"curves   eagleray report {self.output_dir}",
            ],
        )
        return RunResult(self.output_dir, self.step, tuple(self.evaluations))

    def _complete(self, log: MetricsLog, resume: Path) -> None:
        """Writes the records that the checkpoint knows and a killed driver had not written yet."""
        written = {(record["kind"], record["step"]) for record in read(log.path)}
        for entry in json.loads((resume / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]:
            named = record_of(entry)
            if named is not None and (named[0], named[1]["step"]) not in written:
                log.write(named[0], named[1])  # type: ignore[arg-type]

    def _follow(self, training: "_Fit", reports: Any, quarantine: Any, log: MetricsLog) -> None:
        """Keeps and shows what the workers tell, until they have ended."""
        seen = 0
        running = True
        while running:
            running = training.thread.is_alive()
            records = waits.fetch(reports.since.remote(seen), "the records of the workers", 60)
            seen += len(records)
            for name, record in records:
                if name == "start":
                    self._started(int(record["step"]), log)
                    continue
                log.write(name, record)
                if name == "train":
                    self.display.step(record, self.total)
                    self.step = int(record["step"])
                else:
                    self.evaluations.append(record)
                    self.display.held_out(record)
            if quarantine is not None:
                self._watch(quarantine)
            if running:
                waits.pause(POLL_S)

    def _started(self, step: int, log: MetricsLog) -> None:
        """At the first start there is nothing to take back."""
        self.starts += 1
        if self.starts > 1:
            self.display.warn(f"Ray Train has started the workers again; they go on after step {step}")
            log.go_back(step)
            self.step = step
            self.evaluations = [record for record in self.evaluations if record["step"] <= step]

    def _watch(self, quarantine: Any) -> None:
        """Keeps quarantine.json, and stops the job at too many bad rows or a file that cannot be read."""
        raw_rows, bad_rows, long_rows, error = waits.fetch(quarantine.so_far.remote(), "the quarantine", 60)
        if bad_rows > self.bad_rows:
            self.bad_rows = bad_rows
            self.bad = waits.fetch(quarantine.rows.remote(), "the quarantine", 60)
            write_quarantine(self.output_dir, [*self.bad, *self.rows.bad])
        if error is not None:
            raise error
        too_many = bad_rows - long_rows > self.config.ray.max_bad_rows * max(raw_rows, JUDGED_ROWS)
        if too_many or self.config.excess_length_strategy == "raise":
            ensure_usable(self.config, "rows", 1, raw_rows, bad_rows, long_rows, self.bad)

    def _trained(self, reports: Any, quarantine: Any, resume: Path | None, marker: str) -> "_Fit":
        import ray.train
        from ray.train.torch import TorchTrainer

        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # fills the dashboard's record of Train runs
        storage_path = self.output_dir / ".ray-train"
        fixed = self.plan.min_workers == len(self.plan.bundles)
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={
                "spec": train_spec(self.config, self.plan, self.rows, resume),
                "reports": reports,
                "marker": (str(self.output_dir / checkpoints.LOCK), marker),
            },
            datasets={"train": stream(self.config, self.config.source.folders, quarantine, self.plan.readers)}
            if quarantine is not None
            else None,
            scaling_config=ray.train.ScalingConfig(
                num_workers=len(self.plan.bundles) if fixed else (self.plan.min_workers, len(self.plan.bundles)),
                use_gpu=self.plan.bundles[0].resources.get("GPU", 0) > 0,
                resources_per_worker=dict(self.plan.bundles[0].resources),
            ),
            torch_config=network.torch_config(self.config.ddp_timeout or 1800),
            run_config=ray.train.RunConfig(
                name=f"{self.config.ray_run_name or self.output_dir.name}-{uuid.uuid4().hex[:8]}",
                storage_path=str(storage_path),
                # Ray Train would wait without end for what another job holds.
                failure_config=ray.train.FailureConfig(
                    max_failures=0 if fixed else MAX_RESTARTS, controller_failure_limit=2
                ),
                worker_runtime_env={"env_vars": worker_environment(self.plan.threads)},
            ),
        )
        return _Fit(trainer, storage_path)


class _Fit:
    """Ray Train's blocking call in a thread, so that the driver can show records and hear Ctrl-C meanwhile."""

    def __init__(self, trainer: Any, storage_path: Path) -> None:
        self.trainer = trainer
        self.storage_path = storage_path
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # carried to the driver's thread, which tells the person
            self.error = error

    def __enter__(self) -> "_Fit":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.storage_path, ignore_errors=True)  # Ray Train's own records; ours are in output_dir

    def raise_if_failed(self) -> None:
        """Raises EaglerayError: the worker's own, or an ActorError for all else."""
        if self.error is None:
            return
        failures = getattr(self.error, "worker_failures", None) or {}
        for rank, failure in sorted(failures.items()):
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, EaglerayError):
                raise cause
            raise ActorError(f"worker {rank} failed: {waits.told(failure)}") from self.error
        raise ActorError(f"training failed: {waits.told(self.error)}") from self.error


def train_spec(config: JobConfig, plan: DatasetPlan, rows: Prepared, resume: Path | None) -> DatasetTrainSpec:
    """What the workers are built from."""
    arguments = training_arguments(
        config,
        gpu=plan.gpu,
        dtype=plan.dtype,
        steps_per_epoch=plan.total_steps(config, 0) if config.streaming else plan.steps_per_epoch(rows.train.rows),
        total_steps=plan.total_steps(config, rows.train.rows),
    )
    arguments["eval_on_start"] = bool(rows.held_out.rows) and resume is None  # what training has to better
    sharded = kind(config)
    return DatasetTrainSpec(
        method=config.rl or "sft",
        model=ModelSpec(
            config.base_model,
            plan.dtype,
            config.trust_remote_code,
            plan.attention,
            quantization(config),
            sharded == "fsdp",
            special_tokens(config),
            chat_template_text(config),
        ),
        lora=trained_lora(config),
        train_files=rows.train.files,
        held_out_files=rows.held_out.files,
        packed=packs(config),
        streamed=config.streaming,
        rows_per_step=plan.rows_per_step,
        output_dir=config.output_dir,
        job=identity(config),
        arguments=arguments,
        early_stopping_patience=config.early_stopping_patience,
        loss_watchdog=_loss_watchdog(config),
        save_total_limit=config.save_total_limit,
        resume_from=str(resume) if resume else None,
        threads=plan.threads,
    )


def _loss_watchdog(config: JobConfig) -> tuple[float, int] | None:
    if config.loss_watchdog_threshold is None:
        return None
    return config.loss_watchdog_threshold, config.loss_watchdog_patience or WATCHDOG_PATIENCE


def identity(config: JobConfig) -> dict[str, Any]:
    """What a resumed job must have as it was: the model, the adapter's shape, the rows and how they are cut into steps."""
    keys = (
        "rl base_model bf16 adapter load_in_4bit load_in_8bit lora_r lora_alpha lora_target_linear lora_target_modules "
        "lora_modules_to_save peft_use_rslora peft_use_dora seed micro_batch_size gradient_accumulation_steps ray_num_workers"
    )
    return {
        **{key: getattr(config, key) for key in keys.split()},
        "sharding (deepspeed, fsdp_version, fsdp_config)": kind(config),
        "lora_model_dir (digest of its adapter)": starting_adapter.digest(config),
        "datasets (digest of how they are read, and of their sizes)": fingerprint(config, config.source.folders),
    }
