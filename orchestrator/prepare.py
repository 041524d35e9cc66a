"""The rows of a dataset job as token ids on disk: what is read, which rows are held out, what came of it.

Ray Data's workers do the work (actors/preparing.py); the driver sees pieces and counts, no tokens. Another key that
changes a row is a field of FormatSpec and a line of format_spec; one that changes the result otherwise goes into _digest.
"""

import json
import logging
import pickle
import random
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from statistics import mean
from typing import Any

import ray
import ray.data

from actors import hub, snapshot, storage, streaming
from actors.errors import DataError, EaglerayError
from actors.formats.base import FormatSpec
from actors.formats.templates import OWN, template_of
from actors.model import load_tokenizer
from actors.preparing import (
    BAD_ROWS_KEPT,
    BUILDERS,
    PartStats,
    PrepareSpec,
    RowEncoder,
    conduct,
    cut_file,
    ensure_type,
    prepare_piece,
    sequences,
)
from actors.reading import BadRow, Piece, SourceFile, SourceSpec, cut, read
from actors.specs import ModelSpec
from orchestrator import waits
from orchestrator.data import ensure_usable, held_out_count, hub_spec, local_files
from orchestrator.jobs import special_tokens
from orchestrator.schema import DatasetConfig, JobConfig
from orchestrator.source import Problem

FORMAT_VERSION = 1  # of prepared rows; raise it when the same files would give other ones

PIECE_BYTES = 4 * 2**20  # about a million tokens: a second or two of work
PIECE_ROWS = 5000  # of files that are cut by rows
BLOCKS = 1000  # tasks of Ray Data at most; with more pieces than this, each takes several
STREAM_BLOCK_BYTES = 2**16  # of a stream: small, so that the first one comes soon
BLOCK_BYTES = 2**20  # of files a task at least: a worker process takes longer to start than to encode less
TIMEOUT_S = 24 * 3600
SAMPLED, SAMPLED_BYTES = 64, 2**18  # rows, and bytes, of a file of which the plan learns how long rows are

MANIFEST = "manifest.json"
# What a tokenizer is read from, in the folder of its model.
TOKENIZER_FILES = ("tokenizer*", "*token*.json", "vocab*", "merges.txt", "*.model", "*chat_template*", "*.py")


@dataclass(frozen=True)
class Split:
    """Prepared rows that are trained, or that are held out."""

    files: tuple[str, ...] = ()  # Arrow files, absolute, in the order of their rows
    rows: int = 0
    documents: int = 0  # as many as rows, unless they are packed
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0  # tokens of the longest row


@dataclass(frozen=True)
class Prepared:
    """The datasets of a job as token ids, and the rows that are not among them."""

    train: Split
    held_out: Split
    raw_rows: int  # read, bad ones included
    bad_rows: int
    bad: tuple[BadRow, ...]  # the first BAD_ROWS_KEPT of them

    @property
    def bad_share(self) -> float:
        return self.bad_rows / self.raw_rows if self.raw_rows else 0.0


def prepare(
    config: JobConfig,
    folder: Path,
    search_paths: Sequence[str],
    note: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Prepared:
    """Reads and encodes `datasets` and `test_datasets` into Arrow files. Needs a connected Ray.

    progress: told how many rows of how many are done.
    They lie in `folder`, or under dataset_prepared_path, where they are found again. Raises ConfigError for a type that
    the method does not have, DataError for a missing file, no rows, or too many bad ones.
    """
    spec, files = _what_to_read(config, search_paths)
    tokenizer = _ensure_types(spec)
    if config.streaming:
        files = [file for file in files if spec.sources[file.source].held_out]
    if config.dataset_prepared_path is None:
        return _checked(config, _prepared(config, spec, files, folder.absolute(), tokenizer, progress))
    folder = Path(config.dataset_prepared_path).expanduser().absolute() / _digest(config, spec, files)
    ready = _read_manifest(folder)
    if ready is not None:
        note(f"datasets: the rows in {folder} were prepared before, and are used again")
        return _checked(config, ready)
    prepared = _prepared(config, spec, files, folder, tokenizer, progress)
    _write_manifest(folder, prepared)
    return _checked(config, prepared)


def stream(config: JobConfig, search_paths: Sequence[str], quarantine: Any, readers: int) -> ray.data.Dataset:
    """The rows of `datasets`, encoded by so many tasks while they are trained on. Starts nothing yet.

    quarantine: handle of an actors.streaming.Quarantine.
    """
    spec, files = _what_to_read(config, search_paths)
    tokenizer = _for_workers(spec, _ensure_types(spec))
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
    spec, _ = _what_to_read(config, search_paths)
    _ensure_types(spec)
    if not spec.special_tokens:
        return
    known = _tokenizer(config.base_model, config.trust_remote_code).get_vocab()
    text = f"is no token of {config.base_model}, and new tokens are not implemented yet; name one that it has"
    unknown = [(name, token) for name, token in spec.special_tokens if token not in known]
    config.source.raise_if_any(Problem(f"special_tokens.{name}", f"{token} {text}") for name, token in unknown)


def tokens_of_a_row(config: JobConfig, search_paths: Sequence[str]) -> float | None:
    """On average, all its sequences together, of the first SAMPLED rows of each local file; None when none can be used.

    Starts nothing. Raises as `check` does.
    """
    spec, files = _what_to_read(config, search_paths)
    tokenizer = _ensure_types(spec)
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


def fingerprint(config: JobConfig, search_paths: Sequence[str]) -> str:
    """Digest of what the rows are made of: how they are read and written, and the files' sizes. A resumed run compares it."""
    spec, files = _what_to_read(config, search_paths)
    content = {
        "spec": asdict(replace(spec, tokenizer="")),
        "files": [[file.path, file.kind, None if file.kind == "hub" else Path(file.path).stat().st_size] for file in files],
        "held_out": [config.val_set_size, config.seed],
    }
    return snapshot.digest(json.dumps(content, sort_keys=True).encode())


def chat_template_text(config: JobConfig) -> str | None:
    """The template that the first dataset's rows are written with; None when it is the tokenizer's own."""
    spec = format_spec(config, (config.datasets or [])[0])
    if spec.chat_template in (None, OWN):
        return None
    return template_of(spec, _tokenizer(config.base_model, config.trust_remote_code, special_tokens(config)))


def format_spec(config: JobConfig, entry: DatasetConfig) -> FormatSpec:
    """How rows of an entry become tokens. The entry's chat template wins over the job's."""
    own = {f.name: _frozen(getattr(entry, f.name)) for f in fields(FormatSpec) if hasattr(entry, f.name)}
    return FormatSpec(
        **own
        | {
            "chat_template": entry.chat_template or ("jinja" if entry.chat_template_jinja else config.chat_template),
            "chat_template_jinja": _text(entry.chat_template_jinja or config.chat_template_jinja),
            "train_on_inputs": config.train_on_inputs,
            "eot_tokens": tuple(config.eot_tokens or ()),
        }
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _text(template: str | None) -> str | None:
    """A template given as a file, read here: workers may be on machines that lack it."""
    if template and "{" not in template and Path(template).is_file():
        return Path(template).read_text(encoding="utf-8")
    return template


# What to read, and whether it was prepared before.


def _what_to_read(config: JobConfig, search_paths: Sequence[str]) -> tuple[PrepareSpec, list[SourceFile]]:
    sources: list[SourceSpec] = []
    files: list[SourceFile] = []
    for entries, held_out in ((config.datasets, False), (config.test_datasets, True)):
        for entry in entries or []:
            found = local_files(entry, search_paths)
            for file, _ in found or []:
                if not file.is_file():
                    raise DataError(f"datasets: there is no file {file}")
            hub_dataset = hub_spec(entry, config.streaming and not held_out) if found is None else None
            source = SourceSpec(format_spec(config, entry), held_out, hub_dataset)
            named = [(entry.path, "hub")] if found is None else [(str(file.absolute()), kind) for file, kind in found]
            files += [SourceFile(len(sources), path, kind) for path, kind in named]
            sources.append(source)
    method = "reward_trainer" if config.reward_model else config.rl or "sft"
    packing = config.sample_packing and method == "sft"
    spec = PrepareSpec(
        method=method,
        sources=tuple(sources),
        tokenizer=config.base_model,
        trust_remote_code=config.trust_remote_code,
        special_tokens=special_tokens(config),
        sequence_len=config.sequence_len,
        packing=packing,
        eval_packing=packing and config.eval_sample_packing is not False,
        tokenizer_digest=_tokenizer_digest(config),
    )
    return spec, files


def _ensure_types(spec: PrepareSpec) -> Any:
    """The tokenizer. Raises ConfigError for a type that the method does not have, before anything is read."""
    tokenizer = _tokenizer(spec.tokenizer, spec.trust_remote_code, spec.special_tokens)
    for source in spec.sources:
        ensure_type(spec.method, source.format)
        BUILDERS[spec.method](source.format, tokenizer)
    return tokenizer


def _tokenizer(model: str, trust_remote_code: bool, special_tokens: tuple[tuple[str, str], ...] = ()) -> Any:
    return load_tokenizer(ModelSpec(model, "float32", trust_remote_code, special_tokens=special_tokens))


def _digest(config: JobConfig, spec: PrepareSpec, files: Iterable[SourceFile]) -> str:
    """Of everything that changes the result. A hub dataset that changes without its revision goes unseen."""
    stats = [(file, file.kind != "hub" and Path(file.path).stat()) for file in files]
    content = {
        "version": FORMAT_VERSION,
        "spec": asdict(replace(spec, tokenizer="")),
        "files": [[asdict(file), stat and [stat.st_size, stat.st_mtime_ns]] for file, stat in stats],
        "held_out": [config.val_set_size, config.seed if config.val_set_size else None],
    }
    return snapshot.digest(json.dumps(content, sort_keys=True).encode())


def _tokenizer_digest(config: JobConfig) -> str:
    folder = Path(hub.resolve(config.base_model))
    files = {file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()}
    return snapshot.digest("".join(file.name + snapshot.digest(file.read_bytes()) for file in sorted(files)).encode())


def _write_manifest(folder: Path, prepared: Prepared) -> None:
    """Last of all, so that a folder with a manifest is whole. Names in it are relative: the folder may be moved."""
    record = asdict(prepared)
    for split in ("train", "held_out"):
        record[split]["files"] = [str(Path(file).relative_to(folder)) for file in record[split]["files"]]
        record[split]["bytes"] = [(folder / file).stat().st_size for file in record[split]["files"]]
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / MANIFEST, record)


def _read_manifest(folder: Path) -> Prepared | None:
    """What the folder holds; None unless every file that its manifest names is there, in full."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for split in ("train", "held_out"):
            files = [folder / file for file in record[split].pop("files")]
            if [file.stat().st_size for file in files] != record[split].pop("bytes"):
                return None
            record[split] = Split(files=tuple(map(str, files)), **record[split])
        record["bad"] = tuple(BadRow(**row) for row in record["bad"])
        return Prepared(**record)
    except (OSError, ValueError, KeyError, TypeError):
        return None


# The work.


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
    return _summed(sorted(parts, key=lambda part: part.key))


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


def _summed(parts: Sequence[PartStats]) -> Prepared:
    for part in parts:
        if part.file and not Path(part.file).is_file():
            raise DataError(
                f"datasets: a worker wrote {part.file}, which is not to be seen on this machine; "
                "name a folder that all nodes share in dataset_prepared_path"
            )
    bad = [row for part in parts for row in part.bad]
    return Prepared(
        train=_split([part for part in parts if not part.held_out]),
        held_out=_split([part for part in parts if part.held_out]),
        raw_rows=sum(part.raw_rows for part in parts),
        bad_rows=sum(part.bad_rows for part in parts),
        bad=tuple(bad[:BAD_ROWS_KEPT]),
    )


def _split(parts: Sequence[PartStats]) -> Split:
    return Split(
        files=tuple(part.file for part in parts if part.file),
        rows=sum(part.rows for part in parts),
        documents=sum(part.documents for part in parts),
        tokens=sum(part.tokens for part in parts),
        trained_tokens=sum(part.trained_tokens for part in parts),
        longest=max((part.longest for part in parts), default=0),
    )


def _checked(config: JobConfig, prepared: Prepared) -> Prepared:
    kept = 1 if config.streaming else prepared.train.rows  # of a stream, nobody knows yet
    ensure_usable(config, "rows", kept, prepared.raw_rows, prepared.bad_rows, prepared.bad)
    asked = "test_datasets" if config.test_datasets else "val_set_size"
    if (config.test_datasets or config.val_set_size) and not prepared.held_out.rows:
        raise DataError(f"{asked}: no row that can be used is left to evaluate on")
    return prepared
