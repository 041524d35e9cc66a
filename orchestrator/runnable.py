"""Whether this version can run a job: for each kind of job, what it does with every key of the schema.

Four literal tables a kind, in `online_keys.py` for rl: grpo and in `dataset_keys.py` for the other methods. A key is in
ACTS_ON, where LIMITS may exclude some of its values; or in IDLE, where it changes no result and gets a line in the log;
or in NOT_YET, where any value that asks for something stops the job. A test holds that each key is in one of them.
"""

import dataclasses
import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from orchestrator import dataset_keys, online_keys, sharding
from orchestrator.axolotl_keys import as_here
from orchestrator.schema import JobConfig, RayConfig, TrlConfig, VllmConfig
from orchestrator.source import Problem
from orchestrator.values import value_of

log = logging.getLogger("eagleray")

METHODS: dict[str | None, ModuleType] = {
    "grpo": online_keys,
    None: dataset_keys,
    **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "reward_trainer"), dataset_keys),
}


def ensure_runnable(config: JobConfig) -> None:
    """Raises one ConfigError, a line per key, if this version cannot run the job; logs idle keys.

    `load` accepts every job of the dialect; this is asked before anything is planned or started.
    """
    config.source.raise_if_any(refusals(config))
    for note in remarks(config):
        log.warning("%s", config.source.describe(note))


def refusals(config: JobConfig) -> list[Problem]:
    """What of a job this version cannot do."""
    if config.rl not in METHODS:
        runs = ", ".join(name for name in METHODS if name)
        text = f"{config.rl} is not implemented yet: this version of Eagleray runs {runs}, and SFT without rl"
        return [Problem("rl", text)]
    return [*not_runnable(config), *sharding.problems(config)]


def remarks(config: JobConfig) -> list[Problem]:
    """Which written keys of a job that can run change nothing in it, or are taken in another way than they are written."""
    tables = METHODS[config.rl]
    idle = [Problem(key, text) for key, text in tables.IDLE.items() if value_of(config, key) != default_of(key)]
    return [*idle, *tables.notes(config), *sharding.notes(config)]


def keys() -> list[str]:
    """All dotted keys of the schema outside dataset entries, e.g. base_model, trl.beta."""
    sections = {"trl": TrlConfig, "vllm": VllmConfig, "ray": RayConfig}
    top = [f.name for f in dataclasses.fields(JobConfig) if f.name not in {"source", *sections}]
    return top + [f"{name}.{f.name}" for name, cls in sections.items() for f in dataclasses.fields(cls)]


def default_of(key: str) -> Any:
    """The default of a dotted key."""
    return value_of(JobConfig(), key)


def not_runnable(config: JobConfig) -> Iterator[Problem]:
    """What this version does not do of a job whose method it has, sharding aside."""
    tables = METHODS[config.rl]
    for key, excluded, text in tables.LIMITS:
        value = value_of(config, key)
        if excluded(value):
            yield Problem(key, f"{value} {text}" if text.startswith(("is ", "cannot ")) else text)
    for key, text in tables.NOT_YET.items():
        value = value_of(config, key)
        if value not in (default_of(key), [], {}, "") and not as_here(key, value):
            yield Problem(key, text)
    for name, entries in (("datasets", config.datasets), ("test_datasets", config.test_datasets)):
        for index, entry in enumerate(entries or []):
            yield from tables.entry_problems(f"{name}[{index}]", entry, config.rl)
