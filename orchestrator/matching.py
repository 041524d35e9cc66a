"""Keys and types of a job file held against the schema: a node of OmegaConf, and what does not fit.

`config.py` calls `match` once for the whole file.
"""

import dataclasses
import difflib
import math
import re
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from orchestrator.axolotl_keys import ACTS_WHEN_FALSE, HINTS, REFUSED, RENAMED, as_here
from orchestrator.schema import JobConfig, RayConfig, TrlConfig, VllmConfig
from orchestrator.source import Problem

SECTIONS: dict[str, type] = {"trl": TrlConfig, "vllm": VllmConfig, "ray": RayConfig}


def match(
    cls: Any, data: dict[Any, Any], prefix: str, problems: list[Problem], notes: list[Problem]
) -> DictConfig:
    """The OmegaConf node of dataclass `cls` filled from `data`.

    What does not fit goes to `problems`, what is dropped to `notes`. `prefix` is the dotted key of the section with its
    trailing dot, "" at the top.
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
                node[name] = match(kinds[0], value, f"{key}.", problems, notes)
            else:
                problems.append(Problem(key, f"is a section, not {value!r}; indent its keys under it"))
        elif dataclasses.is_dataclass(entry):
            if isinstance(value, list) and all(isinstance(item, dict) for item in value):
                node[name] = [
                    match(entry, item, f"{key}[{i}].", problems, notes) for i, item in enumerate(value)
                ]
            else:
                problems.append(Problem(key, "takes a list of entries; begin each with `- path: ...`"))
        elif dataclasses.is_dataclass(named := get_args(kinds[0])[-1] if get_origin(kinds[0]) is dict else None):
            if isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()):
                node[name] = {str(n): match(named, item, f"{key}.{n}.", problems, notes) for n, item in value.items()}
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
    if isinstance(value, float) and int in kinds and float not in kinds and value.is_integer():
        value = int(value)  # OmegaConf would refuse 16.0
    try:
        OmegaConf.update(node, name, _literal(value), merge=False)
    except (OmegaConfBaseException, ValueError):
        return False
    return True


def _foreign(
    key: str, value: Any, hints: dict[str, Any], problems: list[Problem], notes: list[Problem]
) -> None:
    """Judges a key that the schema does not have: a hint, a refused key of Axolotl's, or nobody's."""
    name, known = key.rpartition(".")[2], _table_key(key)
    if value is None:
        if known not in HINTS and known not in REFUSED and known not in RENAMED:
            notes.append(Problem(key, "dropped: it is not known here, and it is empty"))
    elif (hint := HINTS.get(known)) is not None:
        notes.append(Problem(key, hint))
    elif as_here(known, value):
        notes.append(Problem(key, "dropped: it is so in Eagleray without it"))
    elif (new := RENAMED.get(known)) is not None:
        notes.append(Problem(key, f"not used: {new} is written too, and wins over it"))
    elif (remedy := REFUSED.get(known)) is not None:
        off = value in (False, 0, [], {}, "")
        if off and key not in ACTS_WHEN_FALSE:
            notes.append(Problem(key, "dropped: it is off, and Eagleray does not have it"))
        else:
            problems.append(Problem(key, f"eagleray does not support {name}; {remedy}"))
    else:
        nearest = _nearest(key, hints)
        remedy = f"did you mean {nearest}?" if nearest else "it is not known here; correct its name, or remove it"
        problems.append(Problem(key, f"unknown key '{name}'; {remedy}"))


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
