"""SWEEP.yaml: what it means, and that all that can be wrong with it is one message with its place, before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.errors import ConfigError
from orchestrator.config import dump
from orchestrator.config import load as load_job
from orchestrator.sweep_config import SweepConfig, load, make
from orchestrator.trial_process import BASE_FILE, Order
from tests.job_files import GRPO, SFT

ROOT = Path(__file__).parents[2]
SWEEP = """\
base: job.yaml
output_dir: out
metric: eval/loss
mode: min
num_samples: 3
space:
  learning_rate: {loguniform: [1e-6, 1e-4]}
  sequence_len: [64, 128]
"""  # 8 lines


def write(folder: Path, sweep: str = SWEEP, base: str = SFT + "val_set_size: 8\n") -> Path:
    (folder / "job.yaml").write_text(base)
    (folder / "sweep.yaml").write_text(sweep)
    return folder / "sweep.yaml"


def read(folder: Path, sweep: str = SWEEP, *overrides: str, **kwargs: str) -> SweepConfig:
    return load(write(folder, sweep, **kwargs), overrides)


def test_a_sweep_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = read(tmp_path, SWEEP + "scheduler: asha\n", "mode=max", "seed=7")
    assert (config.metric, config.mode, config.seed) == ("eval/loss", "max", 7)
    assert config.output_dir == tmp_path / "out"
    assert config.base.learning_rate == 1e-5
    assert config.trials == 6
    assert config.scheduler == {"name": "asha", "grace_period": 1, "reduction_factor": 3}


def test_every_shipped_sweep_loads() -> None:
    sweeps = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
    assert {load(path).base.rl for path in sweeps} == {None, "grpo"}


def test_a_space_in_a_file_of_its_own(tmp_path: Path) -> None:
    """As Axolotl's sweep files are."""
    (tmp_path / "space.yaml").write_text("learning_rate: [1e-5, 1e-4]\n_:\n  - {micro_batch_size: 2, sequence_len: 64}\n")
    text = SWEEP.partition("space:")[0] + "space: space.yaml\n"
    assert read(tmp_path, text).space.keys == ("learning_rate", "micro_batch_size", "sequence_len")
    (tmp_path / "space.yaml").write_text("learning_rate: [1e-5, 1e-4]\nlora_rank: [8]\n")
    with pytest.raises(ConfigError, match=r"space.yaml:2: lora_rank: with lora_rank=8: unknown key"):
        read(tmp_path, text)


def test_python_says_the_same(tmp_path: Path) -> None:
    from_file = read(tmp_path)
    given: dict[str, Any] = yaml.safe_load(SWEEP) | {"output_dir": from_file.output_dir, "max_concurrent": None}
    del given["base"]
    given["space"]["learning_rate"] = {"loguniform": [1e-6, 1e-4]}  # which plain YAML reads as text
    from_python = make(load_job(tmp_path / "job.yaml"), **given)
    assert from_python.space.texts() == from_file.space.texts()
    assert (from_python.trials, from_python.output_dir) == (from_file.trials, from_file.output_dir)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("metrik: loss", ":9: metrik: no sweep has this key; did you mean metric?"),
        ("lora_r: 8", ":9: lora_r: no sweep has this key; it is a key of the job: put it under space, or into the base"),
        ("num_samples: many", "num_samples: takes a whole number, not 'many'"),
        ("num_samples: 0", "num_samples: is 0; it must be 1 or more"),
        ("share_engines: 1", "share_engines: takes true or false, not 1"),
        ("mode: best", "mode: is 'best'; it must be min or max"),
        ("metric: eval/los", "metric: no job measures 'eval/los'; did you mean eval/loss?"),
        ("base: none.yaml", "base: there is no file none.yaml, neither beside"),
        ("output_dir:", "output_dir: is missing; name a folder"),
        ("scheduler: hyperband", "scheduler: there is none called 'hyperband'; its name is one of none, asha, pbt"),
        ("scheduler: {name: asha, grace: 3}", "scheduler.grace: asha has no such option; it has grace_period, r"),
        ("scheduler: {name: asha, reduction_factor: 1}", "scheduler.reduction_factor: is 1; it must be above 1"),
        ("scheduler: pbt", "scheduler.perturbation_interval: is missing; pbt needs it: a number of steps"),
        ("space: {}", "space: has no keys"),
        ("space: {learning_rate: [-1]}", "space.learning_rate: with learning_rate=-1: is -1; it must be greater than 0"),
        ("space: {learning_rate: {uniform: [0.0, 1.0]}}", "space.learning_rate: with learning_rate=0.0: is 0; it must be"),
        ("space: {trl.betta: [1]}", "space.trl.betta: with trl.betta=1: unknown key 'betta'; did you mean trl.beta?"),
        ("space: {adapter: [lora]}", "space.adapter: with adapter=\"lora\": lora_r: "),
        ("space: {output_dir: [a, b]}", "space.output_dir: output_dir is the sweep's to set"),
        ("space: {learning_rate: fast}", "space.learning_rate: takes no 'fast'; write a list"),
        ("space: {_: [{learning_rate: 1.0}, {learning_rate: -2}]}", "space._: with learning_rate=-2: is -2; it must be"),
    ],
)
def test_one_message_says_where_and_what(tmp_path: Path, change: str, said: str) -> None:
    key = change.partition(":")[0]
    lines = SWEEP.splitlines()
    at = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), len(lines))
    lines[at:] = [change] if key == "space" else [change, *lines[at + 1 :]]
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "\n".join(lines) + "\n")
    assert said in str(error.value) and str(error.value).startswith(f"{tmp_path / 'sweep.yaml'}")


def test_a_metric_of_held_out_rows_needs_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="metric: eval/loss needs rows that are held out; set val_set_size or test_datasets"):
        read(tmp_path, base=SFT)
    assert read(tmp_path, SWEEP.replace("eval/loss", "loss"), base=SFT).metric == "loss"


def test_a_key_that_another_one_hides_is_refused(tmp_path: Path) -> None:
    """Trials that differ in it would all be the same."""
    text = SWEEP.partition("space:")[0].replace("eval/loss", "reward") + "space: {rl_beta: [0.1, 0.2]}\n"
    with pytest.raises(ConfigError, match=r"space.rl_beta: with rl_beta=0.1: not used: trl.beta \(0.5\) wins over it"):
        read(tmp_path, text, base=GRPO + "  beta: 0.5\n")


def test_a_population_changes_what_a_job_can_change(tmp_path: Path) -> None:
    scheduler = "scheduler: {name: pbt, perturbation_interval: 5}\n"
    with pytest.raises(ConfigError, match="space.sequence_len: pbt cannot change it in the middle of a job; it can change l"):
        read(tmp_path, SWEEP.replace("sequence_len: [64, 128]", "sequence_len: {choice: [64, 128]}") + scheduler)
    with pytest.raises(ConfigError, match="max_concurrent: pbt compares trials that run at the same time, here all 6"):
        read(tmp_path, SWEEP + scheduler + "max_concurrent: 2\n")
    with pytest.raises(ConfigError, match="the space has grids only"):
        read(tmp_path, SWEEP.replace("{loguniform: [1e-6, 1e-4]}", "[1e-5]") + scheduler)
    assert read(tmp_path, SWEEP + scheduler).scheduler["quantile_fraction"] == 0.25


def test_a_trial_is_the_base_with_its_parameters(tmp_path: Path) -> None:
    config = read(tmp_path)
    (tmp_path / BASE_FILE).write_text(dump(config.base))
    order = Order(
        sweep=str(tmp_path),
        folder=str(tmp_path / "trials" / "0003"),
        number=3,
        params={"learning_rate": 2.5e-6, "trl.beta": 0.04, "special_tokens": {"pad_token": "a: 'b'"}},
        path="configs/job.yaml",
        folders=("/here", "/there"),
        resume_from=None,
        changes={"resources_per_worker": {"GPU": 0.5}},
        engines=None,
        parent=1,
    )
    job = order.config()
    assert (job.learning_rate, job.trl.beta, job.special_tokens) == (2.5e-6, 0.04, {"pad_token": "a: 'b'"})
    assert (job.output_dir, job.ray_run_name) == (str(tmp_path / "trials" / "0003"), f"{tmp_path.name}-0003")
    assert job.auto_resume_from_checkpoints and job.resume_from_checkpoint is None
    assert job.resources_per_worker == {"GPU": 0.5}
    assert job.source.folders == ["/here", "/there"]
    assert (job.sequence_len, job.val_set_size) == (config.base.sequence_len, 8)
