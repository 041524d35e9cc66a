"""Prompts of an online job: read, checked row by row, dealt to steps.

A row is a `prompt` (text, or chat messages) and columns for the reward functions. A row that cannot be used goes to
quarantine with its place and reason; too many of them stop the job. A new file format is a line in READERS.
"""

import csv
import importlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any

from actors.errors import DataError
from actors.snapshot import digest
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
class BadRow:
    """A row in quarantine."""

    place: str
    reason: str


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
    train = _read_all(config, config.datasets or [], search_paths, bad)
    held_out = _read_all(config, config.test_datasets or [], search_paths, bad)
    random.Random(config.seed).shuffle(train)
    if config.val_set_size:
        count = round(config.val_set_size * len(train)) if config.val_set_size < 1 else int(config.val_set_size)
        if not 0 < count < len(train):
            raise DataError(
                f"val_set_size: {config.val_set_size} of {len(train)} rows leaves no rows to train or to test"
            )
        held_out, train = [*held_out, *train[:count]], train[count:]
    return _checked(config, PromptSet(tuple(train), tuple(held_out), tuple(bad)))


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
                f"max_completion_length {config.trl.max_completion_length} leaves {room}")
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


@lru_cache(maxsize=2)  # a step may span two passes
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _checked(config: JobConfig, prompts: PromptSet) -> PromptSet:
    total = len(prompts.train) + len(prompts.held_out) + len(prompts.bad)
    first = f"; the first: {prompts.bad[0].place}: {prompts.bad[0].reason}" if prompts.bad else ""
    if total and len(prompts.bad) > config.ray.max_bad_rows * total:
        raise DataError(
            f"{len(prompts.bad)} of {total} rows cannot be used{first}. "
            "Mend them, or let a share of rows be left out with ray.max_bad_rows"
        )
    if not prompts.train:
        names = ", ".join(entry.path for entry in config.datasets or [])
        raise DataError(f"datasets: no prompts in {names}{first}")
    return prompts


def _read_all(
    config: JobConfig, entries: Sequence[DatasetConfig], search_paths: Sequence[str], bad: list[BadRow]
) -> list[Row]:
    rows = []
    for entry in entries:
        transform = _transform(config, entry, search_paths)
        for place, raw in _read(entry, search_paths):
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


def _read(entry: DatasetConfig, search_paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    files = _local_files(entry, search_paths)
    if files is None:
        yield from _read_hub(entry)
        return
    asked = {"name": entry.name, "split": entry.split if entry.split != "train" else None, "revision": entry.revision}
    if unused := [name for name, value in asked.items() if value]:
        log.warning("datasets: %s not used: %s lies on this machine, not on the hub", ", ".join(unused), entry.path)
    for file in files:
        kind = entry.ds_type or file.suffix.lstrip(".").lower()
        if kind not in READERS:
            raise DataError(
                f"datasets: {file} is of no known kind; use one of {', '.join(sorted(READERS))}, or ds_type"
            )
        try:
            yield from READERS[kind](file)
        except (OSError, ValueError) as error:
            raise DataError(f"datasets: {file} cannot be read: {error}") from error


def _local_files(entry: DatasetConfig, search_paths: Sequence[str]) -> list[Path] | None:
    """Files of a local dataset, sorted; None for a name that can only be the hub's."""
    names = entry.data_files or []
    for base in ["", *search_paths]:
        path = Path(base) / Path(entry.path).expanduser()
        if path.is_file():
            return [path]
        if path.is_dir():
            found = [path / n for n in ([names] if isinstance(names, str) else names)]
            files = found or sorted(f for f in path.iterdir() if f.suffix.lstrip(".").lower() in READERS)
            if not files:
                raise DataError(f"datasets: the folder {path} holds no file of a known kind")
            return files
        if any(c in entry.path for c in "*?[") and (matches := sorted(glob(str(path)))):
            return [Path(name) for name in matches]
    if (
        entry.path.startswith((".", "/", "~"))
        or entry.path.count("/") > 1
        or Path(entry.path).suffix.lstrip(".") in READERS
    ):
        raise DataError(f"datasets: there is no file {entry.path}; looked in {', '.join(['.', *search_paths])}")
    return None


def _read_hub(entry: DatasetConfig) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    split = entry.split or "train"
    try:
        dataset = load_dataset(
            entry.path, entry.name, split=split, data_files=entry.data_files, revision=entry.revision
        )
    except Exception as error:  # the hub's client raises its own, requests' and OS errors alike
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"datasets: {entry.path} is no local file and the hub did not give it: {reason}") from error
    for index, row in enumerate(dataset):
        yield f"{entry.path}[{split}]:{index}", dict(row)


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{file}:{number}"
                try:
                    yield place, json.loads(line)
                except ValueError as error:
                    yield place, BadRow(place, f"is not JSON ({error})")


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if text.lstrip()[:1] != "[":
        yield from _jsonl(file)  # many people name their JSON lines .json
        return
    for index, row in enumerate(json.loads(text)):
        yield f"{file}[{index}]", row


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        for row in reader:
            yield f"{file}:{reader.line_num}", row


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as parquet

    yield from _enumerated(file, parquet.read_table(file).to_pylist())


def _arrow(file: Path) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset

    yield from _enumerated(file, Dataset.from_file(str(file)).to_list())


def _text(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            yield f"{file}:{number}", {"prompt": line}


def _enumerated(file: Path, rows: list[Any]) -> Iterator[tuple[str, Any]]:
    for index, row in enumerate(rows):
        yield f"{file}[{index}]", row


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "txt": _text,
    "text": _text,
}
