"""Rows that are prepared: what there is of them, and the manifest by which a later job finds them again."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from actors import storage
from actors.errors import DataError
from actors.preparing import BAD_ROWS_KEPT, PartStats
from actors.reading import BadRow

MANIFEST = "manifest.json"


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
    bad_rows: int  # those that are too long among them
    long_rows: int
    bad: tuple[BadRow, ...]  # BAD_ROWS_KEPT of them, those that are too long last


def write_manifest(folder: Path, prepared: Prepared) -> None:
    """Last of all, so that a folder with a manifest is whole. Names in it are relative: the folder may be moved."""
    record = asdict(prepared)
    for split in ("train", "held_out"):
        record[split]["files"] = [str(Path(file).relative_to(folder)) for file in record[split]["files"]]
        record[split]["bytes"] = [(folder / file).stat().st_size for file in record[split]["files"]]
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_json(folder / MANIFEST, record)


def read_manifest(folder: Path) -> Prepared | None:
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


def summed(parts: Sequence[PartStats]) -> Prepared:
    for part in parts:
        if part.file and not Path(part.file).is_file():
            raise DataError(
                f"datasets: a worker wrote {part.file}, which is not to be seen on this machine; "
                "name a folder that all nodes share in dataset_prepared_path"
            )
    bad = sorted((row for part in parts for row in part.bad), key=lambda row: row.too_long)  # what is wrong comes first
    return Prepared(
        train=_split([part for part in parts if not part.held_out]),
        held_out=_split([part for part in parts if part.held_out]),
        raw_rows=sum(part.raw_rows for part in parts),
        bad_rows=sum(part.bad_rows for part in parts),
        long_rows=sum(part.long_rows for part in parts),
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
