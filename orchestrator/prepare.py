"""The rows of a dataset job as token ids on disk: what is read, which rows are held out, what came of it.

Ray Data's workers do the work (actors/preparing.py); the driver sees pieces and counts, no tokens.
"""

import logging
import pickle
import random
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from statistics import mean
from typing import Any

import ray
import ray.data

from actors import streaming
from actors.errors import EaglerayError
from actors.preparing import PartStats, PrepareSpec, RowEncoder, conduct, cut_file, prepare_piece, sequences
from actors.reading import BadRow, Piece, SourceFile, cut, read
from orchestrator import waits
from orchestrator.data import ensure_held_out, ensure_usable, held_out_count
from orchestrator.prepared import Prepared, read_manifest, summed, write_manifest
from orchestrator.row_sources import digest, ensure_types, tokenizer_of, what_to_read
from orchestrator.schema import JobConfig
from orchestrator.source import Problem

PIECE_BYTES = 4 * 2**20  # about a million tokens: a second or two of work
PIECE_ROWS = 5000  # of files that are cut by rows
BLOCKS = 1000  # tasks of Ray Data at most; with more pieces than this, each takes several
BLOCK_BYTES = 2**20  # of files a task at least: a worker process takes longer to start than to encode less
STREAM_BLOCK_BYTES = 2**16  # of a stream: small, so that the first one comes soon
TIMEOUT_S = 24 * 3600
SAMPLED, SAMPLED_BYTES = 64, 2**18  # rows, and bytes, of a file of which the plan learns how long rows are


def prepare(
    config: JobConfig,
    folder: Path,
    search_paths: Sequence[str],
    note: Callable[[str], None],
    progress: Callable[[int, int], None],
    unusable: Callable[[int, Sequence[BadRow]], None],
) -> Prepared:
    """Reads and encodes `datasets` and `test_datasets` into Arrow files. Needs a connected Ray.

    progress: told how many rows of how many are done. unusable: told how many cannot be used, if any, and the first of them,
    also where that is why it raises. The files lie in `folder`, or under dataset_prepared_path, where they are found again.
    Raises ConfigError for a type that the method does not have, DataError for a missing file, no rows, or too many bad ones.
    """
    spec, files = what_to_read(config, search_paths)
    tokenizer = ensure_types(spec)
    if config.streaming:
        files = [file for file in files if spec.sources[file.source].held_out]
    if config.dataset_prepared_path is None:
        return _checked(config, _prepared(config, spec, files, folder.absolute(), tokenizer, progress), unusable)
    folder = Path(config.dataset_prepared_path).expanduser().absolute() / digest(config, spec, files)
    ready = read_manifest(folder)
    if ready is not None:
        note(f"datasets: the rows in {folder} were prepared before, and are used again")
        return _checked(config, ready, unusable)
    prepared = _prepared(config, spec, files, folder, tokenizer, progress)
    write_manifest(folder, prepared)
    return _checked(config, prepared, unusable)


def stream(config: JobConfig, search_paths: Sequence[str], quarantine: Any, readers: int) -> ray.data.Dataset:
    """The rows of `datasets`, encoded by so many tasks while they are trained on. Starts nothing yet.

    quarantine: handle of an actors.streaming.Quarantine.
    """
    spec, files = what_to_read(config, search_paths)
    tokenizer = _for_workers(spec, ensure_types(spec))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True  # a resumed job must skip the rows that it has had
    context.target_max_block_size = STREAM_BLOCK_BYTES
    items = [{"item": file} for file in files if not spec.sources[file.source].held_out]
    found = ray.data.from_items(items, override_num_blocks=len(items))
    one_task = ray.data.TaskPoolStrategy(1)
    found = found.flat_map(partial(streaming.pieces, spec=spec, quarantine=quarantine), num_cpus=0, compute=one_task)
    encode = partial(streaming.rows, spec=spec, tokenizer=tokenizer, quarantine=quarantine)
    # The workers may have reserved every CPU, and still do not compute all the time.
    return found.map_batches(encode, batch_size=1, num_cpus=0, compute=ray.data.TaskPoolStrategy(readers))


def check(config: JobConfig, search_paths: Sequence[str]) -> None:
    """Raises what `prepare` would for missing files and unknown types; reads no row and starts nothing."""
    spec, _ = what_to_read(config, search_paths)
    ensure_types(spec)
    if not spec.special_tokens:
        return
    known = tokenizer_of(config.base_model, config.trust_remote_code).get_vocab()
    text = f"is no token of {config.base_model}, and new tokens are not implemented yet; name one that it has"
    unknown = [(name, token) for name, token in spec.special_tokens if token not in known]
    config.source.raise_if_any(Problem(f"special_tokens.{name}", f"{token} {text}") for name, token in unknown)


def tokens_of_a_row(config: JobConfig, search_paths: Sequence[str]) -> float | None:
    """On average, all its sequences together, of the first SAMPLED rows of each local file; None when none can be used.

    Starts nothing. Raises as `check` does.
    """
    spec, files = what_to_read(config, search_paths)
    tokenizer = ensure_types(spec)
    lengths: list[int] = []
    for file in files:
        source = spec.sources[file.source]
        if source.held_out or file.kind == "hub":
            continue
        encoder = RowEncoder(spec, source, tokenizer)
        for piece in islice(cut(file, source, SAMPLED_BYTES, SAMPLED), 1):
            encoded = (encoder.rows(place, raw) for place, raw in islice(read(piece, source), SAMPLED))
            lengths += [sum(sequences(row)) for rows in encoded if not isinstance(rows, BadRow) for row in rows]
    return mean(lengths) if lengths else None


def _prepared(
    config: JobConfig,
    spec: PrepareSpec,
    files: Sequence[SourceFile],
    folder: Path,
    tokenizer: Any,
    progress: Callable[[int, int], None],
) -> Prepared:
    tasks = _tasks(files)
    cut_all = partial(cut_file, sources=spec.sources, piece_bytes=PIECE_BYTES, piece_rows=PIECE_ROWS)
    found = sorted(_on_workers(cut_all, files, tasks), key=lambda piece: (piece.source, piece.file, piece.begin))
    pieces = _with_held_out(config, spec, found)
    total = sum(piece.rows for piece in pieces)
    parts: list[PartStats] = []
    encode = partial(prepare_piece, spec=spec, folder=str(folder), tokenizer=_for_workers(spec, tokenizer))
    for part in _on_workers(encode, pieces, tasks):
        parts.append(part)
        progress(sum(part.raw_rows for part in parts), total)
    return summed(sorted(parts, key=lambda part: part.key))


def _for_workers(spec: PrepareSpec, tokenizer: Any) -> bytes | None:
    """Code of a model's own can only be loaded where it is needed."""
    return None if spec.trust_remote_code else pickle.dumps(tokenizer)


def _tasks(files: Sequence[SourceFile]) -> int:
    if any(file.kind == "hub" for file in files):
        return BLOCKS  # its size is not known here
    return min(BLOCKS, 1 + sum(Path(file.path).stat().st_size for file in files) // BLOCK_BYTES)


def _with_held_out(config: JobConfig, spec: PrepareSpec, pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with their keys, and with the rows that val_set_size holds out: drawn from all rows, in their order."""
    from_train = [0 if spec.sources[piece.source].held_out else piece.rows for piece in pieces]
    total = sum(from_train)
    held_out: list[int] = []
    if config.val_set_size:
        held_out = sorted(random.Random(config.seed).sample(range(total), held_out_count(config, total)))
    ends = list(accumulate(from_train))
    dealt = []
    for index, (piece, count, end) in enumerate(zip(pieces, from_train, ends, strict=True)):
        chosen = held_out[bisect_left(held_out, end - count) : bisect_left(held_out, end)]
        dealt.append(replace(piece, key=f"{index:08d}", held_out=frozenset(row - (end - count) for row in chosen)))
    return dealt


def _on_workers(function: Callable[[Any], list[Any]], items: Sequence[Any], tasks: int) -> Iterator[Any]:
    """What a function makes of all items, in no order, in so many tasks. Raises the first EaglerayError that it raised.

    A task of its own conducts Ray Data, so that the driver can be interrupted, and Ray Data's logs stay off the screen.
    """
    if not items:
        return
    conducted = ray.remote(num_cpus=0, num_returns="streaming")(conduct).remote(function, items, min(tasks, len(items)))
    for one in waits.fetch_each(conducted, "the datasets", TIMEOUT_S):
        if isinstance(one, EaglerayError):
            raise one
        yield one


def _checked(config: JobConfig, prepared: Prepared, unusable: Callable[[int, Sequence[BadRow]], None]) -> Prepared:
    if prepared.bad_rows:
        unusable(prepared.bad_rows, prepared.bad)
    kept = 1 if config.streaming else prepared.train.rows  # of a stream, nobody knows yet
    ensure_usable(config, "rows", kept, prepared.raw_rows, prepared.bad_rows, prepared.long_rows, prepared.bad)
    ensure_held_out(config, prepared.held_out.rows)
    return prepared
