"""Which shape a job has, and so who runs it: online (rl: grpo), or on a dataset (every other method)."""

from orchestrator import dataset_job, online_job, wandb_run
from orchestrator.display import Display
from orchestrator.jobs import RunResult, with_absolute_paths
from orchestrator.runnable import ensure_runnable
from orchestrator.schema import JobConfig
from orchestrator.shared_engines import SharedEngines
from orchestrator.starting_adapter import adopted


def run(config: JobConfig, display: Display, shared: SharedEngines | None = None) -> RunResult:
    """Runs a job to its end. shared: engines that are there already, for a job of rl: grpo; None = it has its own.

    Raises EaglerayError for anything a person can act on, waits.Interrupted on Ctrl-C or SIGTERM.
    """
    ensure_runnable(config)
    wandb_run.ensure_login(config)
    config = adopted(with_absolute_paths(config))
    return online_job.run(config, display, shared) if config.rl == "grpo" else dataset_job.run(config, display)
