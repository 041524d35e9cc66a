"""Prompts of an online job: read, checked row by row, dealt to steps.

A row is a `prompt` (text, or chat messages) and columns for the reward functions. A row that cannot be used goes to
quarantine with its place and reason; too many of them stop the job. A new file format is a line in READERS, and a name in
dataset_files.KINDS.
"""

import importlib
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from actors.errors import DataError
from actors.reading import BadRow, arrow_rows, csv_rows, hub_rows, json_rows, jsonl_rows, parquet_rows
from actors.snapshot import digest
from orchestrator.dataset_files import hub_spec, local_files
from orchestrator.schema import DatasetConfig, JobConfig

log = logging.getLogger("eagleray")

Prompt = str | list[dict[str, Any]]
PROBE_TOKENS = 64  # enough that two policies never agree on all of them by chance


@dataclass(frozen=True)
class Row:
    """One prompt and what the reward functions need to judge its completions."""

    prompt: Prompt
    columns: dict[str, Any]
    place: str  # file:line, for messages


@dataclass(frozen=True)
class PromptSet:
    """Rows to train on, rows held out, and rows that were left out."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    bad: tuple[BadRow, ...]

    @property
    def fingerprint(self) -> str:
        """Digest of the training prompts in their order: what a resumed run must find unchanged."""
        return digest(json.dumps([row.prompt for row in self.train], default=str).encode())


def load_prompts(config: JobConfig, search_paths: Sequence[str]) -> PromptSet:
    """Reads `datasets` and `test_datasets`. Raises DataError for a missing file, no rows, or too many bad ones."""
    bad: list[BadRow] = []
    train = _read_all(config, search_paths, bad, held_out=False)
    held_out = _read_all(config, search_paths, bad, held_out=True)
    random.Random(config.seed).shuffle(train)
    if config.val_set_size:
        count = held_out_count(config, len(train))
        held_out, train = [*held_out, *train[:count]], train[count:]
    return _checked(config, PromptSet(tuple(train), tuple(held_out), tuple(bad)))


def held_out_count(config: JobConfig, total: int) -> int:
    """How many of all rows val_set_size holds out. Raises DataError when that leaves none to train, or none to test."""
    count = round(config.val_set_size * total) if config.val_set_size < 1 else int(config.val_set_size)
    if not 0 < count < total:
        raise DataError(f"val_set_size: {config.val_set_size} of {total} rows leaves no rows to train or to test")
    return count


def without_long_prompts(config: JobConfig, prompts: PromptSet, count_tokens: Callable[[Prompt], int]) -> PromptSet:
    """Moves prompts that leave no room for max_completion_length tokens within sequence_len to quarantine."""
    room = config.sequence_len - config.trl.max_completion_length
    bad = list(prompts.bad)

    def fits(row: Row) -> bool:
        try:
            tokens = count_tokens(row.prompt)
        except Exception as error:  # a template is a program of its own, and a row may be none that it foresees
            bad.append(BadRow(row.place, f"the chat template cannot take the prompt ({type(error).__name__}: {error})"))
            return False
        if tokens > room:
            bad.append(
                BadRow(row.place, f"the prompt has {tokens} tokens; sequence_len {config.sequence_len} less "
                f"max_completion_length {config.trl.max_completion_length} leaves {room}", too_long=True)
            )  # fmt: skip
        return tokens <= room

    train = tuple(row for row in prompts.train if fits(row))
    held_out = tuple(row for row in prompts.held_out if fits(row))
    return _checked(config, PromptSet(train, held_out, tuple(bad)))


def rows_of_step(rows: Sequence[Row], step: int, per_step: int, seed: int) -> list[Row]:
    """The prompts of a step: a pure function of the step, so a resumed run needs no cursor.

    Each pass over the rows has an order of its own, drawn from the seed.
    """
    chosen = []
    for position in range(step * per_step, (step + 1) * per_step):
        epoch, index = divmod(position, len(rows))
        chosen.append(rows[_order(len(rows), seed, epoch)[index]])
    return chosen


def other_rows(rows: Sequence[Row], used: Sequence[Row], count: int, draw: random.Random) -> list[Row]:
    """Up to `count` rows that are none of those used, drawn at random."""
    taken = set(map(id, used))
    drawn = draw.sample(rows, min(len(rows), count + len(taken)))
    return [row for row in drawn if id(row) not in taken][:count]


@lru_cache(maxsize=2)  # a step may span two passes
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _checked(config: JobConfig, prompts: PromptSet) -> PromptSet:
    total = len(prompts.train) + len(prompts.held_out) + len(prompts.bad)
    too_long = sum(row.too_long for row in prompts.bad)
    ensure_usable(config, "prompts", len(prompts.train), total, len(prompts.bad), too_long, prompts.bad)
    ensure_held_out(config, len(prompts.held_out))
    return prompts


def ensure_usable(
    config: JobConfig, what: str, kept: int, total: int, bad_rows: int, long_rows: int, bad: Sequence[BadRow]
) -> None:
    """Raises DataError for more bad rows than ray.max_bad_rows allows, or when nothing to train on is kept.

    long_rows: of the bad ones, too long; any number of them is left out, as Axolotl does, unless excess_length_strategy is
    raise. bad: the first of the bad rows.
    """

    def first(rows: Iterable[BadRow]) -> str:
        return next((f"; the first: {row.place}: {row.reason}" for row in rows), "")

    if long_rows and config.excess_length_strategy == "raise":
        named = first(row for row in bad if row.too_long)
        text = "Raise sequence_len, or use excess_length_strategy: drop"
        raise DataError(f"{long_rows} of {total} rows are too long{named}. {text}")
    wrong = bad_rows - long_rows
    if wrong > config.ray.max_bad_rows * total:
        named = first(row for row in bad if not row.too_long)
        text = "Mend them, or let a larger share of rows be left out with ray.max_bad_rows"
        raise DataError(f"{wrong} of {total} rows cannot be used{named}. {text}")
    if not kept:
        names = ", ".join(entry.path for entry in config.datasets or [])
        raise DataError(f"datasets: no {what} in {names}{first(bad)}")


def ensure_held_out(config: JobConfig, count: int) -> None:
    """Raises DataError where rows are to be held out and none of them can be used."""
    if (config.test_datasets or config.val_set_size) and not count:
        asked = "test_datasets" if config.test_datasets else "val_set_size"
        raise DataError(f"{asked}: no row that can be used is left to evaluate on")


def _read_all(config: JobConfig, search_paths: Sequence[str], bad: list[BadRow], *, held_out: bool) -> list[Row]:
    rows = []
    for entry in (config.test_datasets if held_out else config.datasets) or []:
        transform = _transform(config, entry, search_paths)
        for place, raw in _read(entry, search_paths, held_out):
            row = _row(place, raw, transform)
            if isinstance(row, Row):
                rows.append(row)
            else:
                bad.append(row)
    return rows


def _row(place: str, raw: Any, transform: Callable[[dict[str, Any]], dict[str, Any]] | None) -> Row | BadRow:
    if isinstance(raw, BadRow):
        return raw
    if not isinstance(raw, dict):
        return BadRow(place, f"is a {type(raw).__name__}, not an object with a `prompt`")
    if transform is not None:
        try:
            raw = transform(raw)
        except Exception as error:  # a person's code on a person's row may raise anything
            return BadRow(place, f"the transform failed ({type(error).__name__}: {error})")
    if raw.get("prompt") is None:
        return BadRow(place, f"has no `prompt`; its fields are {', '.join(raw) or 'none'}")
    prompt = raw["prompt"]
    columns = {name: value for name, value in raw.items() if name != "prompt"}
    if isinstance(prompt, str):
        return Row(prompt, columns, place) if prompt.strip() else BadRow(place, "`prompt` is empty")
    good = (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None for m in prompt)
    )
    if not good:
        return BadRow(place, "`prompt` is neither text nor a list of messages with role and content")
    return Row(prompt, columns, place)


def _transform(
    config: JobConfig, entry: DatasetConfig, search_paths: Sequence[str]
) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
    """Axolotl's `type: module.fn`: fn(config) returns a function of a row, or that and options for `map`."""
    if not isinstance(entry.type, str) or "." not in entry.type:
        return None
    import sys

    module_name, _, name = entry.type.rpartition(".")
    sys.path[:0] = [path for path in search_paths if path not in sys.path]
    try:
        made = getattr(importlib.import_module(module_name), name)(config)
    except Exception as error:  # importing a person's file may raise anything
        raise DataError(
            f"datasets: type: {entry.type} cannot be used ({type(error).__name__}: {error}); "
            f"looked in {', '.join(search_paths)}"
        ) from error
    return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]


def _read(entry: DatasetConfig, search_paths: Sequence[str], held_out: bool) -> Iterator[tuple[str, Any]]:
    files = local_files(entry, search_paths, held_out=held_out)
    if files is None:
        yield from hub_rows(hub_spec(entry, held_out=held_out))
        return
    for file, kind in files:
        try:
            yield from READERS[kind](file)
        except (OSError, ValueError) as error:
            raise DataError(f"datasets: {file} cannot be read: {error}") from error


def _text(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield f"{file}:{number}", {"prompt": line}


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "jsonl": jsonl_rows,
    "json": json_rows,
    "csv": csv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "txt": _text,
    "text": _text,
}
