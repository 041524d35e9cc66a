"""From a YAML file and `key=value` overrides to a checked JobConfig, and back.

`load` runs in five steps: read (`source.py`), bring to one spelling (`spelling.py`), match keys and types against the
schema (`matching.py`), refuse contradictions (`validate.py`), settle the keys that say the same thing (`spelling.py`).
Whether this version can run the job is a question for `runnable.py`. What does not match is reported before what
contradicts, each as one ConfigError with a line per problem.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from orchestrator.matching import match
from orchestrator.schema import JobConfig
from orchestrator.source import Problem, Translation, ancestors, read, value_at
from orchestrator.spelling import respell, settle
from orchestrator.validate import contradictions

log = logging.getLogger("eagleray")

REQUIRED = {
    "base_model": "name the model to train, a folder or a name on the hub",
    "learning_rate": "add it, for example learning_rate: 1e-5",
    "path": "give a file, a folder or a name on the hub",
    "url": "give the server's address, for example http://127.0.0.1:8000/v1",
    "model": "name a model that the server has",
    "prompt": "say what the judge is to do, with {completion} and {prompt} in their places",
}


@dataclass(frozen=True)
class Reading:
    """A job file read to its end, whatever is wrong with it."""

    config: JobConfig  # a key that cannot be taken at its word has its default here
    written: dict[str, Any]  # what the file has, in its order, by key: those of sections and list entries one by one
    misread: tuple[Problem, ...]  # unknown keys, wrong types, missing keys
    contradictions: tuple[Problem, ...]  # what the others say that cannot mean a job
    notes: tuple[Problem, ...]  # what has no effect, or is a Translation


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads a job file; `overrides` are `key=value` with dotted keys, e.g. `trl.beta=0.1`, and win over it.

    Keys that change no result are dropped with a line in the log. Raises ConfigError, naming file, line and
    key, for everything else that cannot be taken at its word.
    """
    reading = interpret(path, overrides)
    source = reading.config.source
    source.raise_if_any(reading.misread)
    source.raise_if_any(reading.contradictions)
    for note in reading.notes:
        if not isinstance(note, Translation):
            log.warning("%s", source.describe(note))
    return reading.config


def interpret(path: str | Path, overrides: Sequence[str] = ()) -> Reading:
    """What a job file means, and all there is to say of it at once.

    Raises ConfigError only where there is nothing to read: no file, no YAML, no mapping, a key written twice.
    """
    data, source = read(path, overrides)
    written = {key: value_at(data, key) for key in source.written()}
    notes: list[Problem] = [*respell(data, source)]
    misread: list[Problem] = []
    node = match(JobConfig, data, "", misread, notes)
    missing = OmegaConf.missing_keys(node)
    wrong = {problem.key for problem in misread}
    misread += [Problem(key, f"is missing; {REQUIRED[key.rpartition('.')[2]]}") for key in sorted(missing - wrong)]
    for key in missing:
        OmegaConf.update(node, key, 1.0 if key == "learning_rate" else "missing")  # for the rules that look at other keys
    config = cast(JobConfig, OmegaConf.to_object(node))
    config.source = source
    wrong |= missing
    found = [problem for problem in contradictions(config) if wrong.isdisjoint(ancestors(problem.key))]
    notes += settle(config)
    return Reading(config, written, tuple(misread), tuple(found), tuple(notes))


def overrides_of(values: Mapping[str, Any]) -> list[str]:
    """Values by dotted key as `load` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def dump(config: JobConfig) -> str:
    """The whole configuration as YAML, defaults included, without `source`; `load` reads it back equal."""
    data = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name != "source"}
    plain = {key: _plain(value) for key, value in data.items()}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value
