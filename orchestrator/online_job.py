"""An online job (rl: grpo) from configuration to result: check, plan, start, loop, save, clean up.

Everything that a person can have got wrong is found before the first process starts, as far as it can be known then.
"""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import device, hub, model, storage
from actors.chat import prompt_token_ids
from actors.errors import ActorError
from actors.formats.templates import ensure_own
from orchestrator import checkpoints, cluster, sharding, starting_adapter, tensor_parallel, waits
from orchestrator.cluster import Actors
from orchestrator.conversations import ensure_playable
from orchestrator.data import PROBE_TOKENS, PromptSet, load_prompts, without_long_prompts
from orchestrator.description import describe
from orchestrator.display import Display
from orchestrator.fit import warnings
from orchestrator.grpo import Evaluation, Loop
from orchestrator.jobs import (
    RunResult,
    lora_spec,
    metrics_log,
    quantization,
    tell_stop,
    template_arguments,
    unusable,
    write_config,
    write_quarantine,
)
from orchestrator.metrics import MetricsLog
from orchestrator.online_specs import engine_spec, model_spec, trainer_spec
from orchestrator.plan import Node, Plan, completions_per_step, ensure_placeable, make_plan
from orchestrator.policies import Policies
from orchestrator.rewards import ensure_rewards, reward_models, reward_specs
from orchestrator.samples import Samples
from orchestrator.schema import JobConfig
from orchestrator.scoring import Scorer
from orchestrator.shared_engines import SharedEngines
from orchestrator.source import Problem
from orchestrator.watch import Watch, watched

PROMPTS_DIGEST = "datasets (digest of their prompts)"  # of a job's identity
PROBE_FILLER = range(100, 100 + PROBE_TOKENS)  # token ids that every vocabulary has, for probes of very short prompts


def plan_job(config: JobConfig, nodes: list[Node], *, shared: bool = False) -> tuple[Plan, PromptSet]:
    """The plan of a job on these nodes; reads the datasets, starts nothing. shared: as in make_plan."""
    prompts = load_prompts(config, config.source.folders)
    ensure_playable(config, prompts.train + prompts.held_out)
    return resolved(config, nodes, prompts, shared=shared), prompts


def resolved(config: JobConfig, nodes: list[Node], prompts: PromptSet, *, shared: bool = False) -> Plan:
    """The plan for these nodes. Of CPU nodes it takes this machine's processor as an example."""
    dtype = device.fastest_dtype(gpu=False)
    return make_plan(config, nodes, len(prompts.train), dtype, reward_models(config), shared=shared)


def run(config: JobConfig, display: Display, shared: SharedEngines | None) -> RunResult:
    """Runs a job, its paths absolute, to its end.

    Raises EaglerayError for anything a person can act on, waits.Interrupted on Ctrl-C or SIGTERM.
    """
    output_dir = Path(config.output_dir)
    plan, prompts = plan_job(config, cluster.local_nodes(), shared=shared is not None)
    conversational = any(not isinstance(row.prompt, str) for row in prompts.train + prompts.held_out)
    ensure_rewards(config, plan, conversational=conversational)
    hub.resolve(config.base_model)
    starting_adapter.ensure_fits(config)
    spec = model_spec(config, plan)
    tensor_parallel.ensure_possible(config)
    window = model.attention_window(spec)
    if window is not None and config.sequence_len > window:
        text = f"is {config.sequence_len}, but some layers of {config.base_model} look back {window} tokens only; use no more"
        config.source.raise_if_any([Problem("sequence_len", text)])
    if config.adapter is None:
        model.ensure_checkpoint_names(spec)
    tokenizer = model.load_tokenizer(spec)
    ensure_own(config.chat_template, tokenizer)
    template = template_arguments(config)
    prompts = without_long_prompts(config, prompts, lambda p: len(prompt_token_ids(tokenizer, p, template)))
    probe = [t for row in prompts.train[:PROBE_TOKENS] for t in prompt_token_ids(tokenizer, row.prompt, template)]
    probe = [*probe, *PROBE_FILLER][: min(PROBE_TOKENS, config.sequence_len - 1)]
    with checkpoints.claimed(output_dir) as marker:
        resume = checkpoints.resume_point(config, output_dir, display.warn)
        if resume is not None:
            state = storage.read_state(resume)
            checkpoints.ensure_same_job(state["job"], identity(config, prompts), resume)
            for aside in checkpoints.set_newer_aside(resume, state["step"], output_dir):
                display.note(f"a checkpoint of a later step than the one resumed from lies in {aside} now")
        _write_inputs(config, prompts, output_dir)
        with waits.interruptible(), watched(config, display) as watch, ExitStack() as stack:
            with display.phase("starting Ray"):
                here = stack.enter_context(cluster.connected())
            watch.begin(here)
            stack.enter_context(watch.looking())
            plan = resolved(config, cluster.nodes(), prompts, shared=shared is not None)
            watch.planned(plan.total_steps, state["step"] if resume else 0)
            ensure_placeable(plan.problems)
            title = f"GRPO: {config.base_model} -> {output_dir}"
            display.header(title, [*describe(config, plan), f"dashboard   {here}"])
            for text in warnings(config, plan):
                display.warn(text)
            if prompts.bad:
                display.warn(unusable(len(prompts.bad)))
            if shared is not None:
                stack.callback(shared.close)
            return _Job(config, plan, prompts, output_dir, display, shared).run(probe, resume, marker, watch)


class _Job:
    """One run on a connected cluster."""

    def __init__(
        self,
        config: JobConfig,
        plan: Plan,
        prompts: PromptSet,
        output_dir: Path,
        display: Display,
        shared: SharedEngines | None,
    ) -> None:
        self.config = config
        self.plan = plan
        self.prompts = prompts
        self.output_dir = output_dir
        self.display = display
        self.shared = shared
        self.evaluations: list[dict[str, Any]] = []

    def run(self, probe: list[int], resume: Path | None, marker: str, watch: Watch) -> RunResult:
        with cluster.placed(self.plan) as group, watch.looking():
            # They may be on the same GPU as what is started here.
            after = self.shared.actors() if self.shared and (self.config.ray.engine_gpus or 0) % 1 else ()
            actors = cluster.start_actors(
                self.plan,
                group,
                trainer_spec(self.config, self.plan),
                engine_spec(self.config, self.plan),
                probe,
                self.config.ray.kv_cache_gib,
                after,
            )
            specs = reward_specs(self.config, self.plan)
            scorer = Scorer(self.plan, group, specs, self.config.ray.reward_timeout_s, after)
            if self.shared and after:
                with self.display.phase("waiting for the shared engines"):
                    self.shared.wait(cluster.START_TIMEOUT_S)  # so that others have a limit of their own
            with self.display.phase("loading rewards, trainer and engines"):
                for note in scorer.wait_ready():
                    self.display.warn(note)
                waits.ask_ranks(
                    actors.trainers, "set_probe", probe, doing="loading its model", timeout_s=cluster.START_TIMEOUT_S
                )
                place = str(self.output_dir / checkpoints.LOCK)
                self._ask(actors, "ensure_shared", place, marker, doing="looking at output_dir")
                for index, engine in enumerate(actors.engines):
                    waits.fetch(engine.ready.remote(), f"engine {index}, loading its model", cluster.START_TIMEOUT_S)
                if self.shared is not None:
                    engines = self.shared.open(lora_spec(self.config), probe, cluster.START_TIMEOUT_S)
                    actors = replace(actors, engines=engines, policy=self.shared.policy)
            policies = Policies(
                actors,
                self.plan.dtype,
                self.config.ray.rollout_timeout_s,
                quantized=quantization(self.config) is not None,
            )
            samples = Samples(self.output_dir, self.display.warn) if self.config.trl.log_completions else None
            loop = Loop(self.config, self.plan, self.prompts, actors, policies, scorer, self.display.warn, samples)
            if resume is not None:
                self._restore(loop, resume)
            loop.start()
            try:
                with metrics_log(self.config, loop.step, self.display) as log:
                    self._loop(loop, log)
                    self._ask(actors, "save_policy", str(self.output_dir), doing="saving the result")
                    log.keep_result()
            finally:
                if samples:
                    samples.finish()
        written = [f"samples  {samples.folder}"] if samples else []
        report = f"curves   eagleray report {self.output_dir}"
        self.display.summary(
            f"done: {loop.step} steps",
            [f"{'adapter' if self.config.adapter else 'model  '}  {self.output_dir}", f"metrics  {log.path}", *written, report],
        )
        return RunResult(self.output_dir, loop.step, tuple(self.evaluations))

    def _ask(self, actors: Actors, method: str, *args: Any, doing: str) -> Any:
        timeout_s = self.config.ray.rollout_timeout_s
        return waits.ask_ranks(actors.trainers, method, *args, doing=doing, timeout_s=timeout_s)

    def _loop(self, loop: Loop, log: MetricsLog) -> None:
        total = self.plan.total_steps
        try:
            if not self.evaluations:
                self._evaluate(loop, log, "before training")
            while loop.step < total:
                with self.display.phase(f"step {loop.step + 1} of {total}"):
                    record = loop.advance()
                log.write("train", record)
                self.display.step(record, total)
                due = self.plan.eval_steps and loop.step % self.plan.eval_steps == 0
                if due or loop.step == total:
                    self._evaluate(loop, log, f"after step {loop.step}")
                if self.config.save_strategy != "no" and (loop.step % self.plan.save_steps == 0 or loop.step == total):
                    self._save(loop)
        except waits.Interrupted:
            tell_stop(self.display, self.output_dir, loop.step)
            raise

    def _evaluate(self, loop: Loop, log: MetricsLog, label: str) -> None:
        if not self.prompts.held_out:
            return
        with self.display.phase(f"held-out prompts, {label}"):
            result: Evaluation = loop.evaluate()
        self.evaluations.append({"label": label, "solved": result.solved, "total": result.total, "record": result.record})
        log.write("eval", result.record)
        self.display.evaluation(label, result.record, result.solved, result.total)

    def _save(self, loop: Loop) -> None:
        """A checkpoint, or a warning when the disk does not take it: older checkpoints stay, and training goes on."""
        path = storage.checkpoint_path(self.output_dir, loop.step)
        older: list[Any] = []
        for version in loop.versions_needed():
            if version != loop.step:
                older.extend(loop.policies.published[version])
        try:
            with storage.new_folder(path) as folder:
                ranks = enumerate(loop.actors.trainers)  # the first one writes the older policies
                saves = [trainer.save.remote(str(folder), *(older if rank == 0 else ())) for rank, trainer in ranks]
                waits.fetch_ranks(saves, "saving a checkpoint", self.config.ray.rollout_timeout_s, loop.rollouts)
                job = identity(self.config, self.prompts)
                state = {"step": loop.step, "evaluations": self.evaluations, "in_flight": loop.state(), "job": job}
                storage.write_json(folder / storage.STATE, state)
            checkpoints.prune(self.output_dir, self.config.save_total_limit)
        except (OSError, ActorError) as error:
            if (sharding.kind(self.config) or "").startswith("zero") and len(loop.actors.trainers) > 1:
                raise  # DeepSpeed saves in step, so the other ranks wait for the one that failed
            loop.rollouts.look()  # raises again where it was an engine that failed
            self.display.warn(f"saving the checkpoint of step {loop.step}: {error}")

    def _restore(self, loop: Loop, path: Path) -> None:
        state = storage.read_state(path)
        older = waits.ask_ranks(
            loop.actors.trainers, "restore", str(path), doing=f"restoring {path}", timeout_s=cluster.START_TIMEOUT_S
        )
        for header, *buckets in older:
            loop.policies.add(header, *map(cluster.keep, buckets))
        loop.resume(state["step"], state["in_flight"])
        self.evaluations = list(state["evaluations"])
        for past in self.evaluations:
            self.display.evaluation(past["label"], past["record"], past["solved"], past["total"])
        self.display.note(f"resumed from {path}")


def identity(config: JobConfig, prompts: PromptSet) -> dict[str, Any]:
    """What a resumed job must have as it was: the adapter's shape, and what decides which policy samples which prompt."""
    return {
        "base_model": config.base_model,
        "adapter": config.adapter,
        "load_in_4bit": config.load_in_4bit,
        "load_in_8bit": config.load_in_8bit,
        "bf16": config.bf16,
        "lora_r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_target_linear": config.lora_target_linear,
        "lora_target_modules": config.lora_target_modules,
        "peft_use_rslora": config.peft_use_rslora,
        "lora_model_dir (digest of its adapter)": starting_adapter.digest(config),
        "seed": config.seed,
        "trl.num_generations": config.trl.num_generations,
        "trl.vllm_sync_interval": config.trl.vllm_sync_interval,
        "ray.max_staleness": config.ray.max_staleness,
        "ray.late_steps": config.ray.late_steps,
        "ray.max_resamples": config.ray.max_resamples,
        "ray_num_workers": config.ray_num_workers,
        "shards": sharding.kind(config),
        "completions a step": completions_per_step(config),
        PROMPTS_DIGEST: prompts.fingerprint,
    }


def _write_inputs(config: JobConfig, prompts: PromptSet, output_dir: Path) -> None:
    write_config(config, output_dir)
    write_quarantine(output_dir, prompts.bad)
