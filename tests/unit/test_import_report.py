"""`eagleray import`: files as people have them for Axolotl, and what is said of every line of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.errors import ConfigError
from orchestrator.cli import main
from orchestrator.config import load
from orchestrator.import_report import ImportReport, import_report
from orchestrator.runnable import ensure_runnable

FILES = sorted((Path(__file__).parent / "axolotl").glob("*.yml"))
REFUSED = {"refused", "grpo-colocate"}


def report(name: str, *overrides: str) -> ImportReport:
    return import_report(Path(__file__).parent / "axolotl" / f"{name}.yml", overrides)


def apart(found: ImportReport) -> dict[str, tuple[str, str]]:
    """Status and text of all keys that are not simply used."""
    return {line.key: (line.status, line.text) for line in found.lines if (line.status, line.text) != ("used", "")}


def in_yaml(data: Any) -> set[str]:
    """Keys that a file has, those of sections and of entries of a list one by one."""
    keys: set[str] = set()
    for name, value in data.items():
        entries = [(f"{name}[{i}]", entry) for i, entry in enumerate(value)] if name == "datasets" else [(name, value)]
        for prefix, inner in entries:
            opened = name in ("datasets", "trl", "vllm")
            keys |= {f"{prefix}.{key}" for key in inner} if opened else {name}
    return keys


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_of_a_file_has_a_line(path: Path) -> None:
    text = path.read_text()
    written = [line for line in import_report(path).lines if line.place]
    assert sorted(line.key for line in written) == sorted(in_yaml(yaml.safe_load(text)))
    for line in written:
        name = re.sub(r".*\.", "", line.key)
        assert re.match(rf"[ -]*{name}:|.*[{{ ]{name}:", text.splitlines()[int(line.place) - 1])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_would_run_is_what_loads(path: Path) -> None:
    found = import_report(path)
    assert found.would_run == (path.stem not in REFUSED)
    if found.would_run:
        ensure_runnable(load(path))
    else:
        with pytest.raises(ConfigError):
            ensure_runnable(load(path))


CLASS = ("noted", "not used: the class follows from the model's own files and from the method")
EMPTY = ("noted", "empty, so it asks for nothing")
STRICT = ("noted", "not used: every file is checked strictly")
PADDING = ("noted", "not used: batches are padded to their longest row")
CHECKPOINTING = ("noted", "not used: they change memory and speed, no result")
FLASH = ("translated", "read as attn_implementation: flash_attention_2")
NO_ROWS = ("noted", "not used: there are no rows to evaluate on (test_datasets, val_set_size)")
SERVER = ("noted", "dropped: the vLLM engines are Ray actors, with no address to set")
SAME = "dropped: the reference runs beside the trained model, with the same result"
LOADER = ("noted", "dropped: Ray reads the data and feeds the trainers")


def test_qlora_line_by_line() -> None:
    empty = (
        "lora_model_dir lora_target_modules lora_fan_in_fan_out wandb_project wandb_entity wandb_watch wandb_name "
        "wandb_log_model fp16 early_stopping_patience resume_from_checkpoint local_rank xformers_attention eval_table_size "
        "debug deepspeed fsdp fsdp_config"
    )
    assert apart(report("qlora-sft")) == {
        **dict.fromkeys(empty.split(), EMPTY),
        "model_type": CLASS,
        "strict": STRICT,
        "pad_to_sequence_len": PADDING,
        "group_by_length": ("noted", "dropped: rows keep their shuffled order"),
        "gradient_checkpointing_kwargs": CHECKPOINTING,
        "flash_attention": FLASH,
        "evals_per_epoch": NO_ROWS,
    }


def test_grpo_line_by_line() -> None:
    assert apart(report("grpo-vllm-server")) == {
        "vllm.host": SERVER,
        "vllm.port": SERVER,
        "trl.vllm_server_host": SERVER,
        "trl.vllm_server_port": SERVER,
        "trl.vllm_server_timeout": SERVER,
        "trl.scale_rewards": ("translated", "read as none, as TRL does"),
        "trl.num_completions_to_print": ("noted", "dropped: trl.log_completions keeps them all, in output_dir/rollouts"),
        "skip_prepare_dataset": ("noted", "dropped: Eagleray prepares the rows by their type in every case"),
        "dataloader_num_workers": LOADER,
        "dataloader_prefetch_factor": LOADER,
        "gc_steps": ("noted", "dropped: Python collects its garbage as usual"),
        "sample_packing": ("noted", "not needed: completions are trained without padding to sequence_len"),
        "tf32": ("noted", "not used: PyTorch's own setting stays"),
        "gradient_checkpointing_kwargs": CHECKPOINTING,
        "flash_attention": (
            "noted",
            "not used: attention knows which completions share a prompt, which no kernel by name does; same result",
        ),
        "logging_steps": ("noted", "not used: every step is recorded"),
        "evals_per_epoch": NO_ROWS,
    }


def test_fsdp1_line_by_line() -> None:
    options = ["limit_all_gathers", "sync_module_states", "use_orig_params", "state_dict_type", "sharding_strategy"]
    names = ", ".join(f"fsdp_{option}" for option in options)
    assert apart(report("fsdp1-qlora")) == {
        "model_type": CLASS,
        "strict": STRICT,
        "pad_to_sequence_len": PADDING,
        "gradient_checkpointing_kwargs": CHECKPOINTING,
        "flash_attention": FLASH,
        "eval_strategy": ("translated", "read as evals_per_epoch: 1"),
        "fsdp": ("translated", "read as fsdp_version: 2, with fsdp_config.offload_params: true"),
        "fsdp_final_state_dict_type": ("noted", "dropped: the result is always saved whole"),
        "fsdp_config": ("used", f"{names}: not used: FSDP2 has no such option, and results are always saved whole"),
    }


def test_deepspeed_line_by_line() -> None:
    assert apart(report("deepspeed-ray")) == {
        "datasets[1].type": ("translated", "read as chat_template on `conversations` of `from` and `value`"),
        "dataset_processes": LOADER,
        "sdp_attention": ("translated", "read as attn_implementation: sdpa"),
        "save_first_step": ("noted", "dropped: checkpoints are saved at save_steps or saves_per_epoch"),
        "deepspeed": (
            "translated",
            "there is no such file here, so it is read as the one that Axolotl ships: "
            "DeepSpeed ZeRO-3: weights, gradients and optimizer",
        ),
        "use_ray": ("noted", "not used: every job runs on Ray"),
    }


@pytest.mark.parametrize(
    ("name", "key", "status", "text"),
    [
        ("reward-model", "reward_model", "translated", "read as rl: reward_trainer"),
        ("reward-model", "num_labels", "noted", "dropped: it is so in Eagleray without it"),
        ("orpo-qlora", "tokenizer_type", *CLASS),
        ("orpo-qlora", "loss_watchdog_threshold", "used", ""),
        ("dpo-lora", "dpo_beta", "translated", "read as rl_beta"),
        ("dpo-lora", "special_tokens", "used", ""),
        ("dpo-lora", "precompute_ref_log_probs", "noted", SAME),
        ("kto-qlora", "kto_desirable_weight", "used", ""),
        ("fsdp2-full", "save_only_model", "noted", "not used: checkpoints always hold what a resume needs"),
        ("grpo-colocate", "trl.vllm_gpu_memory_utilization", "translated", "read as vllm.gpu_memory_utilization"),
        (
            "grpo-colocate",
            "chat_template",
            "translated",
            "read as tokenizer_default, the model's own, which must have <|im_start|> in it",
        ),
        ("grpo-colocate", "torch_compile", "noted", "not used: it changes speed, no result"),
        ("grpo-colocate", "optimizer", "translated", "read as adamw_torch: the same formula, and nothing moves to the CPU"),
    ],
)
def test_lines_of_other_files(name: str, key: str, status: str, text: str) -> None:
    (line,) = (line for line in report(name).lines if line.key == key)
    assert (line.status, line.text) == (status, text)


def test_what_is_refused_says_why_and_what_to_do() -> None:
    found = report("refused")
    refused = {line.key: line.text for line in found.lines if line.status == "refused"}
    expected = {
        "hub_model_id": "pushing to the hub is not implemented yet; upload output_dir",
        "datasets[0].type": "there is no type: alpacca; choose one of alpaca,",
        "datasets[0].shards": "eagleray does not support shards; prepare the rows",
        "eval_steps": "there are no rows to evaluate on; add test_datasets or val_set_size",
        "relora": "eagleray does not support relora; use adapter: lora",
        "fp8": "eagleray does not support fp8; use bf16: true",
        "tensor_parallel_size": "is not implemented yet; remove it, and shard the model with fsdp_version: 2",
        "gradient_acumulation_steps": "unknown key 'gradient_acumulation_steps'; did you mean gradient_accumulation_steps?",
        "optimizer": "muon is not implemented yet; use one of adamw_torch",
        "logging_steps": "takes a whole number, not 'one'",
        "learning_rate": "is missing; add it",
        "lora_alpha": "adapter: lora needs a scale",
    }
    assert refused.keys() == expected.keys()
    assert {key: text for key, text in refused.items() if not text.startswith(expected[key])} == {}
    assert [line.key for line in found.lines if not line.place] == ["learning_rate", "lora_alpha"]
    assert {line.status for line in found.lines if line.key not in refused} == {"used", "translated"}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(Path(__file__).parent / "axolotl" / "grpo-colocate.yml")
    assert main(["import", file]) == 1
    output = capsys.readouterr().out
    assert re.search(r"33 +adapter: qlora +refused +qlora needs load_in_4bit: true", output)
    assert "29 used, 5 translated, 4 noted, 1 refused\nIt would not run" in output
    assert main(["import", file, "load_in_4bit=true"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"override +load_in_4bit: true +used", output)
    assert "It would run: GRPO, QLoRA" in output and "here ray_num_workers says it, and it is 1 now" in output
    assert main(["import", file, "load_in_4bit=true", "ray_num_workers=2", "dataset_prepared_path=my data"]) == 0
    output = capsys.readouterr().out
    plan = f"eagleray plan {file} load_in_4bit=true ray_num_workers=2 'dataset_prepared_path=my data'"
    assert plan.split() == output.split("are there: ")[1].split() and "ray_num_workers says it" not in output


def test_what_is_said_of_keys_that_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text(
        "base_model: m\ndatasets: [{path: d, type: alpaca}]\nlearning_rate: 1e-5\nadapter:\nlora_r: 8\n"
        "dp_shard_size: 1\ntokens: []\nevals_per_epoch: 0\nbfloat16: true\nheads_k_stride: 1\n"
    )
    found = apart(import_report(tmp_path / "a.yml"))
    assert found == {
        "adapter": EMPTY,
        "lora_r": ("noted", "not used: adapter is not set, so all weights are trained"),
        "dp_shard_size": ("noted", "dropped: it is so in Eagleray without it"),
        "tokens": ("noted", "dropped: it is so in Eagleray without it"),
        "evals_per_epoch": ("translated", "read as not set, as Axolotl does"),
        "bfloat16": ("translated", "read as bf16: true"),
        "heads_k_stride": ("noted", "dropped: it does nothing without context_parallel_size"),
    }


def test_a_file_that_is_none_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yml").write_text("- base_model\n")
    assert main(["import", str(tmp_path / "a.yml")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"eagleray: {tmp_path}/a.yml: holds no mapping of keys; write `key: value` lines\n"


@pytest.mark.parametrize("text", ["rl: grop\n", "trl: 5\nrl: grpo\n", "datasets: 3\n", "base_model: [1]\n", "a: {b: 1}\n"])
def test_a_mistake_is_told_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yml").write_text(text)
    keys = [line.key for line in import_report(tmp_path / "a.yml").lines]
    assert len(keys) == len(set(keys)) and text.partition(":")[0] in keys
