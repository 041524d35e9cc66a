"""Datasets' files to raw rows with their places: whole, or cut into pieces that are read by themselves.

A new kind of file is a line in KINDS: how it is cut, and how a piece of it is read.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from actors.errors import DataError
from actors.formats.base import FormatSpec

ROWS_AT_ONCE = 1000  # of a columnar file


@dataclass(frozen=True)
class BadRow:
    """A row in quarantine."""

    place: str  # file:line, or file[row]
    reason: str
    too_long: bool = False  # whole, but of more tokens than a row may have


@dataclass(frozen=True)
class HubSpec:
    """A dataset of the hub, as `datasets.load_dataset` takes it."""

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    revision: str | None = None
    streaming: bool = False  # read from the hub row by row, instead of downloaded first


@dataclass(frozen=True)
class SourceSpec:
    """One entry of `datasets` or `test_datasets`."""

    format: FormatSpec
    held_out: bool = False  # an entry of test_datasets
    hub: HubSpec | None = None  # None = files of its own


@dataclass(frozen=True)
class SourceFile:
    """A file of one source; of a hub dataset, all of it."""

    source: int  # index in PrepareSpec.sources
    path: str  # absolute; for the hub, its name there
    kind: str  # one of KINDS


@dataclass(frozen=True)
class Piece:
    """A run of rows of one file that is read by itself."""

    source: int  # index in PrepareSpec.sources
    file: str  # absolute path; "" for the hub's
    kind: str  # one of KINDS
    begin: int  # bytes in a file of lines, rows in all others
    end: int
    rows: int  # without blank lines
    first_line: int = 1  # of a file of lines
    key: str = ""  # sorts as the rows do
    held_out: frozenset[int] = field(default_factory=frozenset)  # which of its rows are, counted from 0


# Whole files. Each yields (place, row), where the row of a line that cannot be read is a BadRow.


def jsonl_rows(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        yield from _parsed(str(file), 1, lines)


def json_rows(file: Path) -> Iterator[tuple[str, Any]]:
    if not _holds_array(file):
        yield from jsonl_rows(file)  # many people name their JSON lines .json
        return
    for index, row in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        yield f"{file}[{index}]", row


def csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a document is longer than Python's limit of 128 KiB
    with file.open(encoding="utf-8", newline="") as handle:
        reader = csv.DictReader(handle)
        try:
            for row in reader:
                yield f"{file}:{reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error


def parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as parquet

    yield from _parquet_groups(file, 0, parquet.ParquetFile(file).metadata.num_rows)


def arrow_rows(file: Path) -> Iterator[tuple[str, Any]]:
    dataset = _arrow_file(str(file))
    yield from _numbered(str(file), dataset, 0, len(dataset))


def load_hub(spec: HubSpec) -> Any:
    """A dataset of the hub, memory-mapped. Raises DataError when it is nowhere to be had."""
    from datasets import load_dataset

    files = list(spec.data_files) if isinstance(spec.data_files, tuple) else spec.data_files
    try:
        return load_dataset(
            spec.path, spec.name, split=spec.split, data_files=files, revision=spec.revision, streaming=spec.streaming
        )
    except Exception as error:  # the hub's client raises its own, requests' and OS errors alike
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"datasets: {spec.path} is no local file and the hub did not give it: {reason}") from error


def hub_rows(spec: HubSpec) -> Iterator[tuple[str, Any]]:
    dataset = load_hub(spec)
    yield from _numbered(f"{spec.path}[{spec.split}]", dataset, 0, len(dataset))


def _parsed(file: str, first_line: int, lines: Iterable[bytes]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, first_line):
        if line.strip():
            place = f"{file}:{number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield place, BadRow(place, f"is not JSON ({error})")


def _holds_array(file: Path) -> bool:
    with file.open(encoding="utf-8") as handle:
        while (character := handle.read(1)).isspace():
            pass
    return character == "["


def _parquet_groups(file: Path, begin: int, end: int) -> Iterator[tuple[str, Any]]:
    """The rows of the row groups that start from row `begin` on and before row `end`."""
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(file) as handle:
        row = 0
        for group in range(handle.num_row_groups):
            count = handle.metadata.row_group(group).num_rows
            if begin <= row < end:
                batches = handle.iter_batches(ROWS_AT_ONCE, row_groups=[group])
                for index, value in enumerate((r for batch in batches for r in batch.to_pylist()), row):
                    yield f"{file}[{index}]", value
            row += count


def _arrow_file(file: str) -> Any:
    from datasets import Dataset

    return Dataset.from_file(file)


def _numbered(name: str, dataset: Any, begin: int, end: int) -> Iterator[tuple[str, Any]]:
    for index in range(begin, end):
        yield f"{name}[{index}]", dataset[index]


# Files cut into pieces.


def cut(file: SourceFile, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    """The pieces of a file, in order, as they are found. Raises DataError when it cannot be read."""
    whole = Piece(file.source, file.path, file.kind, 0, 0, 0)
    try:
        yield from KINDS[file.kind].cut(whole, spec, piece_bytes, piece_rows)
    except (OSError, ValueError) as error:
        raise DataError(f"datasets: {file.path} cannot be read: {error}") from error


def _cut_lines(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    """At line ends, into pieces of about piece_bytes or less and of one size, so that workers are done at the same time."""
    size = Path(whole.file).stat().st_size
    due = even = size / max(1, math.ceil(size / piece_bytes))
    begin = end = rows = 0
    first_line = next_line = 1
    with open(whole.file, "rb") as lines:
        for line in lines:
            end += len(line)
            next_line += 1
            rows += not line.isspace()
            if end >= due:
                yield replace(whole, begin=begin, end=end, rows=rows, first_line=first_line)
                begin, first_line, rows = end, next_line, 0
                due = even * (end // even + 1)
    if end > begin:
        yield replace(whole, begin=begin, end=end, rows=rows, first_line=first_line)


def _cut_json(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    """An array can only be read as a whole."""
    if _holds_array(Path(whole.file)):
        rows = sum(1 for _ in json_rows(Path(whole.file)))
        yield replace(whole, end=rows, rows=rows)
    else:
        yield from _cut_lines(replace(whole, kind="jsonl"), spec, piece_bytes, piece_rows)


def _cut_csv(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    """A line end may be inside a quoted field, so only reading from the start tells where a row begins."""
    rows = sum(1 for _ in csv_rows(Path(whole.file)))
    yield replace(whole, end=rows, rows=rows)


def _cut_parquet(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    """At row groups."""
    import pyarrow.parquet as parquet

    begin = end = 0
    metadata = parquet.read_metadata(whole.file)
    for group in range(metadata.num_row_groups):
        end += metadata.row_group(group).num_rows
        if end - begin >= piece_rows or group == metadata.num_row_groups - 1:
            yield replace(whole, begin=begin, end=end, rows=end - begin)
            begin = end


def _cut_arrow(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    yield from _cut_rows(whole, len(_arrow_file(whole.file)), piece_rows)


def _cut_hub(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    assert spec.hub is not None
    if spec.hub.streaming:
        yield whole  # nobody knows how many rows there are
    else:
        yield from _cut_rows(whole, len(load_hub(spec.hub)), piece_rows)


def _cut_rows(whole: Piece, rows: int, piece_rows: int) -> Iterator[Piece]:
    for begin in range(0, rows, piece_rows):
        end = min(begin + piece_rows, rows)
        yield replace(whole, begin=begin, end=end, rows=end - begin)


# Pieces read. As whole files, each yields (place, row).


def read(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    """The rows of a piece, without blank lines, with their places."""
    return KINDS[piece.kind].read(piece, spec)


def _lines(piece: Piece) -> Iterator[bytes]:
    with open(piece.file, "rb") as handle:
        handle.seek(piece.begin)
        while handle.tell() < piece.end:
            yield handle.readline()


def _read_jsonl(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    return _parsed(piece.file, piece.first_line, _lines(piece))


def _read_text(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(piece), piece.first_line):
        if line.strip():
            place = f"{piece.file}:{number}"
            try:
                yield place, {"text": line.decode().rstrip("\r\n")}
            except UnicodeDecodeError as error:
                yield place, BadRow(place, f"is not UTF-8 ({error})")


def _read_json(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    return json_rows(Path(piece.file))


def _read_csv(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    return csv_rows(Path(piece.file))


def _read_parquet(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    return _parquet_groups(Path(piece.file), piece.begin, piece.end)


def _read_arrow(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    return _numbered(piece.file, _arrow_file(piece.file), piece.begin, piece.end)


def _read_hub(piece: Piece, spec: SourceSpec) -> Iterator[tuple[str, Any]]:
    assert spec.hub is not None
    name = f"{spec.hub.path}[{spec.hub.split}]"
    if spec.hub.streaming:
        return ((f"{name}[{index}]", row) for index, row in enumerate(load_hub(spec.hub)))
    return _numbered(name, _loaded(spec.hub), piece.begin, piece.end)


@lru_cache(maxsize=4)  # asking the hub what is new takes a second, and a worker reads many pieces
def _loaded(spec: HubSpec) -> Any:
    return load_hub(spec)


@dataclass(frozen=True)
class Kind:
    """How a kind of file is cut, and how a piece of it is read."""

    cut: Callable[[Piece, SourceSpec, int, int], Iterator[Piece]]
    read: Callable[[Piece, SourceSpec], Iterator[tuple[str, Any]]]


KINDS: dict[str, Kind] = {
    "jsonl": Kind(_cut_lines, _read_jsonl),
    "json": Kind(_cut_json, _read_json),
    "csv": Kind(_cut_csv, _read_csv),
    "parquet": Kind(_cut_parquet, _read_parquet),
    "arrow": Kind(_cut_arrow, _read_arrow),
    "txt": Kind(_cut_lines, _read_text),
    "text": Kind(_cut_lines, _read_text),
    "hub": Kind(_cut_hub, _read_hub),
}
