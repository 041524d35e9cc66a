"""The space of a sweep: which keys of a job it varies, and which values each may have.

    {"learning_rate": {"loguniform": [1e-6, 1e-4]},
     "lora_r": {"choice": [8, 16]},
     "trl.beta": [0, 0.04],
     "_": [{"micro_batch_size": 1, "sequence_len": 4096}, {"micro_batch_size": 2, "sequence_len": 2048}]}

A list is a grid; a key that begins with `_` is a grid of mappings, whose keys go together, as in Axolotl's sweep files. From
Python a value may also be one of ray.tune's domains. A new kind of domain is a line in KINDS, and
in RANGES where it has ends.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Domain, Float, Function, Integer, LogUniform, Quantized

GRID = "grid_search"  # Tune's word
TOGETHER = "_"  # what a key begins with that stands for several

KINDS: dict[str, Callable[[Any], Any]] = {
    "grid": tune.grid_search,
    "choice": tune.choice,
    "uniform": lambda ends: tune.uniform(*ends),
    "loguniform": lambda ends: tune.loguniform(*ends),
    "randint": lambda ends: tune.randint(*ends),  # the upper end is never drawn
}
RANGES = ("uniform", "loguniform", "randint")
WRITTEN = "write a list of values, or one of {" + "}, {".join(f"{k}: [...]" for k in KINDS) + "}"


@dataclass(frozen=True)
class Space:
    """Keys and what they may be: domains of ray.tune, or its grids."""

    domains: Mapping[str, Any]

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the job, those that go together one by one."""
        return tuple(dict.fromkeys(key for _, params in self.samples() for key in params))

    def samples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each value of a grid or a choice, and the ends of each range: the space's key, and what it makes of a job's."""
        for key, domain in self.domains.items():
            for value in _samples(domain):
                yield key, expanded({key: value})

    def texts(self) -> dict[str, str]:
        """What each key may be, for a person; equal for equal spaces."""
        return {key: _text(domain) for key, domain in self.domains.items()}

    def trials(self, num_samples: int) -> int:
        """How many there are: each combination of the grids, so often."""
        return num_samples * math.prod(len(domain[GRID]) for domain in self.domains.values() if _is_grid(domain))

    def mutations(self) -> dict[str, Any]:
        """What population based training may change: all but grids. Of a choice it takes a neighbour."""
        drawn = {key: domain for key, domain in self.domains.items() if not _is_grid(domain)}
        return {key: list(domain.categories) if isinstance(domain, Categorical) else domain for key, domain in drawn.items()}

    def clipped(self, params: dict[str, Any]) -> dict[str, Any]:
        """Parameters that were changed, back in their ranges."""
        for key, domain in self.domains.items():
            if isinstance(domain, Float | Integer):
                low, high = _ends(domain)
                params[key] = min(max(params[key], low), high)
        return params


def read_space(written: Mapping[str, Any]) -> tuple[Space, list[tuple[str, str]]]:
    """The space, and what is wrong with it: a key of it and a sentence each."""
    domains: dict[str, Any] = {}
    problems = []
    owners: dict[str, str] = {}  # of the job's keys
    for key, value in written.items():
        try:
            domain = _domain(str(key), value)
        except ValueError as error:
            problems.append((str(key), str(error)))
            continue
        domains[str(key)] = domain
        names = dict.fromkeys(name for sample in _samples(domain) for name in expanded({str(key): sample}))
        if twice := [name for name in names if name in owners]:
            problems.append((str(key), f"varies {twice[0]}, and so does {owners[twice[0]]}; leave it out of one of them"))
        owners |= dict.fromkeys(names, str(key))
    return Space(domains), problems


def expanded(params: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the space's keys as values of a job's."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        found.update(value if key.startswith(TOGETHER) else {key: value.item() if hasattr(value, "item") else value})
    return found


def _domain(key: str, value: Any) -> Any:
    """Raises ValueError with a sentence that follows the key."""
    if isinstance(value, Function):
        raise ValueError("is a function, whose values nobody can check; use another of ray.tune's domains")
    if isinstance(value, Mapping) and list(value) == [GRID]:
        value = value[GRID]
    if isinstance(value, list | tuple):
        value = {"grid": list(value)}
    if isinstance(value, Domain):
        domain = value
    elif isinstance(value, Mapping) and len(value) == 1 and (kind := next(iter(value))) in KINDS:
        domain = _made(kind, value[kind])
    else:
        raise ValueError(f"takes no {value!r}; {WRITTEN}")
    if isinstance(domain, Float) and not all(map(math.isfinite, _ends(domain))):
        raise ValueError("has no ends, so nobody can check its values; use uniform or loguniform")
    values = list(_samples(domain))
    if key.startswith(TOGETHER) and not (_is_grid(domain) and all(isinstance(v, Mapping) and v for v in values)):
        raise ValueError("takes a list of mappings: keys of the job that go together")
    if not values:
        raise ValueError("has no values; write at least one, or remove the key")
    try:
        json.dumps(values)
    except TypeError as error:
        raise ValueError(f"has a value that no YAML file can hold ({error})") from error
    return domain


def _made(kind: str, values: Any) -> Any:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{kind} takes a list, not {values!r}")
    if kind in RANGES:
        number = int if kind == "randint" else int | float
        if len(values) != 2 or not all(isinstance(end, number) and not isinstance(end, bool) for end in values):
            words = "whole numbers" if kind == "randint" else "numbers"
            raise ValueError(f"{kind} takes two {words}, [lowest, highest], not {values!r}")
        low, high = values
        if not low < high or (kind == "loguniform" and low <= 0):
            raise ValueError(f"{kind} takes {'two positive ' if kind == 'loguniform' else ''}numbers, the lower one first")
    return KINDS[kind](list(values))


def _is_grid(domain: Any) -> bool:
    return isinstance(domain, Mapping) and GRID in domain


def _samples(domain: Any) -> list[Any]:
    if _is_grid(domain):
        return list(domain[GRID])
    return list(domain.categories) if isinstance(domain, Categorical) else list(_ends(domain))


def _ends(domain: Any) -> tuple[Any, Any]:
    """The lowest and the highest value that can be drawn."""
    open_above = isinstance(domain, Integer) and not isinstance(domain.get_sampler(), Quantized)
    return domain.lower, domain.upper - 1 if open_above else domain.upper


def _text(domain: Any) -> str:
    if _is_grid(domain):
        return f"grid {json.dumps(domain[GRID])}"
    if isinstance(domain, Categorical):
        return f"choice {json.dumps(list(domain.categories))}"
    sampler, step = domain.get_sampler(), ""
    if isinstance(sampler, Quantized):
        sampler, step = sampler.get_sampler(), f" by {sampler.q}"
    kind = "loguniform" if isinstance(sampler, LogUniform) else "randint" if isinstance(domain, Integer) else "uniform"
    whole = "lograndint" if kind == "loguniform" and isinstance(domain, Integer) else kind
    return f"{whole} {json.dumps([domain.lower, domain.upper])}{step}"
