"""Rows of a dataset job to token ids, on Ray Data's workers: each piece of a file becomes an Arrow file.

A new method is a line in BUILDERS. What a type of row means is in formats/, how files are read in reading.py.
"""

import os
import pickle
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.errors import ConfigError, DataError, EaglerayError
from actors.formats.base import IGNORED, Encode, FormatSpec, RowError
from actors.formats.kto import JUDGED_FORMATS, build_judged, judged_format
from actors.formats.preference import PAIR_FORMATS, build_pairs, pair_format
from actors.formats.reward import REWARD_FORMATS, build_reward_pairs, reward_format
from actors.formats.sft import LACKING, SFT_FORMATS, build_sft, sft_format
from actors.reading import BadRow, Piece, SourceFile, SourceSpec, cut, read
from actors.specs import ModelSpec

BUILDERS: dict[str, Callable[[FormatSpec, Any], Encode]] = {
    "sft": build_sft,
    "dpo": build_pairs,
    "ipo": build_pairs,
    "orpo": build_pairs,
    "kto": build_judged,
    "reward_trainer": build_reward_pairs,
}

# What finds a method's format by its type, without a tokenizer.
FORMATS: dict[str, Callable[[FormatSpec], Any]] = {
    "sft": sft_format,
    "dpo": pair_format,
    "ipo": pair_format,
    "orpo": pair_format,
    "kto": judged_format,
    "reward_trainer": reward_format,
}
FAMILIES = {
    "user_defined",
    *LACKING,
    *(name.partition(".")[0] for table in (SFT_FORMATS, PAIR_FORMATS, JUDGED_FORMATS, REWARD_FORMATS) for name in table),
}

BLOCK_TOKENS = 2**20  # encoded tokens that a worker holds before it writes them: 8 MiB with their labels
BLOCK_SEQUENCES = 64  # or this many full sequences, if they are long: packing wastes up to one of them a block
LIMITS_EVERY_S = 0.05  # so often Ray Data looks at what the cluster has; its own is a second
BAD_ROWS_KEPT = 10_000  # a quarantine is for reading; a whole dataset of the wrong type is counted only

EncodedRow = dict[str, Any]  # a column's name to int32 ids, or to a bool


@dataclass(frozen=True)
class PrepareSpec:
    """What makes token ids of the rows of a job."""

    method: str  # one of BUILDERS
    sources: tuple[SourceSpec, ...]
    tokenizer: str  # a hub name or a folder, as hub.resolve takes it
    sequence_len: int  # tokens
    trust_remote_code: bool = False
    special_tokens: tuple[tuple[str, str], ...] = ()  # as of ModelSpec
    packing: bool = False  # several documents a row; sft only
    eval_packing: bool = False  # the same of the held-out rows
    cut: bool = False  # rows that are too long, instead of leaving them out; sft only
    tokenizer_digest: str = ""  # of its files: a process must not use the one that it loaded before they changed


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
    bad_rows: int = 0  # those that are too long among them
    long_rows: int = 0
    bad: list[BadRow] = field(default_factory=list)  # the first BAD_ROWS_KEPT of each kind


def ensure_type(method: str, spec: FormatSpec) -> None:
    """Raises ConfigError for a type that the method does not have."""
    name = spec.type
    if isinstance(name, str) and "." in name and name.partition(".")[0] not in FAMILIES:
        raise ConfigError(
            f"datasets: type: {name} is a function of your own, which only rl: grpo takes; write the rows that it "
            "would make into a file, or use a mapping of fields and formats as the type"
        )
    FORMATS[method](spec)


# Rows to ids.


class RowEncoder:
    """The rows of one source to prepared rows. Raises ConfigError when there is no such type."""

    def __init__(self, spec: PrepareSpec, source: SourceSpec, tokenizer: Any) -> None:
        self.encode = BUILDERS[spec.method](source.format, tokenizer)
        self.sequence_len = spec.sequence_len
        self.cut = spec.cut
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
        rows = cut_document(row, self.sequence_len) if self.cuts_long_rows or self.cut else [row]
        if not self.cuts_long_rows:
            del rows[1:]
        if not any(trained_tokens(row) for row in rows):
            if self.cut and trained_tokens(row):
                return BadRow(place, f"has no token to train among its first {self.sequence_len}", too_long=True)
            return BadRow(place, "has no token to train")
        if (longest := max(max(sequences(row)) for row in rows)) > self.sequence_len:
            return BadRow(place, f"has {longest} tokens; sequence_len is {self.sequence_len}", too_long=True)
        return rows


_encoders: dict[str, list[RowEncoder]] = {}


def encoder(spec: PrepareSpec, source: int, tokenizer: bytes | None) -> RowEncoder:
    """Made once a process: a tokenizer takes longer to load than a piece to encode.

    tokenizer: the driver's, pickled. Finding the class of one imports torch, for which half a million tokens can be encoded.
    """
    key = repr(spec)
    if key not in _encoders:
        _encoders.clear()  # of a job that this process served before
        loaded = pickle.loads(tokenizer) if tokenizer is not None else _load_tokenizer(spec)
        _encoders[key] = [RowEncoder(spec, one, loaded) for one in spec.sources]
    return _encoders[key][source]


def _load_tokenizer(spec: PrepareSpec) -> Any:
    from actors.model import load_tokenizer  # here: it imports torch

    return load_tokenizer(
        ModelSpec(spec.tokenizer, "float32", spec.trust_remote_code, special_tokens=spec.special_tokens)
    )


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


def cut_file(file: SourceFile, sources: Sequence[SourceSpec], piece_bytes: int, piece_rows: int) -> list[Piece]:
    """The pieces of a file of one of the sources."""
    return list(cut(file, sources[file.source], piece_bytes, piece_rows))


def prepare_piece(piece: Piece, spec: PrepareSpec, folder: str, tokenizer: bytes | None = None) -> list[PartStats]:
    """Reads, encodes and writes a piece: an Arrow file of its rows to train, one of those held out, or both.

    tokenizer: the one that the spec names, pickled; None = it is loaded here.
    Raises DataError when the file cannot be read any more, or the part not be written.
    """
    source = spec.sources[piece.source]
    encode = encoder(spec, piece.source, tokenizer).rows
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
            self.stats.long_rows += outcome.too_long
            of_its_kind = self.stats.long_rows if outcome.too_long else self.stats.bad_rows - self.stats.long_rows
            if of_its_kind <= BAD_ROWS_KEPT:
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
        batch = pa.record_batch({name: column([row[name] for row in rows]) for name in rows[0]})
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


def column(values: Sequence[Any]) -> Any:
    """Arrow's array of one column: lists of ids, or bools."""
    import pyarrow as pa

    if isinstance(values[0], bool):
        return pa.array(values)
    offsets = np.cumsum([0, *(len(ids) for ids in values)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(values))


def conduct(function: Callable[[Any], list[Any]], items: Sequence[Any], tasks: int) -> Iterator[Any]:
    """What a function makes of all items, in no order, by so many tasks of Ray Data; errors for people are among it.

    Like all that runs on workers it lies here, and not in the driver's modules: those import torch.
    """
    import ray.data
    from ray.data._internal.execution.resource_manager import ResourceManager

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a large file that cannot be cut is one long task
    # Ray Data 2.60 takes what its coordinator says of the cluster at the next look only, and runs one task until then.
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = LIMITS_EVERY_S
    rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=tasks)
    for row in rows.flat_map(partial(each, function=function)).iter_rows():
        yield row["item"]


def each(row: dict[str, Any], function: Callable[[Any], list[Any]]) -> list[dict[str, Any]]:
    """What a function makes of the item in a row of Ray Data, as such rows.

    An error that a person can mend comes back as a row: Ray Data would bury it in its own.
    """
    try:
        return [{"item": made} for made in function(row["item"])]
    except EaglerayError as error:
        return [{"item": error}]
