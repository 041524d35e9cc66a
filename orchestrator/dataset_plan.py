"""The plan of a dataset job: its workers, where they fit, and how batches are cut. Pure, as plan.py is for rl: grpo."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from orchestrator import sharding
from orchestrator.description import adapter_lines
from orchestrator.jobs import attention
from orchestrator.plan import (
    Bundle,
    Node,
    amount,
    first_fit,
    hosts,
    shortages,
    trainer_dtype,
    trainer_resources,
)
from orchestrator.schema import JobConfig

METHOD_NAMES = {
    None: "SFT",
    "dpo": "DPO",
    "ipo": "IPO",
    "kto": "KTO",
    "orpo": "ORPO",
    "reward_trainer": "reward model",
    "grpo": "GRPO",  # whose plan is in plan.py
}


@dataclass(frozen=True)
class DatasetPlan:
    """A resolved dataset job. What hangs on the number of rows is known once they are prepared."""

    bundles: tuple[Bundle, ...]  # one a worker, as many as there may be
    min_workers: int  # with which the job starts, and goes on when others are lost
    nodes: tuple[Node, ...]
    placement: tuple[int | None, ...]  # per bundle, the node that can hold it; None = none can
    gpu: bool
    dtype: str
    attention: str | None  # of transformers; None = its default
    threads: int | None  # CPU threads of a worker; None with GPUs
    readers: int  # tasks of Ray Data that read and encode rows while they are trained on
    rows_per_step: int
    strategy: str = "PACK"  # Ray Train's, of Ray's placement group

    @property
    def problems(self) -> list[str]:
        """For each bundle that the job cannot do without and no node can hold: what it needs, and what would fit."""
        if sum(place is not None for place in self.placement) >= self.min_workers:
            return []
        return shortages(self.bundles[: self.min_workers], self.nodes, self.placement[: self.min_workers])

    def steps_per_epoch(self, rows: int) -> int:
        """Optimizer steps over all rows once, as transformers counts them: the last one may be smaller."""
        return max(1, ceil(rows / self.rows_per_step))

    def total_steps(self, config: JobConfig, rows: int) -> int:
        return config.max_steps or ceil(config.num_epochs * self.steps_per_epoch(rows))


def make_dataset_plan(config: JobConfig, nodes: Sequence[Node], cpu_dtype: str = "float32") -> DatasetPlan:
    """Resolves a job of any method but grpo. cpu_dtype: what bf16: auto means on nodes without a GPU."""
    asked = config.ray_num_workers
    fewest, workers = (asked, asked) if isinstance(asked, int) else asked
    has_gpus = any(node.resources.get("GPU", 0) > 0 for node in nodes)
    resources = trainer_resources(config, has_gpus)
    gpu = "GPU" in resources
    bundles = tuple(Bundle("worker", index, resources) for index in range(workers))
    cpus = int(max((node.resources.get("CPU", 1) for node in nodes), default=1))
    return DatasetPlan(
        bundles=bundles,
        min_workers=fewest,
        nodes=tuple(nodes),
        placement=first_fit(bundles, nodes),
        gpu=gpu,
        dtype=trainer_dtype(config, gpu, cpu_dtype),
        attention=attention(config, gpu),
        threads=None if gpu else max(1, cpus // ceil(workers / hosts(nodes))),
        readers=max(1, int(sum(node.resources.get("CPU", 0) for node in nodes)) // 2),
        rows_per_step=config.micro_batch_size * config.gradient_accumulation_steps * workers,
    )


def describe(config: JobConfig, plan: DatasetPlan) -> list[str]:
    """The plan for a person, a line each."""
    held = [
        f"{bundle}: {amount(bundle.resources)} on {plan.nodes[node].name if node is not None else 'no node'}"
        for bundle, node in zip(plan.bundles, plan.placement, strict=True)
    ]
    most = len(plan.bundles)
    workers = f"{most}" if plan.min_workers == most else f"{plan.min_workers} to {most}, as many as there is room for,"
    length = f"{config.max_steps} steps" if config.max_steps else f"{config.num_epochs:g} epochs"
    return [
        f"method      {METHOD_NAMES[config.rl]}",
        f"model       {config.base_model}, {plan.dtype}, {plan.attention or 'default'} attention",
        *adapter_lines(config, plan.dtype),
        f"cluster     {len(plan.nodes)} node(s): " + "; ".join(f"{n.name} {amount(n.resources)}" for n in plan.nodes),
        f"workers     {workers} of Ray Train",
        *(f"            {line}" for line in held),
        f"sharding    {sharding.described(config)}",
        f"batch       {config.micro_batch_size} micro_batch_size x {config.gradient_accumulation_steps} "
        f"gradient_accumulation_steps x {len(plan.bundles)} ray_num_workers = {plan.rows_per_step} rows a step",
        f"rows        up to sequence_len {config.sequence_len} tokens{', packed' if packs(config) else ''}",
        f"length      {length}",
    ]


def packs(config: JobConfig) -> bool:
    """Whether several documents share a row."""
    return config.rl is None and config.sample_packing
