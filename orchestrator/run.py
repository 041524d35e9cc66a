"""Which shape a job has, and so who runs it: online (rl: grpo), or on a dataset (every other method)."""

from orchestrator import dataset_job, dataset_plan, online_job, plan, wandb_run
from orchestrator.display import Display
from orchestrator.jobs import RunResult, with_absolute_paths
from orchestrator.plan import Node
from orchestrator.runnable import ensure_runnable
from orchestrator.schema import JobConfig
from orchestrator.starting_adapter import adopted


def run(config: JobConfig, display: Display) -> RunResult:
    """Runs a job to its end.

    Raises EaglerayError for anything a person can act on, cluster.Interrupted on Ctrl-C or SIGTERM.
    """
    ensure_runnable(config)
    wandb_run.ensure_login(config)
    config = adopted(with_absolute_paths(config))
    return online_job.run(config, display) if config.rl == "grpo" else dataset_job.run(config, display)


def plan_lines(config: JobConfig, nodes: list[Node]) -> tuple[list[str], list[str]]:
    """The plan of a job on these nodes for a person, and what does not fit. Starts nothing."""
    ensure_runnable(config)
    config = adopted(with_absolute_paths(config))
    if config.rl == "grpo":
        online, _ = online_job.plan_job(config, nodes)
        return plan.describe(config, online), online.problems
    dataset = dataset_job.plan_job(config, nodes)
    return dataset_plan.describe(config, dataset), dataset.problems
