"""What scores the completions: the entries of trl.reward_funcs as functions, reward models and judges, for their actors."""

import dataclasses

from actors.reward_model import ensure_reward_model
from actors.specs import ModelSpec, RewardModelSpec, RewardSpec, SandboxSpec
from orchestrator import judges
from orchestrator.jobs import local_folder
from orchestrator.online_keys import FUNCTION
from orchestrator.plan import Plan
from orchestrator.schema import JobConfig
from orchestrator.scoring import Spec
from orchestrator.source import Problem


def reward_models(config: JobConfig) -> list[str]:
    """The entries that are models, with a slash or the name of a folder; all others are functions or judges.

    Raises ConfigError for one that can be neither.
    """
    names = config.trl.reward_funcs or []
    models = [name for name in names if "/" in name or local_folder(config, name)]
    text = "is no folder, and no function's name; name functions as module.fn, reward models by folder or hub name"
    unknown = [name for name in names if name not in models and not FUNCTION.fullmatch(name)]
    config.source.raise_if_any(Problem("trl.reward_funcs", f"{name} {text}") for name in unknown)
    return models


def reward_specs(config: JobConfig, plan: Plan) -> list[Spec]:
    """What the actors are built from, in the order of trl.reward_funcs."""
    return [_spec(config, plan, name) for name in config.trl.reward_funcs or []]


def _spec(config: JobConfig, plan: Plan, name: str) -> Spec:
    if name in plan.reward_models:
        return _model_spec(config, plan, name)
    if judge := judges.judge_of(config, name):
        return judges.judge_spec(config, name, judge)
    return RewardSpec(name, tuple(config.source.folders), SandboxSpec(**dataclasses.asdict(config.ray.sandbox)))


def ensure_rewards(config: JobConfig, plan: Plan, *, conversational: bool) -> None:
    """Raises ConfigError for a reward model that is not there or is none, and for a judge's key that is not set.

    Fetches reward models of the hub.
    """
    config.source.raise_if_any(judges.missing_keys(config))
    for name in plan.reward_models:
        ensure_reward_model(_model_spec(config, plan, name), conversational=conversational)


def _model_spec(config: JobConfig, plan: Plan, name: str) -> RewardModelSpec:
    return RewardModelSpec(
        path=name,
        model=ModelSpec(str(local_folder(config, name) or name), plan.dtype, config.trust_remote_code),
        chat_template_kwargs=config.trl.chat_template_kwargs or {},
        threads=plan.reward_threads,
    )
