"""Rows from all over a dataset, enough to tell what they are good for without reading all of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from actors.errors import DataError
from actors.formats.base import FormatSpec
from actors.reading import BadRow, Piece, SourceFile, SourceSpec, cut, read
from orchestrator.dataset_files import hub_spec, local_files
from orchestrator.schema import DatasetConfig

LOOKED_AT = 500  # rows
PIECES = 20  # parts of the data that they are taken from, where there are more rows
PIECE_BYTES, PIECE_ROWS = 2**18, 500
FARTHEST = 50  # rows passed over for one that is taken: parts of columnar files may be long
MOST = 0.9  # share of rows that a method must be able to use; the job leaves the others out


@dataclass(frozen=True)
class Sample:
    """Rows of the data, and what there is of it."""

    rows: tuple[Mapping[str, Any], ...]
    bad: tuple[BadRow, ...]  # lines that are no rows
    total: int  # rows of the whole data
    columns: tuple[str, ...]  # that at least one row has
    places: tuple[str, ...]  # of the rows

    def have(self, names: Sequence[str]) -> bool:
        """Whether most rows have something in each of these columns."""
        having = sum(all(row.get(name) is not None for name in names) for row in self.rows)
        return bool(self.rows) and having >= MOST * len(self.rows)


def take_sample(entry: DatasetConfig, search_paths: Sequence[str]) -> Sample:
    """Rows from all over a dataset. Raises DataError for data that is not there, cannot be read or is empty."""
    found = local_files(entry, search_paths)
    hub = hub_spec(entry) if found is None else None
    spec = SourceSpec(FormatSpec(), hub=hub)
    named = [(Path(entry.path), "hub")] if found is None else found
    pieces: list[Piece] = []
    for path, kind in named:
        if kind != "hub" and not path.is_file():
            raise DataError(f"datasets: there is no file {path}")
        pieces += cut(SourceFile(0, str(path), kind), spec, PIECE_BYTES, PIECE_ROWS)
    total = sum(piece.rows for piece in pieces)
    if not total:
        raise DataError(f"{entry.path} holds no rows")
    if total <= LOOKED_AT:
        return _sample(pieces, spec, total, total)
    parts = min(PIECES, len(pieces))
    return _sample([pieces[i * len(pieces) // parts] for i in range(parts)], spec, ceil(LOOKED_AT / parts), total)


def _sample(pieces: Sequence[Piece], spec: SourceSpec, each: int, total: int) -> Sample:
    rows: list[Mapping[str, Any]] = []
    places: list[str] = []
    bad: list[BadRow] = []
    for piece in pieces:
        try:
            step = max(1, min(FARTHEST, piece.rows // each))
            for place, row in islice(read(piece, spec), 0, each * step, step):
                if isinstance(row, Mapping):
                    rows.append(row)
                    places.append(place)
                else:
                    bad.append(row if isinstance(row, BadRow) else BadRow(place, f"is a {type(row).__name__}"))
        except (OSError, ValueError) as error:
            raise DataError(f"datasets: {piece.file} cannot be read: {error}") from error
    columns = tuple(dict.fromkeys(str(name) for row in rows for name in row))
    return Sample(tuple(rows), tuple(bad), total, columns, tuple(places))
