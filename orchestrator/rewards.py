"""What scores the completions: the entries of trl.reward_funcs as functions and reward models, and what actors need of them."""

from actors.reward_model import ensure_reward_model
from actors.specs import ModelSpec, RewardModelSpec, RewardSpec
from orchestrator.jobs import local_folder
from orchestrator.online_keys import FUNCTION
from orchestrator.plan import Plan
from orchestrator.schema import JobConfig
from orchestrator.source import Problem


def reward_models(config: JobConfig) -> list[str]:
    """The entries that are models, with a slash or the name of a folder; all others are functions.

    Raises ConfigError for one that can be neither.
    """
    names = config.trl.reward_funcs or []
    models = [name for name in names if "/" in name or local_folder(config, name)]
    text = "is no folder, and no function's name; name functions as module.fn, reward models by folder or hub name"
    unknown = [name for name in names if name not in models and not FUNCTION.fullmatch(name)]
    config.source.raise_if_any(Problem("trl.reward_funcs", f"{name} {text}") for name in unknown)
    return models


def reward_specs(config: JobConfig, plan: Plan) -> list[RewardSpec | RewardModelSpec]:
    """What the actors are built from, in the order of trl.reward_funcs."""
    paths = tuple(config.source.folders)
    return [
        _model_spec(config, plan, name) if name in plan.reward_models else RewardSpec(name, paths)
        for name in config.trl.reward_funcs or []
    ]


def ensure_reward_models(config: JobConfig, plan: Plan, *, conversational: bool) -> None:
    """Raises ConfigError for a reward model that is not there or is none; fetches those of the hub."""
    for name in plan.reward_models:
        ensure_reward_model(_model_spec(config, plan, name), conversational=conversational)


def _model_spec(config: JobConfig, plan: Plan, name: str) -> RewardModelSpec:
    return RewardModelSpec(
        path=name,
        model=ModelSpec(str(local_folder(config, name) or name), plan.dtype, config.trust_remote_code),
        chat_template_kwargs=config.trl.chat_template_kwargs or {},
        threads=plan.reward_threads,
    )
