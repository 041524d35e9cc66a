"""Rows of a dataset job to token ids, on Ray Data's workers: a file is cut into pieces, a piece becomes an Arrow file.

A new kind of file is a line in KINDS: how it is cut, and how a piece of it is read. A new method is a line in BUILDERS.
What a type of row means is in formats/.
"""

import csv
import json
import os
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import DataError, EaglerayError
from actors.formats.base import IGNORED, Encode, FormatSpec, RowError
from actors.formats.kto import build_judged
from actors.formats.preference import build_pairs
from actors.formats.reward import build_reward_pairs
from actors.formats.sft import build_sft
from actors.model import load_tokenizer
from actors.specs import ModelSpec

BUILDERS: dict[str, Callable[[FormatSpec, Any], Encode]] = {
    "sft": build_sft,
    "dpo": build_pairs,
    "ipo": build_pairs,
    "orpo": build_pairs,
    "kto": build_judged,
    "reward_trainer": build_reward_pairs,
}

ROWS_AT_ONCE = 1000  # of a columnar file
BLOCK_TOKENS = 2**20  # encoded tokens that a worker holds before it writes them: 8 MiB with their labels
BLOCK_SEQUENCES = 64  # or this many full sequences, if they are long: packing wastes up to one of them a block
BAD_ROWS_KEPT = 10_000  # a quarantine is for reading; a whole dataset of the wrong type is counted only

EncodedRow = dict[str, Any]  # a column's name to int32 ids, or to a bool


@dataclass(frozen=True)
class BadRow:
    """A row in quarantine."""

    place: str  # file:line, or file[row]
    reason: str


@dataclass(frozen=True)
class HubSpec:
    """A dataset of the hub, as `datasets.load_dataset` takes it."""

    path: str
    name: str | None = None
    split: str = "train"
    data_files: str | tuple[str, ...] | None = None
    revision: str | None = None


@dataclass(frozen=True)
class SourceSpec:
    """One entry of `datasets` or `test_datasets`."""

    format: FormatSpec
    held_out: bool = False  # an entry of test_datasets
    hub: HubSpec | None = None  # None = files of its own


@dataclass(frozen=True)
class PrepareSpec:
    """What makes token ids of the rows of a job."""

    method: str  # one of BUILDERS
    sources: tuple[SourceSpec, ...]
    tokenizer: str  # a hub name or a folder, as hub.resolve takes it
    sequence_len: int  # tokens
    trust_remote_code: bool = False
    packing: bool = False  # several documents a row; sft only
    eval_packing: bool = False  # the same of the held-out rows
    tokenizer_digest: str = ""  # of its files: a process must not use the one that it loaded before they changed


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


@dataclass
class PartStats:
    """What became of one piece's rows that are trained, or of those that are held out."""

    key: str
    held_out: bool
    file: str = ""  # "" when no row is left
    raw_rows: int = 0
    rows: int = 0
    documents: int = 0  # as many as rows, unless they are packed
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest row
    bad_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)  # the first BAD_ROWS_KEPT of them


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
        return load_dataset(spec.path, spec.name, split=spec.split, data_files=files, revision=spec.revision)
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


def cut(source: int, spec: SourceSpec, file: str, kind: str, piece_bytes: int, piece_rows: int) -> list[Piece]:
    """The pieces of a file, in order. Raises DataError when it cannot be read."""
    whole = Piece(source, file, kind, 0, 0, 0)
    try:
        return list(KINDS[kind].cut(whole, spec, piece_bytes, piece_rows))
    except (OSError, ValueError) as error:
        raise DataError(f"datasets: {file} cannot be read: {error}") from error


def _cut_lines(whole: Piece, spec: SourceSpec, piece_bytes: int, piece_rows: int) -> Iterator[Piece]:
    """At line ends, at least piece_bytes each but for the last."""
    begin = end = rows = 0
    first_line = next_line = 1
    with open(whole.file, "rb") as lines:
        for line in lines:
            end += len(line)
            next_line += 1
            rows += not line.isspace()
            if end - begin >= piece_bytes:
                yield replace(whole, begin=begin, end=end, rows=rows, first_line=first_line)
                begin, first_line, rows = end, next_line, 0
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
    return _numbered(f"{spec.hub.path}[{spec.hub.split}]", _loaded(spec.hub), piece.begin, piece.end)


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


# Rows to ids.


class RowEncoder:
    """The rows of one source to prepared rows. Raises ConfigError when there is no such type."""

    def __init__(self, spec: PrepareSpec, source: SourceSpec, tokenizer: Any) -> None:
        self.encode = BUILDERS[spec.method](source.format, tokenizer)
        self.sequence_len = spec.sequence_len
        self.cuts_long_rows = spec.method == "sft" and source.format.type == "completion"

    def rows(self, place: str, raw: Any) -> list[EncodedRow] | BadRow:
        """One prepared row, or several of a long `completion`; or why there is none."""
        if isinstance(raw, BadRow):
            return raw
        if not isinstance(raw, Mapping):
            return BadRow(place, f"is a {type(raw).__name__}, not an object with fields")
        try:
            row = {name: value if isinstance(value, bool) else _ids(value) for name, value in self.encode(raw).items()}
        except RowError as error:
            return BadRow(place, str(error))
        except Exception as error:  # rows are anyone's, and a tokenizer raises what it likes about text that is none
            return BadRow(place, f"cannot be encoded ({type(error).__name__}: {error})")
        rows = cut_document(row, self.sequence_len) if self.cuts_long_rows else [row]
        return rows if (why := self._refusal(rows)) is None else BadRow(place, why)

    def _refusal(self, rows: Sequence[EncodedRow]) -> str | None:
        if not any(trained_tokens(row) for row in rows):
            return "has no token to train"
        if (longest := max(max(sequences(row)) for row in rows)) > self.sequence_len:
            return f"has {longest} tokens; sequence_len is {self.sequence_len}"
        return None


_encoders: dict[str, list[RowEncoder]] = {}


def encoder(spec: PrepareSpec, source: int) -> RowEncoder:
    """Made once a process: a tokenizer takes longer to load than a piece to encode."""
    key = repr(spec)
    if key not in _encoders:
        _encoders.clear()  # of a job that this process served before
        tokenizer = load_tokenizer(ModelSpec(spec.tokenizer, "float32", spec.trust_remote_code))
        _encoders[key] = [RowEncoder(spec, one, tokenizer) for one in spec.sources]
    return _encoders[key][source]


def sequences(row: EncodedRow) -> list[int]:
    """Tokens of each sequence that a row puts through the model: a pair has two."""
    if "input_ids" in row:
        return [len(row["input_ids"])]
    return [len(row["prompt_ids"]) + len(answer) for answer in _answers(row)]


def trained_tokens(row: EncodedRow) -> int:
    """How many tokens the loss is on. Nothing predicts the first one of a document."""
    if "labels" in row:
        return int(np.count_nonzero(row["labels"][1:] != IGNORED))
    return sum(len(answer) for answer in _answers(row))


def _answers(row: EncodedRow) -> list[Any]:
    return [row[name] for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in row]


def _ids(value: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(value, np.int32)  # a list of Python's integers takes many times the memory


def cut_document(row: EncodedRow, sequence_len: int) -> list[EncodedRow]:
    """A document in pieces of at most sequence_len tokens. A single token left over is dropped: nothing predicts it."""
    starts = range(0, max(1, len(row["input_ids"]) - 1), sequence_len)
    return [{name: ids[start : start + sequence_len] for name, ids in row.items()} for start in starts]


# Documents to packed rows.


def pack(lengths: Sequence[int], sequence_len: int) -> list[list[int]]:
    """Which documents share a row of at most sequence_len tokens: the longest first, each where it fits best.

    Best fit needs no more rows than first fit does, within the same bound, and a sorted list finds it.
    Rows, and documents in a row, stand in the documents' order.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for document in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect_left(rooms, (lengths[document], 0))
        if at == len(rooms):
            room, chosen = sequence_len, len(bins)
            bins.append([])
        else:
            room, chosen = rooms.pop(at)
        bins[chosen].append(document)
        insort(rooms, (room - lengths[document], chosen))
    return sorted(sorted(documents) for documents in bins)


def packed(rows: Sequence[EncodedRow], sequence_len: int) -> list[EncodedRow]:
    """Rows of several documents, with their lengths; `seq_lengths` is TRL's name."""
    return [
        {
            "input_ids": np.concatenate([rows[i]["input_ids"] for i in documents]),
            "labels": np.concatenate([rows[i]["labels"] for i in documents]),
            "seq_lengths": _ids([len(rows[i]["input_ids"]) for i in documents]),
        }
        for documents in pack([len(row["input_ids"]) for row in rows], sequence_len)
    ]


# Pieces to parts.


def prepare_piece(piece: Piece, spec: PrepareSpec, folder: str) -> list[PartStats]:
    """Reads, encodes and writes a piece: an Arrow file of its rows to train, one of those held out, or both.

    Raises DataError when the file cannot be read any more, or the part not be written.
    """
    source = spec.sources[piece.source]
    encode = encoder(spec, piece.source).rows
    train = Part(Path(folder, "train"), PartStats(piece.key, held_out=False), spec.packing, spec.sequence_len)
    held_out = Part(Path(folder, "held_out"), PartStats(piece.key, held_out=True), spec.eval_packing, spec.sequence_len)
    try:
        for index, (place, raw) in enumerate(read(piece, source)):
            part = held_out if source.held_out or index in piece.held_out else train
            part.add(encode(place, raw))
        return [part.close() for part in (train, held_out) if part.stats.raw_rows]
    except (OSError, ValueError) as error:
        raise DataError(f"datasets: {piece.file}: its rows could not be prepared in {folder}: {error}") from error


class Part:
    """An Arrow stream of one piece, as `datasets.Dataset.from_file` reads it: written block by block, beside, and renamed."""

    def __init__(self, folder: Path, stats: PartStats, packing: bool, sequence_len: int) -> None:
        self.stats = stats
        self.path = folder / f"part-{stats.key}.arrow"
        self.beside = folder / f".{self.path.name}.{os.getpid()}.tmp"  # Ray may run a task a second time
        self.packing = packing
        self.sequence_len = sequence_len
        self.block_tokens = max(BLOCK_TOKENS, BLOCK_SEQUENCES * sequence_len)
        self.block: list[EncodedRow] = []
        self.tokens_in_block = 0
        self.writer: Any = None

    def add(self, outcome: list[EncodedRow] | BadRow) -> None:
        """What became of one raw row."""
        self.stats.raw_rows += 1
        if isinstance(outcome, BadRow):
            self.stats.bad_rows += 1
            if self.stats.bad_rows <= BAD_ROWS_KEPT:
                self.stats.bad.append(outcome)
            return
        self.block += outcome
        self.tokens_in_block += sum(sum(sequences(row)) for row in outcome)
        if self.tokens_in_block >= self.block_tokens:
            self._write_block()

    def close(self) -> PartStats:
        """Makes the file appear, if it has rows."""
        if self.block:
            self._write_block()
        if self.writer is not None:
            self.writer.close()
            os.replace(self.beside, self.path)
            self.stats.file = str(self.path)
        return self.stats

    def _write_block(self) -> None:
        import pyarrow as pa

        rows = packed(self.block, self.sequence_len) if self.packing else self.block
        batch = pa.record_batch({name: _column([row[name] for row in rows]) for name in rows[0]})
        if self.writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.writer = pa.ipc.new_stream(str(self.beside), batch.schema)
        self.writer.write_batch(batch)
        self.stats.rows += len(rows)
        self.stats.documents += len(self.block)
        self.stats.tokens += self.tokens_in_block
        self.stats.trained_tokens += sum(trained_tokens(row) for row in self.block)
        self.stats.longest = max(self.stats.longest, *(max(sequences(row)) for row in rows))
        self.block, self.tokens_in_block = [], 0


def _column(values: Sequence[Any]) -> Any:
    import pyarrow as pa

    if isinstance(values[0], bool):
        return pa.array(values)
    offsets = np.cumsum([0, *(len(ids) for ids in values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(values))


def each(row: dict[str, Any], function: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
    """What a function makes of the item in a row of Ray Data, as such rows.

    An error that a person can mend comes back as a row: Ray Data would bury it in its own.
    """
    try:
        return [{"item": made} for made in function(row["item"])]
    except EaglerayError as error:
        return [{"item": error}]
