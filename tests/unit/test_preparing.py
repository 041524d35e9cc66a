"""Files in pieces, rows to ids, packing: what the workers of the data preparation do, without a cluster."""

import json
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from datasets import Dataset
from ray.data._internal.execution.interfaces import ExecutionOptions, ExecutionResources
from ray.data._internal.execution.resource_manager import ResourceManager
from transformers import AutoTokenizer

from actors import hub, preparing
from actors.errors import ConfigError, DataError
from actors.formats.base import IGNORED, FormatSpec
from actors.preparing import PrepareSpec, RowEncoder, cut_document, cut_file, pack, packed, prepare_piece
from actors.reading import BadRow, Piece, SourceFile, SourceSpec, cut, read
from actors.streaming import Quarantine
from orchestrator.prepared import summed

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCE = SourceSpec(FormatSpec(type="alpaca"))
LONG = BadRow("f:1", "has 6 tokens; sequence_len is 5", too_long=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2))


def pieces_of(file: Path, kind: str, piece_bytes: int = 1, piece_rows: int = 1) -> list[Piece]:
    return list(cut(SourceFile(0, str(file), kind), SOURCE, piece_bytes, piece_rows))


def rows_of(pieces: list[Piece]) -> list[tuple[str, Any]]:
    return [row for piece in pieces for row in read(piece, SOURCE)]


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("end", [b"", b"\n"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 8, 9, 20, 10_000])
def test_each_line_is_in_one_piece_with_its_number(tmp_path: Path, newline: bytes, end: bytes, piece_bytes: int) -> None:
    lines = [b'{"a": 1}', b"", b'{"a": "' + b"x" * 50 + b'"}', b'"\xc3\xa9"', b"  ", b'{"a": 5}']
    file = tmp_path / "a.jsonl"
    file.write_bytes(newline.join(lines) + end)
    pieces = pieces_of(file, "jsonl", piece_bytes)
    assert rows_of(pieces) == [
        (f"{file}:1", {"a": 1}),
        (f"{file}:3", {"a": "x" * 50}),
        (f"{file}:4", "é"),
        (f"{file}:6", {"a": 5}),
    ]
    assert [piece.rows for piece in pieces] == [len(list(read(piece, SOURCE))) for piece in pieces]
    assert [piece.begin for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == file.stat().st_size
    assert (len(pieces) > 1) == (piece_bytes < 100)


@pytest.mark.parametrize(("piece_bytes", "sizes"), [(100, [8, 8]), (45, [4, 4, 4, 4]), (65, [6, 5, 5])])
def test_pieces_of_lines_are_of_one_size(tmp_path: Path, piece_bytes: int, sizes: list[int]) -> None:
    """Else the last of few pieces keeps one worker while the others wait."""
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 10}\n' * 16)
    assert [piece.rows for piece in pieces_of(file, "jsonl", piece_bytes)] == sizes


def test_a_line_that_is_no_json_is_a_bad_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n{"a": "\xff"}\n{"a": 2}\n')
    (_, first), (place, broken), (_, bytes_), (_, last) = rows_of(pieces_of(file, "jsonl"))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, BadRow) and isinstance(bytes_, BadRow)
    assert place == broken.place == f"{file}:2"
    assert broken.reason.startswith("is not JSON (")


def test_text_has_a_row_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"one\r\n\n two \xc3\xa9\n\xff")
    *good, (place, bad) = rows_of(pieces_of(file, "txt"))
    assert good == [(f"{file}:1", {"text": "one"}), (f"{file}:3", {"text": " two é"})]
    assert isinstance(bad, BadRow) and place == f"{file}:4" and "UTF-8" in bad.reason


def test_columnar_files_are_cut_between_rows(tmp_path: Path) -> None:
    table = pa.table({"a": list(range(7))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    Dataset.from_dict({"a": list(range(7))}).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    for file, kind, sizes in ((tmp_path / "a.parquet", "parquet", [4, 3]), (arrow, "arrow", [3, 3, 1])):
        pieces = pieces_of(file, kind, piece_rows=3)
        assert [piece.rows for piece in pieces] == sizes
        assert rows_of(pieces) == [(f"{file}[{i}]", {"a": i}) for i in range(7)]


def test_arrays_and_csv_are_one_piece_and_json_lines_by_another_name_are_not(tmp_path: Path) -> None:
    array, lines, table = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.csv"
    array.write_text(' \n[{"a": 1},\n {"a": 2}]')
    lines.write_text('{"a": 1}\n{"a": 2}\n')
    table.write_text('a\n"x\ny"\nz\n')
    assert [piece.rows for piece in pieces_of(array, "json")] == [2]
    assert rows_of(pieces_of(array, "json")) == [(f"{array}[0]", {"a": 1}), (f"{array}[1]", {"a": 2})]
    assert [piece.rows for piece in pieces_of(lines, "json")] == [1, 1]
    assert rows_of(pieces_of(lines, "json")) == [(f"{lines}:1", {"a": 1}), (f"{lines}:2", {"a": 2})]
    assert [piece.rows for piece in pieces_of(table, "csv")] == [2]
    assert rows_of(pieces_of(table, "csv")) == [(f"{table}:3", {"a": "x\ny"}), (f"{table}:4", {"a": "z"})]


def test_csv_fields_may_be_long(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n" + "x" * 200_000 + "\n")
    ((_, row),) = rows_of(pieces_of(tmp_path / "a.csv", "csv"))
    assert len(row["a"]) == 200_000


def test_files_without_rows_have_no_piece_with_any(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", ""), ("a.json", "[]"), ("a.csv", "a\n"), ("b.json", "")):
        (tmp_path / name).write_text(content)
        assert rows_of(pieces_of(tmp_path / name, name[2:])) == []


@pytest.mark.parametrize(("name", "content"), [("a.json", "[1,"), ("a.parquet", "no"), ("a.jsonl", None)])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: str | None) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{tmp_path}/{name} cannot be read"):
        pieces_of(tmp_path / name, name[2:])


def test_packing_keeps_every_document_whole_and_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 41, 500).tolist()
    bins = pack(lengths, 100)
    assert sorted(i for documents in bins for i in documents) == list(range(500))
    assert max(sum(lengths[i] for i in documents) for documents in bins) <= 100
    assert len(bins) <= -(-sum(lengths) // 100) * 1.02
    assert all(documents == sorted(documents) for documents in bins) and bins == sorted(bins)


def test_packing_is_tight_where_it_can_be() -> None:
    assert pack([3, 6, 4, 5, 2], 10) == [[0, 3, 4], [1, 2]]
    assert pack([10, 10], 10) == [[0], [1]]


def test_packed_rows_are_their_documents_one_after_the_other() -> None:
    rows = [{"input_ids": np.arange(n, n + n), "labels": -np.arange(n, n + n)} for n in (3, 6, 4, 5, 2)]
    first, second = packed(rows, 10)
    assert first["input_ids"].tolist() == [3, 4, 5, 5, 6, 7, 8, 9, 2, 3]
    assert first["labels"].tolist() == [-3, -4, -5, -5, -6, -7, -8, -9, -2, -3]
    assert first["seq_lengths"].tolist() == [3, 5, 2]
    assert second["seq_lengths"].tolist() == [6, 4]


def test_trl_takes_packed_rows_as_they_are() -> None:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": np.array(ids), "labels": np.array(ids)} for ids in ([1, 2, 3], [4, 5])]
    (row,) = packed(rows, 8)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([{k: v.tolist() for k, v in row.items()}])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 2, 3, IGNORED, 5]]  # no document's start is learned from the one before


@pytest.mark.parametrize(
    ("length", "pieces"), [(1, [1]), (4, [4]), (5, [4]), (6, [4, 2]), (8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2])]
)
def test_a_document_is_cut_at_sequence_len(length: int, pieces: list[int]) -> None:
    row = {"input_ids": np.arange(length), "labels": np.arange(length)}
    made = cut_document(row, 4)
    assert [len(piece["input_ids"]) for piece in made] == pieces
    joined = np.concatenate([piece["labels"] for piece in made]).tolist()
    assert joined == list(range(sum(pieces)))


def encoder(tokenizer: Any, method: str, sequence_len: int, **keys: Any) -> RowEncoder:
    source = SourceSpec(FormatSpec(**keys))
    return RowEncoder(PrepareSpec(method, (source,), SMOLLM2, sequence_len), source, tokenizer)


def test_long_completions_are_cut_and_other_long_rows_are_bad(tokenizer: Any) -> None:
    ids = tokenizer("one two three four five")["input_ids"] + [tokenizer.eos_token_id]
    assert len(ids) == 6
    rows = encoder(tokenizer, "sft", 4, type="completion").rows("f:1", {"text": "one two three four five"})
    assert isinstance(rows, list)
    assert [row["input_ids"].tolist() for row in rows] == [ids[:4], ids[4:]]
    mapping = {"field_instruction": "q", "field_output": "a", "format": "{instruction}", "no_input_format": "{instruction}"}
    row = {"q": "one two three", "a": " four five"}
    fits = encoder(tokenizer, "sft", 6, type=mapping).rows("f:1", row)
    assert isinstance(fits, list) and fits[0]["input_ids"].tolist() == ids
    assert fits[0]["labels"].tolist() == [IGNORED] * 3 + ids[3:]
    assert encoder(tokenizer, "sft", 5, type=mapping).rows("f:1", row) == LONG


def test_a_pair_is_as_long_as_its_longer_side(tokenizer: Any) -> None:
    row = {"prompt": "one two", "chosen": " three", "rejected": " three four five"}
    made = encoder(tokenizer, "dpo", 6).rows("f:1", row)  # 2 of the prompt, 3 of the answer, EOS
    assert isinstance(made, list)
    assert preparing.sequences(made[0]) == [4, 6]
    assert preparing.trained_tokens(made[0]) == 2 + 4
    assert encoder(tokenizer, "dpo", 5).rows("f:1", row) == LONG


def test_rows_that_cannot_be_used_say_why(tokenizer: Any) -> None:
    alpaca = encoder(tokenizer, "sft", 100, type="alpaca")
    assert alpaca.rows("f:1", [1]) == BadRow("f:1", "is a list, not an object with fields")
    assert alpaca.rows("f:2", {"instruction": "x"}) == BadRow("f:2", "has no `output`; its fields are instruction")
    assert alpaca.rows("f:3", BadRow("f:3", "is not JSON")) == BadRow("f:3", "is not JSON")
    surrogate = alpaca.rows("f:4", {"instruction": "x", "output": "\ud800"})
    assert isinstance(surrogate, BadRow) and surrogate.reason.startswith("cannot be encoded (")
    eos_alone = encoder(tokenizer, "sft", 100, type="completion").rows("f:5", {"text": tokenizer.eos_token})
    assert eos_alone == BadRow("f:5", "has no token to train")


def test_what_is_wrong_is_not_crowded_out_by_what_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "BAD_ROWS_KEPT", 2)
    stats = preparing.PartStats("0", held_out=False)
    part = preparing.Part(tmp_path, stats, packing=False, sequence_len=5)
    for number in range(4):
        part.add(BadRow(f"f:{number}", "long", too_long=True))
    part.add(BadRow("f:9", "wrong"))
    assert (stats.bad_rows, stats.long_rows, [row.place for row in stats.bad]) == (5, 4, ["f:0", "f:1", "f:9"])
    monkeypatch.setattr("orchestrator.prepared.BAD_ROWS_KEPT", 2)
    made = summed([stats])
    assert (made.bad_rows, made.long_rows, [row.place for row in made.bad]) == (5, 4, ["f:9", "f:0"])


def test_a_stream_counts_a_piece_once_however_often_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.streaming.BAD_ROWS_KEPT", 1)
    quarantine = Quarantine()
    bad = [BadRow("f:1", "long", too_long=True), BadRow("f:2", "long", too_long=True), BadRow("f:3", "wrong")]
    for _ in range(2):
        quarantine.add(Piece(0, "f", "jsonl", 0, 100, 50), 50, bad)
    quarantine.add(Piece(0, "f", "jsonl", 100, 200, 70), 70, [])
    assert quarantine.so_far() == (120, 3, 2, None)
    assert [row.place for row in quarantine.rows()] == ["f:3", "f:1"]


@pytest.mark.parametrize("method", list(preparing.BUILDERS))
def test_every_method_refuses_a_type_it_does_not_have(tokenizer: Any, method: str) -> None:
    with pytest.raises(ConfigError):
        encoder(tokenizer, method, 100, type="nonesuch")


def test_a_part_is_written_block_by_block_and_counts(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two", "three", "", "four five six", "seven"]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(preparing, "BLOCK_TOKENS", 1)
    monkeypatch.setattr(preparing, "BLOCK_SEQUENCES", 1)  # a block is full with 5 tokens
    spec = PrepareSpec("sft", (SourceSpec(FormatSpec(type="completion")),), SMOLLM2, sequence_len=5, packing=True)
    (piece,) = cut(SourceFile(0, str(file), "jsonl"), spec.sources[0], 1000, 1000)
    piece = replace(piece, key="07", held_out=frozenset({4}))
    train, held_out = prepare_piece(piece, spec, str(tmp_path))
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    written = Dataset.from_file(train.file)
    assert Path(train.file) == tmp_path / "train" / "part-07.arrow"
    assert written["input_ids"][:] == [ids[0] + ids[1], ids[3]]
    assert written["seq_lengths"][:] == [[3, 2], [4]]
    assert Dataset.from_file(held_out.file)[:] == {"input_ids": [ids[4]], "labels": [ids[4]]}
    assert (train.raw_rows, train.rows, train.documents, train.tokens, train.trained_tokens, train.longest) == (
        4,
        2,
        3,
        9,
        6,
        5,
    )
    assert train.bad == [BadRow(f"{file}:3", "`text` is empty")]
    assert (held_out.raw_rows, held_out.rows, held_out.bad) == (1, 1, [])
    assert sorted(p.name for p in tmp_path.rglob("*part*")) == ["part-07.arrow"] * 2


def test_a_worker_prepares_without_importing_torch(tmp_path: Path, tokenizer: Any) -> None:
    """Which takes several seconds of a processor in each worker, more than most datasets."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    spec = PrepareSpec("sft", (SourceSpec(FormatSpec(type="chat_template")),), SMOLLM2, sequence_len=64)
    (piece,) = cut_file(SourceFile(0, str(file), "jsonl"), spec.sources, 1000, 1000)
    script = """
import pickle, sys
from actors.preparing import prepare_piece
prepare_piece(*pickle.load(sys.stdin.buffer))
assert "torch" not in sys.modules
"""
    arguments = (replace(piece, key="0"), spec, str(tmp_path), pickle.dumps(tokenizer))
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(arguments), check=True)
    written = Dataset.from_file(str(tmp_path / "train" / "part-0.arrow"))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert written["input_ids"][0] == tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]


def test_ray_data_looks_at_the_cluster_as_often_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first look finds no processor; `conduct` has it look again soon, and not after a second with one task."""
    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 0.0)
    manager = object.__new__(ResourceManager)
    manager._global_limits, manager._global_limits_last_update_time = ExecutionResources.zero(), time.time()
    manager._options, manager._object_store_memory_limit_fraction = ExecutionOptions(), 0.5
    manager._get_total_resources = lambda: ExecutionResources(cpu=4, object_store_memory=100)
    assert manager.get_global_limits().cpu == 4
