"""Rows of a dataset job that are read while they are trained on: `streaming: true`.

Ray Data runs `pieces` and `rows` on its workers, a bounded way ahead of the training. What reads from them is the Stream of
dataset_loop.py. Nothing here imports torch, which would take a worker longer than many rows.
"""

from collections.abc import Iterator
from typing import Any

from actors.errors import DataError, EaglerayError
from actors.preparing import BAD_ROWS_KEPT, BLOCK_SEQUENCES, PrepareSpec, column, encoder, packed, sequences
from actors.reading import BadRow, Piece, cut, read

PIECE_BYTES = 2**18  # small, so that the first rows come soon
PIECE_ROWS = 500


class Quarantine:
    """What became of the rows so far. An actor: Ray Data's workers tell it, and the driver asks."""

    def __init__(self) -> None:
        # By piece, since every epoch reads it again: rows, the bad ones among them, and those that are too long among these.
        self.counts: dict[tuple[str, int], tuple[int, int, int]] = {}
        self.wrong: dict[str, BadRow] = {}  # by place, BAD_ROWS_KEPT at most
        self.long: dict[str, BadRow] = {}  # the same
        self.error: EaglerayError | None = None

    def add(self, piece: Piece, raw_rows: int, bad: list[BadRow]) -> None:
        self.counts[piece.file, piece.begin] = (raw_rows, len(bad), sum(row.too_long for row in bad))
        for row in bad:
            kept = self.long if row.too_long else self.wrong
            if len(kept) < BAD_ROWS_KEPT:
                kept[row.place] = row

    def fail(self, error: EaglerayError) -> None:
        """A file that cannot be read at all."""
        self.error = error

    def so_far(self) -> tuple[int, int, int, EaglerayError | None]:
        """Rows read, the bad ones among them, those that are too long among these, and why there will be no more."""
        raw_rows, bad_rows, long_rows = (sum(of_piece) for of_piece in zip((0, 0, 0), *self.counts.values(), strict=True))
        return raw_rows, bad_rows, long_rows, self.error

    def rows(self) -> list[BadRow]:
        """The first bad ones, those that are too long last."""
        return [*self.wrong.values(), *self.long.values()]


def pieces(row: dict[str, Any], spec: PrepareSpec, quarantine: Any) -> Iterator[dict[str, Any]]:
    """The pieces of the SourceFile in a row of Ray Data, as such rows, in order, while they are found."""
    try:
        for piece in cut(row["item"], spec.sources[row["item"].source], PIECE_BYTES, PIECE_ROWS):
            yield {"item": piece}
    except EaglerayError as error:
        quarantine.fail.remote(error)


def rows(batch: dict[str, Any], spec: PrepareSpec, tokenizer: bytes | None, quarantine: Any) -> Iterator[Any]:
    """The pieces in a batch of Ray Data to Arrow tables of prepared rows. tokenizer: as prepare_piece takes it."""
    import pyarrow as pa

    for piece in batch["item"]:
        encode = encoder(spec, piece.source, tokenizer).rows
        raw_rows, bad, block, tokens = 0, [], [], 0
        try:
            for place, raw in read(piece, spec.sources[piece.source]):
                raw_rows += 1
                made = encode(place, raw)
                if isinstance(made, BadRow):
                    bad.append(made)
                    continue
                block += made
                tokens += sum(sum(sequences(row)) for row in made)
                if tokens >= BLOCK_SEQUENCES * spec.sequence_len:  # what packing has to choose from
                    yield _table(pa, block, spec)
                    block, tokens = [], 0
        except (OSError, ValueError) as error:
            quarantine.fail.remote(DataError(f"datasets: {piece.file}: its rows cannot be read: {error}"))
        if block:
            yield _table(pa, block, spec)
        quarantine.add.remote(piece, raw_rows, bad)


def _table(pa: Any, block: list[dict[str, Any]], spec: PrepareSpec) -> Any:
    made = packed(block, spec.sequence_len) if spec.packing else block
    return pa.table({name: column([row[name] for row in made]) for name in made[0]})
