"""Prompts: what is read, what is refused and where, and which step sees which row."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from actors.errors import DataError
from actors.reading import BadRow
from orchestrator.data import Row, ensure_usable, load_prompts, rows_of_step, without_long_prompts
from orchestrator.schema import DatasetConfig, JobConfig


def job(path: Path | str, **changes: Any) -> JobConfig:
    config = JobConfig(rl="grpo", base_model="m", learning_rate=1.0, datasets=[DatasetConfig(path=str(path))])
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_keep_prompt_columns_and_place(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 1", "answer": 2}])
    assert load_prompts(job(file), []).train == (Row("1 + 1", {"answer": 2}, f"{file}:1"),)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"prompt": "p"}\n\n{"prompt": "q"}\n'),
        ("a.json", '[{"prompt": "p"}, {"prompt": "q"}]'),
        ("a.csv", "prompt\np\nq\n"),
        ("a.txt", "p\nq\n"),
    ],
)
def test_text_formats(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert sorted(str(row.prompt) for row in load_prompts(job(tmp_path / name), []).train) == ["p", "q"]


def test_what_only_a_hub_dataset_has_is_named_when_it_is_given_for_a_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "w"}])
    config = job(file)
    assert config.datasets
    config.datasets[0].split, config.datasets[0].revision = "train", "main"
    load_prompts(config, [])
    assert [record.getMessage() for record in caplog.records] == [
        f"datasets: revision not used: {file} lies on this machine, not on the hub"
    ]


def test_parquet_folder_and_glob(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    parquet.write_table(pa.table({"prompt": ["p"]}), tmp_path / "one.parquet")
    jsonl(tmp_path / "two.jsonl", [{"prompt": "q"}])
    for path in (tmp_path, tmp_path / "*.*"):
        assert {row.prompt for row in load_prompts(job(path), []).train} == {"p", "q"}


def test_of_a_folder_the_rows_of_its_split_are_read(tmp_path: Path) -> None:
    """Told by the files' names as the datasets library tells them; with rows of the test split a job would train on them."""
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test", "my_dev_rows", "notes"):
        jsonl(folder / f"{name}.jsonl", [{"prompt": name}])

    def read(split: str | None) -> set[str]:
        config = job(folder)
        assert config.datasets
        config.datasets[0].split = split
        return {str(row.prompt) for row in load_prompts(config, []).train}

    assert read(None) == read("train") == {"train-00000-of-00002", "train-00001-of-00002"}
    assert read("test") == {"test"} and read("validation") == {"my_dev_rows"}
    (folder / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"no file in .*rows is of split test; it has my_dev_rows.jsonl, notes.jsonl, train-"):
        read("test")
    with pytest.raises(DataError, match=r"neither shared out nor put together by split: train\[:10%\]"):
        read("train[:10%]")


def test_held_out_rows_are_of_the_test_split_unless_an_entry_says_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    for name in ("train", "test", "dev"):
        jsonl(folder / f"{name}.jsonl", [{"prompt": name}])
    config = job(folder)
    config.test_datasets = [DatasetConfig(path=str(folder))]
    prompts = load_prompts(config, [])
    assert ([row.prompt for row in prompts.train], [row.prompt for row in prompts.held_out]) == (["train"], ["test"])
    config.test_datasets[0].split = "validation"
    assert [row.prompt for row in load_prompts(config, []).held_out] == ["dev"]
    (folder / "train.jsonl").unlink()
    (folder / "test.jsonl").unlink()
    config.test_datasets = None
    assert [row.prompt for row in load_prompts(config, []).train] == ["dev"], "there is one split alone"
    assert config.datasets
    config.datasets[0].split = "dev+test"
    with pytest.raises(DataError, match=r"neither shared out nor put together by split: dev\+test"):
        load_prompts(config, [])


def test_a_folder_of_save_to_disk_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {name: Dataset.from_list([{"prompt": f"{name} {i}"} for i in range(4)]) for name in ("train", "test")}
    splits["train"].save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(splits).save_to_disk(tmp_path / "both")
    for name in ("one", "both"):
        rows = load_prompts(job(tmp_path / name), []).train
        assert sorted(str(row.prompt) for row in rows) == [f"train {i}" for i in range(4)]
    config = job(tmp_path / "both")
    assert config.datasets
    config.datasets[0].split = "dev"
    with pytest.raises(DataError, match="has no split dev; it has test, train"):
        load_prompts(config, [])


def test_files_named_beside_their_kind_are_local(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [{"prompt": "p"}])
    config = job(Path("json"))
    assert config.datasets
    config.datasets[0].data_files = "a.jsonl"
    assert [row.prompt for row in load_prompts(config, [str(tmp_path)]).train] == ["p"]
    jsonl(tmp_path / "c.jsonl", [{"prompt": "q"}])
    config.datasets[0].data_files = "*.jsonl"
    assert sorted(str(row.prompt) for row in load_prompts(config, [str(tmp_path)]).train) == ["p", "q"]
    config.datasets[0].data_files = ["b.jsonl"]
    with pytest.raises(DataError, match=r"there is no file b\.jsonl \(data_files\)"):
        load_prompts(config, [str(tmp_path)])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"prompt": ', "is not JSON"),
        ([1], "is a list, not an object"),
        ({"question": "x"}, "has no `prompt`; its fields are question"),
        ({"prompt": " "}, "`prompt` is empty"),
        ({"prompt": 3}, "`prompt` is neither text nor a list of messages"),
        ({"prompt": []}, "`prompt` is neither text nor a list of messages"),
        ({"prompt": [{"role": "user"}]}, "`prompt` is neither text nor a list of messages"),
    ],
)
def test_a_bad_row_stops_the_job_with_its_place(tmp_path: Path, row: Any, reason: str) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": "good"}, row])
    with pytest.raises(DataError) as error:
        load_prompts(job(file), [])
    assert f"{file}:2" in str(error.value)
    assert reason in str(error.value)


def test_a_share_of_bad_rows_can_be_left_out(tmp_path: Path) -> None:
    config = job(jsonl(tmp_path / "a.jsonl", [{"prompt": "good"}, {"prompt": ""}]))
    config.ray.max_bad_rows = 0.5
    prompts = load_prompts(config, [])
    assert [row.prompt for row in prompts.train] == ["good"]
    assert [bad.place for bad in prompts.bad] == [f"{tmp_path}/a.jsonl:2"]


def test_nothing_to_train_on(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prompts in"):
        load_prompts(job(jsonl(tmp_path / "a.jsonl", [])), [])
    with pytest.raises(DataError, match="there is no file .*missing.jsonl"):
        load_prompts(job(tmp_path / "missing.jsonl"), [])


def test_long_prompts_are_left_out_or_stop_the_job_as_it_says(tmp_path: Path) -> None:
    config = job(jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "a b c"}]), sequence_len=10)
    config.trl.max_completion_length = 8
    prompts = load_prompts(config, [])
    kept = without_long_prompts(config, prompts, lambda prompt: len(str(prompt).split()))
    assert [row.prompt for row in kept.train] == ["a"]
    reason = "the prompt has 3 tokens; sequence_len 10 less max_completion_length 8 leaves 2"
    assert kept.bad == (BadRow(f"{tmp_path}/a.jsonl:2", reason, too_long=True),)
    config.excess_length_strategy = "raise"
    with pytest.raises(DataError, match=f"1 of 2 rows are too long; the first: {tmp_path}/a.jsonl:2: {reason}. Raise"):
        without_long_prompts(config, prompts, lambda prompt: len(str(prompt).split()))


def test_rows_that_are_too_long_are_not_among_those_that_stop_a_job(tmp_path: Path) -> None:
    config = job(tmp_path / "a.jsonl")
    bad = [BadRow("a:1", "long", too_long=True), BadRow("a:2", "odd")]
    ensure_usable(config, "rows", 100, 200, 2, 1, bad)  # one of 200
    with pytest.raises(DataError, match=r"^2 of 100 rows cannot be used; the first: a:2: odd\. Mend them"):
        ensure_usable(config, "rows", 10, 100, 90, 88, bad)
    with pytest.raises(DataError, match="no rows in .*; the first: a:1: long"):
        ensure_usable(config, "rows", 0, 100, 100, 100, bad)


def test_held_out_rows_are_not_trained_on(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", [{"prompt": str(i)} for i in range(10)])
    prompts = load_prompts(job(file, val_set_size=0.3), [])
    assert len(prompts.held_out) == 3
    assert {r.prompt for r in prompts.train} | {r.prompt for r in prompts.held_out} == {str(i) for i in range(10)}
    assert not {r.prompt for r in prompts.train} & {r.prompt for r in prompts.held_out}
    with pytest.raises(DataError, match="val_set_size"):
        load_prompts(job(file, val_set_size=10), [])


def test_a_transform_shapes_rows(tmp_path: Path) -> None:
    (tmp_path / "shape_rows.py").write_text(
        "def made(cfg):\n    return (lambda row: {'prompt': row['q'] + cfg.base_model}), {'remove_columns': ['q']}\n"
    )
    config = job(jsonl(tmp_path / "a.jsonl", [{"q": "x"}]))
    assert config.datasets
    config.datasets[0].type = "shape_rows.made"
    assert load_prompts(config, [str(tmp_path)]).train[0].prompt == "xm"
    config.datasets[0].type = "shape_rows.missing"
    with pytest.raises(DataError, match="shape_rows.missing cannot be used"):
        load_prompts(config, [str(tmp_path)])


def test_each_epoch_sees_every_row_once_and_steps_do_not_depend_on_each_other() -> None:
    rows = [Row(str(i), {}, "") for i in range(7)]
    seen = [row.prompt for step in range(7) for row in rows_of_step(rows, step, 3, seed=5)]
    assert len(seen) == 21
    assert all(Counter(seen[e * 7 : e * 7 + 7]) == Counter(str(i) for i in range(7)) for e in range(3))
    assert seen[:7] != seen[7:14]
    assert [row.prompt for row in rows_of_step(rows, 4, 3, seed=5)] == seen[12:15]


def test_the_fingerprint_tells_other_prompts(tmp_path: Path) -> None:
    first = load_prompts(job(jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, {"prompt": "b"}])), [])
    other = load_prompts(job(jsonl(tmp_path / "b.jsonl", [{"prompt": "a"}, {"prompt": "c"}])), [])
    assert first.fingerprint != other.fingerprint
