"""`eagleray plan --check`: the plan's numbers beside what its actors really need, measured on the cluster.

Each kind of actor has its turn: all ranks of the trainer, or workers, for two steps of the longest rows, then one engine. No
job is started, and nothing is written to output_dir.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from actors.dataset_loop import Reports
from actors.measuring import MeasuredEngine, MeasuredTrainer, MeasuredWorker
from actors.specs import DatasetTrainSpec, RankSpec, TrainerSpec
from orchestrator import cluster, dataset_job, waits
from orchestrator.activations import PackedRows
from orchestrator.dataset_plan import DatasetPlan
from orchestrator.environment import actor_environment, worker_environment
from orchestrator.memory import Memory, longest_rows, trainer_memory
from orchestrator.online_specs import engine_spec, trainer_spec
from orchestrator.plan import BOTH, ENGINE, TRAINER, ranks
from orchestrator.planning import Changes, Planned, with_changes
from orchestrator.prepared import Prepared, Split
from orchestrator.schema import JobConfig

TOLERANCE = 0.15
MEASURING_S = 3600
# Of a dataset job: steps, and nothing beside them.
STEPS_ALONE: Changes = {
    **dict.fromkeys(("save_steps", "saves_per_epoch", "eval_steps", "evals_per_epoch", "early_stopping_patience")),
    "test_datasets": None,
    "save_strategy": "no",
    "val_set_size": 0.0,
    "streaming": False,
}


@dataclass(frozen=True)
class Measured:
    """One actor."""

    actor: str  # such as trainer 0
    planned: Memory
    measured: int  # bytes

    @property
    def off(self) -> float:
        """By how much the plan is above (or, negative, below) what was measured, as a share of that."""
        return self.planned.tensors / self.measured - 1

    @property
    def agrees(self) -> bool:
        return abs(self.off) <= TOLERANCE


def check(job: Planned, note: Callable[[str], Any]) -> Iterator[Measured]:
    """Measures the actors of a job that was planned on the connected cluster. note: told what is done, and what is not.

    Raises EaglerayError for what an actor meets, such as a GPU that is too small after all.
    """
    plan = job.plan
    with cluster.placed(plan) as group:
        who = f"{len(plan.bundles)} worker(s)" if isinstance(plan, DatasetPlan) else "the trainer"
        note(f"measuring two steps of {who} ...")
        yield from _ranks(job, group)
        if isinstance(plan, DatasetPlan) or job.fit.engine is None:
            return
        if plan.tensor_parallel > 1:
            note("engines are not measured: their GPUs belong to processes of vLLM's own")
            return
        note("measuring an engine ...")
        environment = actor_environment(ENGINE, plan, job.config.ray.kv_cache_gib)
        index = next(i for i, bundle in enumerate(plan.bundles) if bundle.role in (ENGINE, BOTH))
        actor = cluster.start_measuring(plan, group, index, environment, MeasuredEngine, engine_spec(job.config, plan))
        yield Measured("engine 0", job.fit.engine.awake, waits.fetch(actor.peak.remote(), "engine 0, measuring", MEASURING_S))


def _ranks(job: Planned, group: Any) -> Iterator[Measured]:
    config, plan = job.config, job.plan
    role = "worker" if isinstance(plan, DatasetPlan) else TRAINER
    indices = [i for i, bundle in enumerate(plan.bundles) if bundle.role in (role, BOTH)]
    memory = trainer_memory(config, plan.dtype, len(indices), gpu=plan.gpu)
    address = cluster.meeting_place(plan, group)
    if isinstance(plan, DatasetPlan):
        cls: type = MeasuredWorker
        spec: DatasetTrainSpec | TrainerSpec
        environment, spec = worker_environment(plan.threads), worker_spec(config, plan)
        more: tuple[Any, ...] = (cluster.start_free(Reports, "reports"),)
        rows: tuple[int, ...] = (config.micro_batch_size * config.gradient_accumulation_steps, config.sequence_len)
    else:
        cls, environment, spec = MeasuredTrainer, actor_environment(TRAINER, plan, None), trainer_spec(config, plan)
        more, longest = (), longest_rows(config, gpu=plan.gpu)
        assert isinstance(longest, PackedRows)
        rows = (max(1, plan.prompts_per_step // ranks(config)), longest.prompt, config.trl.num_generations, longest.length)
    actors = [
        cluster.start_measuring(plan, group, index, environment, cls, spec, RankSpec(rank, len(indices), address), *more)
        for rank, index in enumerate(indices)
    ]
    refs = [actor.peak.remote(*rows) for actor in actors]
    for rank, ref in enumerate(refs):
        yield Measured(f"{role} {rank}", memory, waits.fetch(ref, f"{role} {rank}, measuring", MEASURING_S))
    for actor in actors:
        cluster.stop(actor)


def worker_spec(config: JobConfig, plan: DatasetPlan) -> DatasetTrainSpec:
    """Of a worker that is measured: it makes its own rows, and neither saves nor evaluates."""
    rows = plan.rows_per_step
    prepared = Prepared(Split(rows=rows), Split(), rows, bad_rows=0, long_rows=0, bad=())
    return dataset_job.train_spec(with_changes(config, STEPS_ALONE), plan, prepared, None)
