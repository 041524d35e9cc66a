"""`eagleray advise`: which method rows allow, and that the job file of it loads and can be planned."""

import functools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from actors import hub, prompts
from actors.errors import ConfigError, DataError
from actors.formats.base import FormatSpec
from actors.preparing import PrepareSpec, RowEncoder, sequences
from actors.reading import SourceSpec
from orchestrator import advise as module
from orchestrator import advise_report, row_sample, sizing
from orchestrator.advise import DEFAULT_MODEL, Advice, advise
from orchestrator.advised_job import config_of, percentile
from orchestrator.cli import main
from orchestrator.config import load
from orchestrator.hardware import said
from orchestrator.plan import Node, make_plan
from orchestrator.runnable import ensure_runnable
from orchestrator.sizing import size_of, way_for
from orchestrator.waits import Interrupted
from tests.job_files import messages
from tests.models import save_configs

ROOT = Path(__file__).parents[2]
CPUS = (Node("laptop", {"CPU": 2.0}, memory=16 * 2**30),)
CHAT = [{"role": "user", "content": "How many?"}]
ANSWER = {"role": "assistant", "content": "Three apples."}
WORSE = {"role": "assistant", "content": "No idea at all."}

Rows = Sequence[dict[str, Any]]


loaded_once = functools.cache(module.load_tokenizer)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder of its own, with models that are loaded once for all tests, and with fewer rows to look at."""
    monkeypatch.setattr(module, "load_tokenizer", loaded_once)
    monkeypatch.setattr(row_sample, "LOOKED_AT", 60)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def untaught(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model: no chat template, and no token that ends a turn of chatml but its EOS."""
    from tests.tiny import save_smollm2_llama

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("base")
    save_smollm2_llama(folder, **shape)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    return str(folder)


def jsonl(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def advised(data: str, reward: str | None = None, model: str | None = None, cluster: Sequence[Node] = CPUS) -> Advice:
    return advise(data, model, reward, cluster, Path.cwd())


def of_rows(rows: Rows, **keys: Any) -> Advice:
    return advised(jsonl(Path("rows.jsonl"), rows), **keys)


def entry(advice: Advice) -> dict[str, Any]:
    """The dataset entry, without its path."""
    return {key: value for key, value in advice.keys["datasets"][0].items() if key != "path"}


# The tree


@pytest.mark.parametrize(
    ("data", "method", "keys"),
    [
        ("sft/tickets", "sft", {"type": "chat_template"}),
        ("dpo/direct", "dpo", {"type": "chat_template.default"}),
        ("orpo/howto", "dpo", {"type": "chatml.intel"}),  # ORPO for a model that nobody has taught, see below
        ("kto/notes", "kto", {"type": "chat_template.default"}),
        ("reward/courtesy", "reward_trainer", {"type": "bradley_terry.chat_template"}),
        ("grpo/sums", "grpo", {}),
    ],
)
def test_the_recipes_data_gives_its_method(data: str, method: str, keys: dict[str, Any]) -> None:
    found = advised(str(ROOT / f"configs/{data}-train.jsonl"))
    assert (found.method, entry(found)) == (method, keys)
    assert found.found.model == DEFAULT_MODEL and 130e6 < found.found.size.weights < 140e6


def test_a_model_that_nobody_has_taught_learns_to_answer_and_to_prefer_in_one_stage(untaught: str) -> None:
    found = advised(str(ROOT / "configs/orpo/howto-train.jsonl"), model=untaught)
    assert (found.method, found.keys["rl"], entry(found)) == ("orpo", "orpo", {"type": "chatml.intel"})
    assert "chat_template" not in found.keys, "this type writes the turns itself"
    assert [other.method for other in found.others] == ["dpo", "reward_trainer", "grpo"]
    assert "chat_template=chatml" in found.others[1].overrides
    talks = advised(str(ROOT / "configs/dpo/direct-train.jsonl"), model=untaught)
    assert (talks.method, talks.keys["chat_template"], entry(talks)) == ("orpo", "chatml", {"type": "chat_template.default"})


def test_a_reward_makes_it_grpo() -> None:
    replies = str(ROOT / "configs/grpo/replies-train.jsonl")
    Path("mine.py").write_text("def kind(completions, **_):\n    return [1.0] * len(completions)\n")
    for reward in ("mine.kind", "outputs/reward-lora"):
        found = advised(replies, reward)
        assert (found.method, found.keys["trl"]["reward_funcs"], entry(found)) == ("grpo", [reward], {})
    with pytest.raises(ConfigError, match="--reward: mine.kid cannot be imported"):
        advised(replies, "mine.kid")
    with pytest.raises(DataError, match="no method can train on these rows: their columns are prompt"):
        advised(replies)
    pairs = str(ROOT / "configs/orpo/howto-train.jsonl")
    assert advised(pairs, "mine.kind").method == "grpo"


HISTORY = [*CHAT, ANSWER, {"role": "user", "content": "And pears?"}]
PAIR = {"chosen": "Three apples.", "rejected": "No idea at all."}
TALKS = {"chosen": [*HISTORY, ANSWER], "rejected": [*HISTORY, WORSE]}


@pytest.mark.parametrize(
    ("row", "method", "keys"),
    [
        ({"messages": [*CHAT, ANSWER]}, "sft", {"type": "chat_template"}),
        ({"conversations": [*CHAT, ANSWER]}, "sft", {"type": "chat_template", "field_messages": "conversations"}),
        (
            {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three."}]},
            "sft",
            {
                "type": "chat_template",
                "field_messages": "conversations",
                "message_property_mappings": {"role": "from", "content": "value"},
            },
        ),
        ({"instruction": "Count.", "input": "apples", "output": "Three."}, "sft", {"type": "alpaca"}),
        ({"system": "Be brief.", "instruction": "Count.", "output": "Three."}, "sft",
         {"type": "alpaca_w_system.load_instruct"}),
        ({"question": "How many?", "answer": "There are three of them, I think.\nOr four."}, "sft",
         {"type": "alpaca_chat.load_qa"}),
        ({"text": "Three apples."}, "sft", {"type": "completion"}),
        ({"segments": [{"text": "One", "label": False}, {"text": "two", "label": True}]}, "sft", {"type": "input_output"}),
        ({"prompt": "How many?", **PAIR}, "dpo", {"type": "chat_template.default", "field_messages": "prompt"}),
        ({"system": "Be brief.", "prompt": "How many?", **PAIR}, "dpo", {"type": "chatml.prompt_pairs"}),
        ({"prompt": CHAT, "chosen": [ANSWER], "rejected": [WORSE]}, "dpo",
         {"type": "chat_template.default", "field_messages": "prompt"}),
        (TALKS, "dpo", {"type": "chat_template.argilla_chat"}),
        ({"prompt": "How many?", **TALKS}, "dpo", {"type": "chat_template.argilla_chat"}),  # not the prompt: it is one turn
        ({"instruction": "Count.", "chosen_response": "Three.", "rejected_response": "No."}, "dpo",
         {"type": "chat_template.default", "field_messages": "instruction", "field_chosen": "chosen_response",
          "field_rejected": "rejected_response"}),
        ({"prompt": "How many?", "answers": [{"answer": "Three.", "rank": 1}, {"answer": "No.", "rank": 2}]}, "dpo",
         {"type": "zephyr.nectar"}),
        ({"question": "How many?", "answer": "#### 3"}, "grpo", {"type": "actors.prompts.chat"}),
        ({"problem": "Halve 3.", "solution": r"$\frac{3}{2}$"}, "grpo", {"type": "actors.prompts.chat"}),
        ({"text": "Write f.", "test_list": ["assert f() == 1"]}, "grpo", {"type": "actors.prompts.chat"}),
    ],
)  # fmt: skip
def test_rows_in_the_layouts_that_people_have(row: dict[str, Any], method: str, keys: dict[str, Any]) -> None:
    found = of_rows([row] * 3)
    assert (found.method, entry(found)) == (method, keys)


@pytest.mark.parametrize(
    ("row", "reward"),
    [
        ({"prompt": "How many?", "answer": 3}, "actors.verifiers.right_answer"),
        ({"prompt": CHAT, "answer": "B"}, "actors.verifiers.right_answer"),
        ({"question": "How many?", "answer": "3", "metadata": {"source_dataset": "x"}}, "actors.verifiers.reasoning_gym"),
        ({"problem": "Halve 3.", "solution": r"$\frac{3}{2}$"}, "trl.rewards.accuracy_reward"),
        ({"problem": "Halve 3.", "solution": r"$\frac{3}{2}$", "answer": "1.5"}, "actors.verifiers.right_answer"),
        ({"prompt": "Write f.", "test_list": ["assert f() == 1"]}, "actors.verifiers.passes_tests"),
        ({"question": "Add.", "input_output": '{"inputs": ["1"], "outputs": ["2"]}'}, "actors.verifiers.passes_tests"),
        ({"question": "How many?", "answer": "3", "metadata": 5}, "actors.verifiers.right_answer"),  # not reasoning-gym's
    ],
)
def test_answers_that_can_be_verified_name_their_reward(row: dict[str, Any], reward: str) -> None:
    assert of_rows([row] * 3).keys["trl"]["reward_funcs"] == [reward]


def test_programs_are_judged_by_what_they_read_and_print() -> None:
    found = of_rows([{"question": "Add.", "input_output": {"inputs": ["1"], "outputs": ["2"]}}] * 3)
    judged = "prompts in `question` with tests in input_output, by which actors.verifiers.passes_tests rewards completions"
    assert found.why == judged
    for broken in ({"fn_name": "add", "inputs": [[1]], "outputs": [2]}, {"inputs": ["1"]}, "{", {"inputs": 1, "outputs": 1}):
        with pytest.raises(DataError, match="GRPO needs .* test_list or input_output"):
            of_rows([{"question": "Add.", "input_output": broken}] * 3)


def test_liked_and_disliked_answers_under_other_names() -> None:
    rows = [{"question": "How many?", "response": f"{i} apples.", "thumbs_up": i % 2 == 0} for i in range(4)]
    found = of_rows(rows)
    keys = {"type": "chat_template.default", "field_prompt": "question", "field_label": "thumbs_up"}
    assert (found.method, entry(found)) == ("kto", {**keys, "field_completion": "response"})
    assert "2 true and 2 false" in found.why
    assert of_rows([row | {"thumbs_up": True} for row in rows]).method == "sft", "with one label there is nothing to compare"


def test_labels_are_counted_as_kto_reads_them() -> None:
    def labelled(*labels: Any) -> Advice:
        return of_rows([{"prompt": f"How many of {i}?", "completion": "Three.", "label": one} for i, one in enumerate(labels)])

    assert labelled(True, "True", 1, "true").method == "sft", "one label, however it is written"
    assert "12 true and 7 false" in labelled(*[True, 1, "true", 0] * 4, False, " FALSE ", "false", "no").why


@pytest.mark.parametrize("name", ["rows.json", "rows.csv", "rows.parquet", "rows.arrow", "folder"])
def test_files_of_every_kind(name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [{"instruction": f"Count to {i}.", "output": "Done."} for i in range(5)]
    table = pa.Table.from_pylist(rows)
    if name == "rows.json":
        Path(name).write_text(json.dumps(rows))
    elif name == "rows.csv":
        Path(name).write_text("instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in rows))
    elif name == "rows.parquet":
        parquet.write_table(table, name)
    elif name == "rows.arrow":
        with pa.ipc.new_stream(name, table.schema) as stream:
            stream.write_table(table)
    else:
        Path(name).mkdir()
        jsonl(Path(name, "a.jsonl"), rows[:2])
        jsonl(Path(name, "b.jsonl"), rows[2:])
    found = advised(name)
    assert (found.method, found.found.sample.total, found.keys["datasets"][0]["path"]) == ("sft", 5, name)


# What no method can use


def test_rows_of_no_kind_are_one_message_that_names_columns_and_needs(capsys: pytest.CaptureFixture[str]) -> None:
    data = str(ROOT / "configs/grpo/reasoning-train.jsonl")
    assert main(["advise", data]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("eagleray: ") == 1 and "Traceback" not in printed.err
    assert f"{data}: no method can train on these rows: their columns are task (text), seed (a number)" in printed.err
    for method in ("SFT", "DPO", "ORPO", "a reward model", "KTO", "GRPO"):
        assert re.search(rf"^  {method} needs \w", printed.err, re.MULTILINE)
    with pytest.raises(DataError, match="--reward a.b needs prompts, and their columns are task") as error:
        advised(data, "a.b")
    assert "SFT needs" not in str(error.value)


def test_rows_that_nearly_fit_say_where_they_do_not() -> None:
    rows: Rows = [{"prompt": "How many?", "chosen": "Three.", "rejected": 4 if i % 2 else "No."} for i in range(8)]
    with pytest.raises(DataError, match=r"DPO needs .*; 4 of 8 rows do not fit, such as rows.jsonl:2: `rejected` is a int"):
        of_rows(rows)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("missing.jsonl", "there is no file missing.jsonl"),
        ("nobody/nothing", "nobody/nothing is no local file and the hub did not give it"),
        ("empty.jsonl", "empty.jsonl holds no rows"),
        ("broken.json", "broken.json cannot be read"),
    ],
)
def test_data_that_is_not_there(data: str, expected: str) -> None:
    Path("empty.jsonl").touch()
    Path("broken.json").write_text("[{")
    with pytest.raises(DataError, match=expected):
        advised(data)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="nobody/nothing is no folder, not in the hub's cache"):
        of_rows([{"text": "x"}], model="nobody/nothing")


# Lengths, and rows that are left out


def test_sequence_len_holds_the_rows_as_the_job_encodes_them() -> None:
    rows = [{"instruction": "count " * n, "output": "done"} for n in (5, 90, 170)]
    found = of_rows(rows)
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve(DEFAULT_MODEL))
    source = SourceSpec(FormatSpec(type="alpaca"))
    encoder = RowEncoder(PrepareSpec("sft", (source,), "", 10**6), source, tokenizer)
    counted = [max(sequences(encoded)) for row in rows for encoded in encoder.rows("", row)]  # type: ignore[union-attr]
    assert list(found.fit.lengths) == counted
    assert found.config.sequence_len == -(-counted[-1] // 64) * 64 == 256
    assert "ray" not in found.keys, "no row is left out"


def test_a_row_far_out_is_left_out_rather_than_paid_for_by_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_sample, "LOOKED_AT", 200)
    rows = [{"text": "word " * 20, "question": "word " * 20, "answer": f"{'word ' * 20}\n."} for _ in range(200)]
    rows[77]["answer"] = "word " * 3000
    found = of_rows(rows)
    assert found.config.sequence_len < 256 and "ray" not in found.keys


def test_rows_that_cannot_be_used_are_allowed_for() -> None:
    rows = [{"instruction": f"Count to {i}.", "output": "" if i in (3, 40) else "Done."} for i in range(50)]
    found = of_rows(rows)
    assert [row.place for row in found.fit.bad] == ["rows.jsonl:4", "rows.jsonl:41"]
    assert found.config.ray.max_bad_rows == 0.06  # half as many again as 2 of 50


def test_of_many_rows_some_from_everywhere_are_looked_at() -> None:
    rows = [{"instruction": f"Count to {i}.", "output": "Done."} for i in range(12_000)]
    found = of_rows(rows)
    assert found.found.sample.total == 12_000 and 55 <= len(found.found.sample.rows) <= 65
    numbers = [int(row["instruction"].split()[-1].strip(".")) for row in found.found.sample.rows]
    assert min(numbers) == 0 and max(numbers) > 8_000, "none is of the last third"
    assert "ray" not in found.keys, "a row in a hundred may be wrong without a word"


def test_percentiles() -> None:
    assert [percentile(range(1, 101), p) for p in (50, 95, 99, 100)] == [50, 95, 99, 100]
    assert percentile([7], 50) == 7


# The job file


SLOW = ["sft/tickets", "kto/notes", "reward/courtesy"]
RECIPES = ["dpo/direct", "grpo/sums", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.mark.parametrize("name", RECIPES)
def test_the_file_loads_without_a_word_and_can_be_planned(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    file = tmp_path / "job.yaml"
    assert main(["advise", f"configs/{name}-train.jsonl", "--write", str(file)]) == 0
    ensure_runnable(load(file))
    assert messages(caplog) == []
    assert main(["plan", str(file)]) == 0


def test_other_methods_are_commands_that_would_run(tmp_path: Path) -> None:
    tried = set()
    for name in ("reward/courtesy", "orpo/howto"):
        found = advised(str(ROOT / f"configs/{name}-train.jsonl"))
        (tmp_path / "job.yaml").write_text(found.text("job.yaml"))
        for other in found.others:
            words = shlex.split(other.command("job.yaml"))
            if words[1] == "advise":
                continue
            config = load(words[2], words[3:])
            ensure_runnable(config)
            assert (config.rl or "sft") == other.method
            tried.add(other.method)
    assert tried == {"dpo", "orpo", "reward_trainer"}


def test_kto_in_place_of_grpo_has_rows_to_compare() -> None:
    """Of long rows GRPO has one completion at once; KTO needs two, and steps of its own size."""
    rows = [
        {"prompt": f"Is {i} even?" + " Think." * 2500, "completion": "Yes.", "label": i % 2 == 0, "answer": "yes"}
        for i in range(20)
    ]
    Path("mine.py").write_text("def kind(completions, **_):\n    return [1.0] * len(completions)\n")
    found = of_rows(rows, reward="mine.kind")
    assert (found.method, found.config.micro_batch_size) == ("grpo", 1)
    Path("job.yaml").write_text(found.text("job.yaml"))
    (command,) = (other.command("job.yaml") for other in found.others if other.method == "kto")
    config = load("job.yaml", shlex.split(command)[3:])  # the comment with SFT's markup, of several lines, is one still
    ensure_runnable(config)
    assert (config.rl, config.micro_batch_size, config.gradient_accumulation_steps) == ("kto", 2, 4)


def test_the_command_for_grpo_keeps_what_was_said() -> None:
    rows = [{"prompt": "Why?", "answer": 3, "completion": "Yes.", "label": i % 2} for i in range(4)]
    data = jsonl(Path("my rows.jsonl"), rows)
    found = advise(data, DEFAULT_MODEL, None, said("2x24GB"), Path.cwd(), "2x24GB")
    (command,) = (other.command("job.yaml") for other in found.others if other.method == "grpo")
    reward = "--reward actors.verifiers.right_answer"
    assert command == f"eagleray advise 'my rows.jsonl' --model {DEFAULT_MODEL} --cluster 2x24GB {reward}"
    Path("bare.jsonl").write_text('{"prompt": "Why?", "completion": "So."}\n')
    (other,) = (other for other in advised("bare.jsonl").others if other.method == "grpo")
    assert other.command("job.yaml") == "eagleray advise bare.jsonl --reward FN"


def test_a_reward_model_is_found_beside_the_job_file() -> None:
    Path("jobs/critic").mkdir(parents=True)
    data = jsonl(Path("rows.jsonl"), [{"prompt": "Why?"}] * 3)
    assert advise(data, None, "critic", CPUS, Path("jobs")).keys["trl"]["reward_funcs"] == ["critic"]
    with pytest.raises(ConfigError, match="critic is no folder, and no function's name"):
        advise(data, None, "critic", CPUS, Path.cwd())


def test_ctrl_c_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> Advice:
        raise Interrupted(2)

    monkeypatch.setattr(advise_report, "advise", interrupted)
    assert main(["advise", "rows.jsonl"]) == 130


def test_grpo_with_answers_to_imitate_can_be_sft(tmp_path: Path) -> None:
    found = of_rows([{"question": f"What is {i} + 1?", "answer": f"{i} + 1 is\n#### {i + 1}"} for i in range(50)])
    (tmp_path / "job.yaml").write_text(found.text("job.yaml"))
    (other,) = found.others
    config = load("job.yaml", shlex.split(other.command("job.yaml"))[3:])
    ensure_runnable(config)
    assert config.rl is None and config.datasets and config.datasets[0].type == "alpaca_chat.load_qa"


def test_the_file_is_printed_by_itself_or_written_once(capsys: pytest.CaptureFixture[str]) -> None:
    data = jsonl(Path("rows.jsonl"), [{"text": "one two three"}] * 3)
    assert main(["advise", data]) == 0
    printed = capsys.readouterr()
    job = yaml.safe_load(printed.out)
    assert job["datasets"] == [{"path": data, "type": "completion"}] and job["base_model"] == DEFAULT_MODEL
    assert "SFT: text to imitate in `text`" in printed.err and "sequence_len is 64" in printed.err
    assert main(["advise", data, "--write", "job.yaml"]) == 0
    assert "wrote job.yaml; to run it: eagleray run job.yaml" in capsys.readouterr().out
    assert yaml.safe_load(Path("job.yaml").read_text()) == job
    Path("job.yaml").write_text("mine")
    assert main(["advise", data, "--write", "job.yaml"]) == 1
    assert "--write: job.yaml is there already, and nothing of yours is overwritten" in capsys.readouterr().err
    assert Path("job.yaml").read_text() == "mine"
    assert main(["advise", data, "--write", "no/such/job.yaml"]) == 1
    assert "--write: no/such/job.yaml cannot be written: No such file or directory" in capsys.readouterr().err


# Adapters and GPUs


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_configs(tmp_path_factory.mktemp("models"))


QLORA = {"adapter": "qlora", "load_in_4bit": True}
COLOCATE = {"vllm_mode": "colocate", "vllm_enable_sleep_mode": True}


@pytest.mark.parametrize(
    ("name", "rl", "cluster", "expected"),
    [
        ("Qwen2.5-1.5B", "dpo", "1x24GB", {"adapter": "lora"}),
        ("Llama-3.1-8B", None, "1x80GB", {"adapter": "lora"}),
        ("Llama-3.1-8B", None, "8x80GB", {"adapter": "lora"}),
        ("Llama-3.1-8B", None, "1x16GB", QLORA),
        ("Llama-3.1-70B", "dpo", "1x80GB", QLORA),
        ("Llama-3.1-70B", "dpo", "2x8x80GB", QLORA),
        ("Qwen2.5-3B", "grpo", "2x24GB", {"adapter": "lora", "vllm": {"tensor_parallel_size": 1}}),
        ("Llama-3.1-8B", "grpo", "2x80GB", {"adapter": "lora", "vllm": {"tensor_parallel_size": 1}}),
        ("Qwen2.5-1.5B", "grpo", "1x24GB", {"adapter": "lora", "trl": COLOCATE, "vllm": {"gpu_memory_utilization": 0.4}}),
    ],
)
def test_the_plainest_way_that_fits(
    models: dict[str, str], name: str, rl: str | None, cluster: str, expected: dict[str, Any]
) -> None:
    folder = models[name]
    assert way_for(rl, name, size_of(folder), said(cluster), 300, loaded(folder, rl)) == expected


def test_a_model_that_no_gpu_holds_is_cut_into_shards(models: dict[str, str]) -> None:
    folder = models["Llama-3.1-70B"]
    way = way_for("dpo", "big", size_of(folder), said("8x24GB"), 300, loaded(folder, "dpo"))
    assert way["fsdp_version"] == 2 and way["ray_num_workers"] in (2, 4, 8)
    online = way_for("grpo", "big", size_of(folder), said("8x80GB"), 300, loaded(folder, "grpo"))
    assert online["vllm"]["tensor_parallel_size"] in (2, 4)  # 141 GB of weights, and the KV cache


def loaded(folder: str, rl: str | None) -> Callable[[sizing.Way], Any]:
    job: dict[str, Any] = {"base_model": folder, "learning_rate": 1.0, "datasets": [{"path": "d", "type": "chat_template"}]}
    job |= {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True, "sequence_len": 512} | ({"rl": rl} if rl else {})
    job |= {"micro_batch_size": 1, "gradient_accumulation_steps": 8, "gradient_checkpointing": True}

    def config_with(way: sizing.Way) -> Any:
        keys = {**job, **way}
        if rl == "grpo":
            keys |= {"datasets": [{"path": "d"}], "trl": {"reward_funcs": ["a.b"], **way.get("trl", {})}}
        return config_of(keys, ())

    return config_with


def test_what_does_not_fit_is_told_with_what_it_takes(models: dict[str, str]) -> None:
    folder = models["Llama-3.1-70B"]
    expected = r"big does not fit 1 x 24 GB, with QLoRA neither: .* needs \d+\.\d GB of GPU 0 .*; name a smaller --model"
    with pytest.raises(ConfigError, match=expected):
        way_for("dpo", "big", size_of(folder), said("1x24GB"), 300, loaded(folder, "dpo"))


def test_a_job_for_gpus_loads_and_can_be_placed(tmp_path: Path) -> None:
    found = advised(str(ROOT / "configs/grpo/sums-train.jsonl"), cluster=said("2x24GB"))
    (tmp_path / "job.yaml").write_text(found.text("job.yaml"))
    config = load("job.yaml")
    assert make_plan(config, [Node("a", {"CPU": 8.0, "GPU": 2.0})], 300).problems == []
    assert config.gradient_checkpointing is True and config.ray.kv_cache_gib is None
    one = advised(str(ROOT / "configs/grpo/sums-train.jsonl"), cluster=said("1x24GB"))
    (tmp_path / "job.yaml").write_text(one.text("job.yaml"))
    config = load("job.yaml")
    assert make_plan(config, [Node("a", {"CPU": 8.0, "GPU": 1.0})], 300).problems == []
    assert config.trl.vllm_mode == "colocate"


# Prompts made of rows


def test_questions_become_prompts() -> None:
    chat, text = prompts.chat(None), prompts.text(None)
    assert chat({"question": "Why?", "answer": 1}) == {"question": "Why?", "answer": 1, "prompt": [
        {"role": "user", "content": "Why?"}
    ]}  # fmt: skip
    assert chat({"system": "Be brief.", "problem": "Why?"})["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?"},
    ]
    assert chat({"messages": CHAT})["prompt"] == CHAT
    assert text({"instruction": "Count.", "input": "apples"})["prompt"] == "Count.\n\napples"
    with pytest.raises(ValueError, match="has none of prompt, question, .*; its fields are task"):
        text({"task": 1})


