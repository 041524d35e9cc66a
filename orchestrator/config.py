"""From a YAML file and `key=value` overrides to a checked JobConfig, and back.

`load` runs in four steps: read (`source.py`), match keys and types against the schema (here), settle the keys
that have two spellings (here), refuse contradictions (`validate.py`). Whether this version can run the job is
a question for `runnable.py`. Each step reports all its problems at once, as one ConfigError with a line per
problem.
"""

import dataclasses
import difflib
import logging
import math
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.axolotl_keys import ACTS_WHEN_FALSE, HINTS, REFUSED
from orchestrator.schema import JobConfig, RayConfig, TrlConfig, VllmConfig
from orchestrator.source import Problem, read
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
SECTIONS: dict[str, type] = {"trl": TrlConfig, "vllm": VllmConfig, "ray": RayConfig}


def load(path: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Reads a job file; `overrides` are `key=value` with dotted keys, e.g. `trl.beta=0.1`, and win over it.

    Keys that change no result are dropped with a line in the log. Raises ConfigError, naming file, line and
    key, for everything else that cannot be taken at its word.
    """
    data, source = read(path, overrides)
    _respell(data)
    problems: list[Problem] = []
    notes: list[Problem] = []
    node = _match(JobConfig, data, "", problems, notes)
    wrong = {problem.key for problem in problems}
    missing = sorted(OmegaConf.missing_keys(node) - wrong)
    problems += [Problem(key, f"is missing; {REQUIRED[key.rpartition('.')[2]]}") for key in missing]
    source.raise_if_any(problems)
    config = cast(JobConfig, OmegaConf.to_object(node))
    config.source = source
    source.raise_if_any(contradictions(config))
    notes += _settle(config)
    for note in notes:
        log.warning("%s", source.describe(note))
    return config


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


def _respell(data: dict[str, Any]) -> None:
    """Gives values that YAML or Axolotl spell in several ways the one spelling of the schema."""
    trl = data.get("trl")
    if isinstance(trl, dict) and isinstance(trl.get("scale_rewards"), bool):
        trl["scale_rewards"] = (
            "group" if trl["scale_rewards"] else "none"
        )  # TRL's own reading of the old boolean
    if data.get("save_strategy") is False:
        data["save_strategy"] = "no"  # YAML reads a bare `no` as false
    if "bf16" in data and data["bf16"] is None:
        data["bf16"] = False  # as Axolotl: written and empty is off, absent is auto


def _settle(config: JobConfig) -> list[Problem]:
    """Copies each fact that has two keys to the one that the rest of Eagleray reads; returns what to tell."""
    notes = []
    if config.reward_model:
        config.rl = "reward_trainer"
    config.reward_model = config.rl == "reward_trainer"
    if config.flash_attention:
        config.attn_implementation = "flash_attention_2"
    if config.sdp_attention:
        config.attn_implementation = "sdpa"
    if config.fp16 and config.bf16 == "auto":
        config.bf16 = False
    if config.trl.beta is None:
        config.trl.beta = config.rl_beta
    elif config.rl_beta is not None and config.rl_beta != config.trl.beta:
        notes.append(Problem("rl_beta", f"not used: trl.beta ({config.trl.beta:g}) wins over it"))
    if config.trl.beta is None and config.rl == "grpo":
        config.trl.beta = 0.0  # TRL's default for GRPO: no KL term
    return notes


def _match(
    cls: Any, data: dict[Any, Any], prefix: str, problems: list[Problem], notes: list[Problem]
) -> DictConfig:
    """The OmegaConf node of dataclass `cls` filled from `data`; what does not fit goes to `problems`.

    `prefix` is the dotted key of the section with its trailing dot, "" at the top.
    """
    node: DictConfig = OmegaConf.structured(cls)
    hints = _keys(cls)
    for name, value in data.items():
        key = f"{prefix}{name}"
        if name not in hints:
            _foreign(key, value, hints, problems, notes)
            continue
        kinds = (
            get_args(hints[name]) if get_origin(hints[name]) in (Union, types.UnionType) else (hints[name],)
        )
        entry = next((get_args(kind)[0] for kind in kinds if get_origin(kind) is list), None)
        if value is None:
            if type(None) in kinds:
                OmegaConf.update(node, name, None, merge=False)
        elif dataclasses.is_dataclass(kinds[0]):
            if isinstance(value, dict):
                node[name] = _match(kinds[0], value, f"{key}.", problems, notes)
            else:
                problems.append(Problem(key, f"is a section, not {value!r}; indent its keys under it"))
        elif dataclasses.is_dataclass(entry):
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                node[name] = [
                    _match(entry, item, f"{key}[{i}].", problems, notes) for i, item in enumerate(value)
                ]
            else:
                problems.append(Problem(key, "takes a list of entries; begin each with `- path: ...`"))
        elif dataclasses.is_dataclass(named := get_args(kinds[0])[-1] if get_origin(kinds[0]) is dict else None):
            if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
                node[name] = {str(n): _match(named, item, f"{key}.{n}.", problems, notes) for n, item in value.items()}
            else:
                problems.append(Problem(key, "takes a section for each name; indent its keys under the name"))
        elif not _fits(node, name, value, kinds):
            expected = " or ".join(dict.fromkeys(_words(kind) for kind in kinds if kind is not type(None)))
            problems.append(Problem(key, f"takes {expected}, not {value!r}; correct the value"))
    return node


def _fits(node: DictConfig, name: str, value: Any, kinds: tuple[Any, ...]) -> bool:
    """Sets `name` of `node`, converting as OmegaConf does, where it converts without changing the meaning."""
    if isinstance(value, bool) and Any not in kinds and bool not in kinds:
        return False  # OmegaConf would turn true into the text "True"
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and not {int, float, str, Any} & set(kinds)
    ):
        return False  # OmegaConf would turn 5 into true
    if isinstance(value, float) and not math.isfinite(value):
        return False
    try:
        OmegaConf.update(node, name, _literal(value), merge=False)
    except (OmegaConfBaseException, ValueError):
        return False
    return True


def _foreign(
    key: str, value: Any, hints: dict[str, Any], problems: list[Problem], notes: list[Problem]
) -> None:
    """Judges a key that the schema does not have: a hint, a refused key of Axolotl's, or nobody's."""
    if value is None and (_table_key(key) in HINTS or _table_key(key) in REFUSED):
        return  # written and empty asks for nothing
    if (hint := HINTS.get(_table_key(key))) is not None:
        notes.append(Problem(key, hint))
    elif (remedy := REFUSED.get(_table_key(key))) is not None:
        off = value is False or value in ([], {}, "")
        if off and key not in ACTS_WHEN_FALSE:
            notes.append(Problem(key, "dropped: it is off, and Eagleray does not have it"))
        else:
            problems.append(Problem(key, f"eagleray does not support {key.rpartition('.')[2]}; {remedy}"))
    else:
        nearest = _nearest(key, hints)
        remedy = f"did you mean {nearest}?" if nearest else "neither Axolotl nor Eagleray has it; remove it"
        problems.append(Problem(key, f"unknown key '{key.rpartition('.')[2]}'; {remedy}"))


def _nearest(key: str, hints: dict[str, Any]) -> str | None:
    """The key that was probably meant: the same name in another section, or a similar one in this section."""
    prefix, _, name = key.rpartition(".")
    for section, keys in [("", _keys(JobConfig)), *((f"{s}.", _keys(cls)) for s, cls in SECTIONS.items())]:
        if name in keys:
            return f"{section}{name}"
    close = difflib.get_close_matches(name, hints, n=1)
    return ".".join(filter(None, (prefix, close[0]))) if close else None


def _keys(cls: type) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(cls).items() if name != "source"}


def _table_key(key: str) -> str:
    return re.sub(r"^(test_)?datasets\[\d+\]", "datasets[]", key)


def _literal(value: Any) -> Any:
    """Escapes `${`: Axolotl's files have no interpolation, so the text means itself."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_literal(item) for item in value]
    return value


def _words(kind: Any) -> str:
    """A type in words, e.g. list[str] -> a list (text)."""
    if get_origin(kind) is list:
        return f"a list ({_words(get_args(kind)[0]).removeprefix('a ')})"
    if get_origin(kind) is dict:
        return f"a mapping of names to {_words(get_args(kind)[1])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a value")
