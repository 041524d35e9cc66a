"""Datasets to Arrow files of token ids on a real Ray. Expected ids come from the tokenizer directly."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import ray
from datasets import Dataset
from ray.data._internal.execution.resource_manager import ResourceManager
from transformers import AutoTokenizer

from actors import hub, preparing
from actors.errors import ConfigError, DataError
from actors.formats.base import IGNORED
from actors.reading import BadRow
from actors.streaming import Quarantine
from orchestrator import prepare as module
from orchestrator.prepare import prepare, stream
from orchestrator.prepared import Prepared, Split
from orchestrator.row_sources import format_spec
from orchestrator.schema import DatasetConfig, JobConfig

pytestmark = pytest.mark.usefixtures("cluster")

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAIR = {"prompt": "one two", "chosen": " three", "rejected": " four five"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(hub.resolve(SMOLLM2))


def job(*entries: DatasetConfig | Path | str, **changes: Any) -> JobConfig:
    """An SFT job on completions, unless an entry says otherwise."""
    datasets = [e if isinstance(e, DatasetConfig) else DatasetConfig(path=str(e), type="completion") for e in entries]
    config = JobConfig(base_model=SMOLLM2, learning_rate=1.0, datasets=datasets)
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def prepared(config: JobConfig, folder: Path, search_paths: Sequence[str] = ()) -> Prepared:
    def nobody(*_: object) -> None:
        pass

    return prepare(config, folder / "prepared", search_paths, nobody, nobody, nobody)


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def numbered(path: Path, numbers: Sequence[int]) -> Path:
    return jsonl(path, [{"text": f"row {i}"} for i in numbers])


def rows_of(split: Split) -> list[dict[str, Any]]:
    return [row for file in split.files for row in Dataset.from_file(file).to_list()]


def texts(split: Split, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows_of(split)]


def test_every_kind_of_file_gives_the_same_rows_in_their_order(tmp_path: Path, tokenizer: Any) -> None:
    words = ["one two", "three"]
    rows = [{"text": text} for text in words]
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    (tmp_path / "c.csv").write_text("text\none two\nthree\n")
    parquet.write_table(pa.table({"text": words}), tmp_path / "d.parquet")
    with pa.ipc.new_stream(str(tmp_path / "e.arrow"), pa.schema({"text": pa.string()})) as stream:
        stream.write_table(pa.table({"text": words}))
    (tmp_path / "f.txt").write_text("one two\nthree\n")
    (tmp_path / "notes.md").write_text("not data")
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in words]
    for path in (tmp_path, tmp_path / "?.*"):
        made = prepared(job(path), tmp_path)
        assert rows_of(made.train) == [{"input_ids": i, "labels": i} for i in ids] * 6
        assert made.held_out == Split()
    assert (made.raw_rows, made.bad_rows, made.bad) == (12, 0, ())
    assert (made.train.rows, made.train.documents, made.train.longest) == (12, 12, 3)
    assert (made.train.tokens, made.train.trained_tokens) == (6 * 5, 6 * 3)


def test_two_datasets_of_two_types_follow_each_other(tmp_path: Path, tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    chat = jsonl(tmp_path / "b.jsonl", [{"messages": messages}])
    text = numbered(tmp_path / "a.jsonl", [0])
    first, second = rows_of(
        prepared(job(DatasetConfig(path="b.jsonl", type="chat_template"), text), tmp_path, [str(tmp_path)]).train
    )
    assert chat.is_file()
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert first["input_ids"] == whole
    assert tokenizer.decode([i for i in first["labels"] if i != IGNORED]) == "two<|im_end|>"
    assert second["input_ids"] == tokenizer("row 0")["input_ids"] + [tokenizer.eos_token_id]


def test_methods_have_their_own_columns(tmp_path: Path, tokenizer: Any) -> None:
    pairs = jsonl(tmp_path / "a.jsonl", [PAIR])
    prompt, chosen, rejected = (tokenizer(PAIR[name])["input_ids"] for name in ("prompt", "chosen", "rejected"))
    eos = [tokenizer.eos_token_id]
    for rl in ("dpo", "ipo", "orpo"):
        made = prepared(job(DatasetConfig(path=str(pairs)), rl=rl, sample_packing=True), tmp_path)
        assert rows_of(made.train) == [{"prompt_ids": prompt, "chosen_ids": chosen + eos, "rejected_ids": rejected + eos}]
    judged = jsonl(
        tmp_path / "b.jsonl", [{"prompt": "one two", "completion": " three", "label": liked} for liked in (True, False)]
    )
    entry = DatasetConfig(path=str(judged), type={"field_prompt": "prompt", "field_completion": "completion"})
    expected = {"prompt_ids": prompt, "completion_ids": chosen + eos}
    assert rows_of(prepared(job(entry, rl="kto"), tmp_path).train) == [expected | {"label": True}, expected | {"label": False}]
    compared = jsonl(tmp_path / "c.jsonl", [{"input": "one", "chosen": "two", "rejected": "three"}])
    entry = DatasetConfig(path=str(compared), type="bradley_terry.chat_template")
    (row,) = rows_of(prepared(job(entry, reward_model=True), tmp_path).train)
    assert tokenizer.decode(row["prompt_ids"] + row["chosen_ids"]).endswith(
        "one<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
    )


def test_the_result_does_not_depend_on_how_files_are_cut(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered(tmp_path / "a.jsonl", range(60))
    parquet.write_table(pa.table({"text": [f"row {i}" for i in range(60, 90)]}), tmp_path / "b.parquet", row_group_size=4)
    config = job(tmp_path, val_set_size=0.2)
    whole = prepared(config, tmp_path / "whole")
    monkeypatch.setattr(module, "PIECE_BYTES", 50)
    monkeypatch.setattr(module, "PIECE_ROWS", 4)
    monkeypatch.setattr(module, "BLOCK_BYTES", 400)  # several tasks, of several pieces each
    cut = prepared(config, tmp_path / "cut")
    assert len(whole.train.files) == 2
    assert len(cut.train.files) > 20
    assert rows_of(cut.train) == rows_of(whole.train)
    assert rows_of(cut.held_out) == rows_of(whole.held_out)
    assert len(rows_of(cut.held_out)) == 18


def test_held_out_rows_are_exactly_those_not_trained(tmp_path: Path, tokenizer: Any) -> None:
    numbered(tmp_path / "a.jsonl", range(7))
    numbered(tmp_path / "b.jsonl", range(7, 20))
    everything = [f"row {i}" for i in range(20)]
    seen = []
    for size, count, seed in ((0.25, 5, 1), (0.25, 5, 1), (5, 5, 2)):
        made = prepared(job(tmp_path, val_set_size=size, seed=seed), tmp_path)
        held_out, train = texts(made.held_out, tokenizer), texts(made.train, tokenizer)
        assert (len(held_out), made.held_out.rows, made.train.rows) == (count, count, 20 - count)
        assert train == [text for text in everything if text not in held_out]
        assert held_out == [text for text in everything if text in held_out]
        seen.append(held_out)
    assert seen[0] == seen[1] != seen[2]
    with pytest.raises(DataError, match="val_set_size: 20 of 20 rows leaves no rows"):
        prepared(job(tmp_path, val_set_size=20), tmp_path)


def test_test_datasets_are_held_out_and_not_trained(tmp_path: Path, tokenizer: Any) -> None:
    config = job(numbered(tmp_path / "a.jsonl", [1, 2]))
    config.test_datasets = [DatasetConfig(path=str(numbered(tmp_path / "b.jsonl", [3])), type="completion")]
    made = prepared(config, tmp_path)
    assert texts(made.train, tokenizer) == ["row 1", "row 2"]
    assert texts(made.held_out, tokenizer) == ["row 3"]
    jsonl(tmp_path / "b.jsonl", [])
    with pytest.raises(DataError, match="test_datasets: no row"):
        prepared(config, tmp_path)


def test_packed_rows_hold_all_documents_and_end_within_sequence_len(tmp_path: Path, tokenizer: Any) -> None:
    numbered(tmp_path / "a.jsonl", range(10))  # 4 tokens each: row, space, digit, EOS
    made = prepared(job(tmp_path, sample_packing=True, sequence_len=13, val_set_size=1), tmp_path)
    assert [row["seq_lengths"] for row in rows_of(made.train)] == [[4, 4, 4]] * 3
    assert (made.train.rows, made.train.documents, made.train.tokens, made.train.longest) == (3, 9, 36, 12)
    (held_out,) = rows_of(made.held_out)
    assert held_out["seq_lengths"] == [4]
    unpacked = prepared(job(tmp_path, sample_packing=True, eval_sample_packing=False, val_set_size=1), tmp_path)
    assert set(rows_of(unpacked.held_out)[0]) == {"input_ids", "labels"}


def test_bad_rows_are_named_and_counted(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 20)
    file = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, "", '{"text": ', {"texts": "x"}, {"text": "two"}, [1]])
    with pytest.raises(DataError) as error:
        prepared(job(file), tmp_path)
    assert str(error.value).startswith(f"3 of 5 rows cannot be used; the first: {file}:3: is not JSON (")
    assert "ray.max_bad_rows" in str(error.value)
    config = job(file)
    config.ray.max_bad_rows = 0.6
    made = prepared(config, tmp_path)
    assert texts(made.train, tokenizer) == ["one", "two"]
    assert [row.place for row in made.bad] == [f"{file}:3", f"{file}:4", f"{file}:6"]
    assert made.bad[1:] == (
        BadRow(f"{file}:4", "has no `text`; its fields are texts"),
        BadRow(f"{file}:6", "is a list, not an object with fields"),
    )
    assert (made.bad_rows, made.raw_rows) == (3, 5)


def test_long_rows_are_left_out_or_cut_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    rows = [{"instruction": "one", "output": "two"}, {"instruction": "one " * 100, "output": "two"}]
    file = jsonl(tmp_path / "a.jsonl", [*rows, {"instruction": "one", "output": "two " * 100}])
    config = job(DatasetConfig(path=str(file), type="alpaca"), sequence_len=60)
    made = prepared(config, tmp_path)
    assert (made.train.rows, made.bad_rows, made.long_rows) == (1, 2, 2)
    config.sequence_len = 1000
    whole = rows_of(prepared(config, tmp_path).train)
    config.sequence_len, config.excess_length_strategy = 60, "truncate"
    made = prepared(config, tmp_path)
    cut = {name: ids[:60] for name, ids in whole[2].items()}
    assert rows_of(made.train) == [whole[0], cut], "of the second one no token is left to train"
    assert (made.bad_rows, made.long_rows, len(whole[2]["input_ids"]) > 60) == (1, 1, True)
    file = jsonl(tmp_path / "a.jsonl", [{"instruction": "one", "output": "two"}])
    config = job(DatasetConfig(path=str(file), type="alpaca"), sequence_len=20)
    with pytest.raises(DataError, match=rf"no rows in {file}; the first: {file}:1: has \d+ tokens; sequence_len is 20"):
        prepared(config, tmp_path)
    with pytest.raises(DataError, match=f"no rows in {tmp_path}/b.jsonl"):
        prepared(job(jsonl(tmp_path / "b.jsonl", [])), tmp_path)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*missing\.jsonl"):
        prepared(job(tmp_path / "missing.jsonl"), tmp_path)
    numbered(tmp_path / "a.jsonl", [1])
    with pytest.raises(DataError, match=r"there is no file .*b\.jsonl"):
        prepared(job(DatasetConfig(path=str(tmp_path), type="completion", data_files=["b.jsonl"])), tmp_path)
    (tmp_path / "c.parquet").write_text("no")
    with pytest.raises(DataError, match=r"c\.parquet cannot be read"):
        prepared(job(tmp_path / "c.parquet"), tmp_path)
    with pytest.raises(DataError, match="nobody/nothing is no local file and the hub did not give it"):
        prepared(job("nobody/nothing"), tmp_path)


def test_rows_end_with_the_token_that_the_job_names(tmp_path: Path, tokenizer: Any) -> None:
    end = "<|endoftext|>"
    assert tokenizer.eos_token != end
    file = numbered(tmp_path / "a.jsonl", [1])
    config = job(file, special_tokens={"eos_token": end, "pad_token": "<|im_end|>"})
    module.check(config, [])
    (row,) = rows_of(prepared(config, tmp_path).train)
    assert row["input_ids"] == tokenizer("row 1")["input_ids"] + [tokenizer.convert_tokens_to_ids(end)]
    with pytest.raises(ConfigError, match="special_tokens.eos_token: <|no|> is no token of HuggingFaceTB"):
        module.check(job(file, special_tokens={"eos_token": "<|no|>"}), [])


def test_types_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", ["no JSON"])
    for name, message in (
        ("my_rows.shape", "my_rows.shape is a function of your own, which only rl: grpo takes"),
        ("alpaca_chat.load_qq", "did you mean|there is no type: alpaca_chat.load_qq"),
        ("alpacca", "there is no type: alpacca"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepared(job(DatasetConfig(path=str(file), type=name)), tmp_path)


def test_prepared_rows_are_used_again_while_nothing_changed(tmp_path: Path, tokenizer: Any) -> None:
    file = numbered(tmp_path / "a.jsonl", range(5))
    notes: list[str] = []
    seen: list[tuple[int, int]] = []

    def again(**changes: Any) -> Prepared:
        return prepare(
            job(file, **{"dataset_prepared_path": str(tmp_path / "kept"), "val_set_size": 1} | changes),
            tmp_path,
            [],
            notes.append,
            lambda done, total: seen.append((done, total)),
            lambda count, bad: None,
        )

    first = again()
    assert notes == [] and seen[-1] == (first.raw_rows, first.raw_rows)
    assert all(Path(name).is_relative_to(tmp_path / "kept") for name in first.train.files)
    assert again() == first
    assert len(notes) == 1 and "used again" in notes[0]
    for changes in (
        {"sequence_len": 100},
        {"sample_packing": True},
        {"chat_template": "chatml"},
        {"train_on_inputs": True},
        {"seed": 1},
        {"val_set_size": 2},
    ):
        again(**changes)
        assert len(notes) == 1, changes
    assert len(list((tmp_path / "kept").iterdir())) == 7

    Path(first.train.files[0]).write_bytes(b"cut short")
    assert rows_of(again().train) == [{"input_ids": i, "labels": i} for i in _ids(first, tokenizer)]
    assert len(notes) == 1
    numbered(file, range(6))
    assert again().raw_rows == 6
    assert len(notes) == 1


def _ids(made: Prepared, tokenizer: Any) -> list[list[int]]:
    (held_out,) = texts(made.held_out, tokenizer)
    return [tokenizer(f"row {i}")["input_ids"] + [tokenizer.eos_token_id] for i in range(5) if f"row {i}" != held_out]


def test_rows_prepared_before_are_held_to_the_limit_of_bad_rows_too(tmp_path: Path) -> None:
    config = job(jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {}]), dataset_prepared_path=str(tmp_path / "kept"))
    for _ in range(2):
        with pytest.raises(DataError, match="1 of 2 rows"):
            prepared(config, tmp_path)
    config.ray.max_bad_rows = 0.5
    made = prepared(config, tmp_path)
    assert made.bad == (BadRow(f"{tmp_path}/a.jsonl:2", "has no `text`; its fields are none"),)


def test_another_template_of_the_tokenizer_is_another_result(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text("{}")
    rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}]
    entry = DatasetConfig(path=str(jsonl(tmp_path / "a.jsonl", rows)), type="chat_template")
    config = job(entry, base_model=str(folder), dataset_prepared_path=str(tmp_path / "kept"))
    (before,) = rows_of(prepared(config, tmp_path).train)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("trained by Hugging Face", "trained by nobody"))
    (after,) = rows_of(prepared(config, tmp_path).train)
    assert "nobody" in tokenizer.decode(after["input_ids"]) and "nobody" not in tokenizer.decode(before["input_ids"])


def test_the_entrys_template_wins_over_the_jobs(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0] }}")
    config = job(chat_template="chatml", chat_template_jinja="{{ job }}", train_on_inputs=True, eot_tokens=["<eot>"])

    def templates(**keys: Any) -> tuple[str | None, str | None]:
        spec = format_spec(config, DatasetConfig(path="p", **keys))
        return spec.chat_template, spec.chat_template_jinja

    assert templates() == ("chatml", "{{ job }}")
    assert templates(chat_template="llama3") == ("llama3", "{{ job }}")
    assert templates(chat_template="jinja") == ("jinja", "{{ job }}")
    assert templates(chat_template_jinja=str(tmp_path / "own.jinja")) == ("jinja", "{{ messages[0] }}")
    spec = format_spec(config, DatasetConfig(path="p", type="chat_template", field_messages="said", roles_to_train=["user"]))
    assert (spec.type, spec.field_messages, spec.roles_to_train) == ("chat_template", "said", ("user",))
    assert (spec.train_on_inputs, spec.eot_tokens) == (True, ("<eot>",))


def test_parts_appear_whole_and_nothing_else_is_left(tmp_path: Path) -> None:
    made = prepared(job(numbered(tmp_path / "a.jsonl", range(3)), val_set_size=1), tmp_path)
    left = sorted(os.path.relpath(file, tmp_path / "prepared") for file in (tmp_path / "prepared").rglob("*") if file.is_file())
    assert left == ["held_out/part-00000000.arrow", "train/part-00000000.arrow"]
    assert [*made.held_out.files, *made.train.files] == [str(tmp_path / "prepared" / name) for name in left]


def test_a_stream_gives_rows_before_it_is_read(tmp_path: Path, tokenizer: Any) -> None:
    """The rows are those that would be prepared, in their order; the first one comes long before the last is read."""
    count = 60_000
    rows = jsonl(tmp_path / "a.jsonl", [{"text": f"row {i} " * 20} for i in range(count)])
    config = job(DatasetConfig(path=str(rows), type="completion"), streaming=True, max_steps=5)
    quarantine = ray.remote(num_cpus=0)(Quarantine).remote()

    @ray.remote(num_cpus=0)
    def first_batch() -> tuple[list[dict[str, Any]], int, int, int, str | None]:
        """In a worker, as in a job: Ray ends a process in which Ray Data's threads still drop objects when it shuts down."""
        batches = iter(stream(config, [], quarantine, readers=1).iter_batches(batch_size=2, batch_format="pyarrow"))
        return next(batches).to_pylist(), *ray.get(quarantine.so_far.remote())

    first, read, bad, long, error = ray.get(first_batch.remote())
    assert read < count / 2 and (bad, long, error) == (0, 0, None)
    expected = tokenizer("row 0 " * 20)["input_ids"] + [tokenizer.eos_token_id]
    assert first[0] == {"input_ids": expected, "labels": expected}
    assert tokenizer.decode(first[1]["input_ids"]).startswith("row 1 ")


def test_ray_data_is_told_to_look_at_the_cluster_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResourceManager, "GLOBAL_LIMITS_UPDATE_INTERVAL_S", 1.0)  # and put back afterwards
    assert sorted(preparing.conduct(list, ["ab", "c"], 2)) == ["a", "b", "c"]
    assert ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S == preparing.LIMITS_EVERY_S < 1
