"""Reads a job file so that every later message can say where a key was written.

YAML becomes plain Python data plus a map from dotted keys (`trl.beta`, `datasets[0].path`) to lines; command
line overrides are laid over the data and remembered by the same dotted keys. What the keys mean is not known
here.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from actors.errors import ConfigError

# A key at the top, or of a section or an entry of a dataset list: trl.beta, datasets[0].path
KEY = re.compile(r"((trl|vllm|ray|(test_)?datasets\[\d+\])\.)?[^.\[\]]+")


@dataclass(frozen=True)
class Problem:
    """One thing to tell the person who wrote the file."""

    key: str  # dotted, e.g. trl.beta or datasets[0].path; "" for the file as a whole
    text: str  # what is wrong (or was done) and the remedy; follows the key in a sentence


@dataclass(frozen=True)
class Translation(Problem):
    """What a key was read as, where that is not what is written and means the same."""


@dataclass(frozen=True)
class Source:
    """Where the keys of a configuration were written."""

    path: str = "<config>"  # file, as the user named it
    lines: dict[str, int] = field(default_factory=dict)  # dotted key -> line, counted from 1
    overrides: dict[str, str] = field(default_factory=dict)  # dotted key -> the override as typed
    elsewhere: tuple[str, ...] = ()  # folders in place of the usual ones: of the run that the file was left by

    @property
    def folders(self) -> list[str]:
        """Where files and functions that it names are looked for: the current folder, then the file's own."""
        usual = (str(folder) for folder in (Path.cwd(), Path(self.path).resolve().parent))
        return list(dict.fromkeys(self.elsewhere or usual))

    def written(self) -> tuple[str, ...]:
        """The keys as they stand in the file, those of sections and list entries one by one; then those of overrides."""
        keys = [key for key in dict.fromkeys([*self.lines, *self.overrides]) if KEY.fullmatch(key)]
        opened = {key.partition("[")[0].partition(".")[0] for key in keys if "." in key}
        return tuple(key for key in keys if key not in opened)

    def describe(self, problem: Problem) -> str:
        """`file:line: key: text`; the override instead of the line, no line if the key was not written."""
        key = problem.key
        for written in ancestors(key):
            if written in self.overrides:
                return f"{self.path}, override '{self.overrides[written]}': {key}: {problem.text}"
            if written in self.lines:
                return f"{self.path}:{self.lines[written]}: {key}: {problem.text}"
        return f"{self.path}: {key}: {problem.text}" if key else f"{self.path}: {problem.text}"

    def raise_if_any(self, problems: Iterable[Problem]) -> None:
        """Raises one ConfigError with a line per problem, if there are problems."""
        if lines := [self.describe(problem) for problem in problems]:
            raise ConfigError("\n".join(lines))


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no annotations
    """SafeLoader that reads 2e-4 as a number: YAML 1.1, which PyYAML follows, asks for 2.0e-4."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Source]:
    """The data of a YAML file with `key=value` overrides laid over it, and where each key stands.

    Raises ConfigError for a file that is missing, is not YAML or no mapping, for a key written twice, and for
    an override that cannot be applied.
    """
    source = Source(str(path))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        reason = error.strerror or "cannot be read"
        raise ConfigError(
            f"{path}: cannot read the job file ({reason}); give the path of a YAML file"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text, so no YAML; give the path of a YAML file") from error
    data = _parse(text, source)
    for override in overrides:
        _apply(data, override, source)
    return data, source


def _parse(text: str, source: Source) -> dict[str, Any]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{source.path}: holds no mapping of keys; write `key: value` lines")
        source.raise_if_any(_record_lines(node, "", source.lines, ()))
        data: dict[str, Any] = loader.construct_document(node)
        return data
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{source.path}{line}: is not valid YAML: {error.problem}; correct the line"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source.path}: is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def _record_lines(
    node: yaml.Node, prefix: str, lines: dict[str, int], above: tuple[yaml.Node, ...]
) -> list[Problem]:
    """Fills `lines` with the keys under `node`; returns the keys that a mapping holds twice."""
    if node in above:
        return [Problem(prefix, "refers to itself through a YAML alias; write the value out")]
    above = (*above, node)
    problems: list[Problem] = []
    own: dict[str, int] = {}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            lines.setdefault(f"{prefix}[{index}]", item.start_mark.line + 1)
            problems += _record_lines(item, f"{prefix}[{index}]", lines, above)
    elif isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *anchor`: own keys win, so they may repeat
                parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for part in parts:
                    problems += _record_lines(part, prefix, lines, above)
                continue
            key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
            line = key_node.start_mark.line + 1
            if key in own:
                problems.append(Problem(key, f"is written twice, at lines {own[key]} and {line}; keep one"))
            own[key] = lines[key] = line
            problems += _record_lines(value_node, key, lines, above)
    return problems


def _apply(data: dict[str, Any], override: str, source: Source) -> None:
    """Sets the value of one `a.b[0].c=value` in `data`, making the sections on its way."""
    key, equals, text = override.partition("=")
    steps = _steps(key)
    if not equals or not steps or not isinstance(steps[0], str):
        raise ConfigError(f"override '{override}': is not key=value; write for example trl.beta=0.1")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{override}': '{text}' is not a YAML value; quote it") from error
    place: Any = data
    for depth, step in enumerate(steps):
        so_far = _dotted(steps[: depth + 1])
        fits = (
            isinstance(place, list) and step < len(place)
            if isinstance(step, int)
            else isinstance(place, dict)
        )
        if not fits:
            raise ConfigError(f"override '{override}': {source.path} has no {so_far} to set; correct the key")
        if depth == len(steps) - 1:
            place[step] = value
        elif isinstance(step, str) and place.get(step) is None:
            place[step] = {}
        place = place[step]
    key = _dotted(steps)
    for replaced in [old for old in source.lines if key in ancestors(old)]:
        del source.lines[replaced]
    source.overrides[key] = override


def value_at(data: dict[str, Any], key: str) -> Any:
    """The value under a dotted key, e.g. datasets[0].path; None where there is none."""
    place: Any = data
    for step in _steps(key):
        try:
            place = place[step]
        except (LookupError, TypeError):
            return None
    return place


def _steps(key: str) -> list[str | int]:
    return [int(i) if i else name for name, i in re.findall(r"([^.\[\]]+)|\[(\d+)\]", key)]


def _dotted(steps: Sequence[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")


def ancestors(key: str) -> Iterator[str]:
    """trl.reward_funcs[0] -> trl.reward_funcs[0], trl.reward_funcs, trl"""
    while key:
        yield key
        key = key[: max(key.rfind("."), key.rfind("["), 0)]
