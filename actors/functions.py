"""Functions that a person names in the job file, as `module.function`."""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.errors import ConfigError


def load_function(key: str, path: str, search_paths: Sequence[str]) -> Callable[..., Any]:
    """Imports `module.function`, which `key` of the job file names. Raises ConfigError when there is no such thing."""
    for folder in reversed(search_paths):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    module_name, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # importing a person's file may raise anything
        raise ConfigError(
            f"{key}: {path} cannot be imported ({type(error).__name__}: {error}); looked in {', '.join(search_paths)}"
        ) from error
    if not callable(function):
        raise ConfigError(f"{key}: {path} is a {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def named_by(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the function takes by name: all where it takes `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(arguments)
    names = {p.name for p in parameters}
    return {name: value for name, value in arguments.items() if name in names}
