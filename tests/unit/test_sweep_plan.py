"""How many trials fit on clusters that exist only here, how small ones share GPUs, and what is said of the time."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.config import dump, load
from orchestrator.hardware import GIB, said
from orchestrator.plan import Node
from orchestrator.planning import Read
from orchestrator.schema import JobConfig
from orchestrator.space import read_space
from orchestrator.sweep_config import SweepConfig
from orchestrator.sweep_plan import Samples, SweepPlan, make
from orchestrator.sweep_plan_command import Earlier, earlier, show, text
from tests.job_files import SFT, write
from tests.models import model_job, save_configs

GRPO: dict[str, Any] = {
    "rl": "grpo", "sequence_len": 1024, "trl__max_completion_length": 512, "micro_batch_size": 2,
    "gradient_accumulation_steps": 8, "gradient_checkpointing": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_configs(tmp_path_factory.mktemp("models"))


def plan(config: JobConfig, cluster: str | list[Node], trials: int, samples: Samples = (), **options: Any) -> SweepPlan:
    nodes = said(cluster) if isinstance(cluster, str) else cluster
    return make(config, nodes, Read(config, 100, (), None), trials, samples, **options)


def small(models: dict[str, str], **changes: Any) -> JobConfig:
    """A job that needs about 5 GB of a GPU."""
    return model_job(models["Qwen2.5-1.5B"], "lora", sequence_len=1024, gradient_checkpointing=True, **changes)


def test_trials_share_no_gpu_while_there_is_one_for_each(models: dict[str, str]) -> None:
    found = plan(small(models), "2x8x80GB", 12)
    assert (found.at_once, found.rounds, found.changes, found.crowd) == (12, 1, {}, 1)


def test_small_trials_share_gpus_as_few_on_each_as_will_do(models: dict[str, str]) -> None:
    found = plan(small(models), "8x80GB", 20)
    assert found.changes == {"resources_per_worker": {"GPU": 0.33}}, "two on each of eight would be 16"
    assert (found.at_once, found.rounds, found.crowd) == (20, 1, 3)
    found = plan(small(models), "8x80GB", 100)
    assert (found.at_once, found.rounds, found.changes) == (32, 4, {"resources_per_worker": {"GPU": 0.25}})
    assert plan(small(models), "8x80GB", 100, max_concurrent=10).at_once == 10


def test_only_as_many_share_as_its_memory_holds(models: dict[str, str]) -> None:
    needs = plan(small(models), "1x80GB", 1).largest
    just = [Node("a", {"CPU": 16.0, "GPU": 1.0}, gpu_bytes=3 * needs)]
    assert plan(small(models), just, 4).at_once == 3
    less = [Node("a", {"CPU": 16.0, "GPU": 1.0}, gpu_bytes=3 * needs - 1)]
    assert plan(small(models), less, 4).at_once == 2
    unknown = [Node("a", {"CPU": 16.0, "GPU": 1.0})]
    assert plan(small(models), unknown, 4).at_once == 1


def test_a_trainer_and_an_engine_share_too(models: dict[str, str]) -> None:
    config = model_job(models["Qwen2.5-1.5B"], "lora", **GRPO)
    # Whole GPUs: two a trial. Halves: one a trial.
    assert plan(config, "8x80GB", 4).changes == {}
    found = plan(config, "8x80GB", 8)
    assert found.changes == {"resources_per_worker": {"GPU": 0.5}, "ray.engine_gpus": 0.5}
    assert found.at_once == 8


def test_shared_engines_are_placed_once(models: dict[str, str]) -> None:
    config = model_job(models["Llama-3.1-8B"], "lora", **GRPO, ray__engines=2)
    alone = plan(config, "8x80GB", 6)
    # Three actors each are 18 for 8 GPUs: two on each hold 16 of them.
    assert (alone.at_once, alone.engines) == (6, 0)
    assert alone.changes == {"resources_per_worker": {"GPU": 0.33}, "ray.engine_gpus": 0.33}
    shared = plan(config, "8x80GB", 6, share_engines=True)
    assert (shared.at_once, shared.engines, shared.changes) == (6, 2, {})
    more = plan(config, "8x80GB", 7, share_engines=True)
    assert set(more.changes) == {"resources_per_worker"}, "the engines keep their GPUs"
    assert more.at_once == 7


def test_no_more_share_an_engine_than_its_gpu_has_room_for_their_adapters(models: dict[str, str]) -> None:
    """Rank 16 on the seven linear layers of Llama 3.1 8B is 83.9 MB in bfloat16; a version is proven beside the last one."""
    adapter = 2 * 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    needs = {"weights": 16_060_522_496, "activations": 973_078_528, "overhead": 1_073_741_824}
    one_sequence = 1024 * 32 * 2 * 8 * 128 * 2
    three = sum(needs.values()) + 4 * adapter + one_sequence
    nodes = [Node("a", {"CPU": 64.0, "GPU": 8.0}, gpu_bytes=24 * GIB)]

    def at_once(nbytes: int) -> int:
        share = (nbytes + 1000) / (24 * GIB)
        config = model_job(models["Llama-3.1-8B"], "lora", **GRPO, vllm__gpu_memory_utilization=share)
        return plan(config, nodes, 7, share_engines=True).at_once

    assert (at_once(three), at_once(three + adapter - 2000), at_once(three + adapter)) == (3, 3, 4)
    found = plan(model_job(models["Llama-3.1-8B"], "lora", **GRPO), nodes, 7, share_engines=True)
    assert found.at_once == 7 and found.job.fit.engine is not None
    assert found.job.fit.engine.awake.terms["weights"] == needs["weights"] + 8 * adapter


def test_what_the_base_or_the_space_says_of_gpus_stands(models: dict[str, str], tmp_path: Path) -> None:
    job = SFT + "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\ngradient_checkpointing: true\n"
    overrides = [f"base_model={models['Qwen2.5-1.5B']}", "sequence_len=1024"]
    assert plan(load(write(tmp_path, job), overrides), "1x80GB", 4).at_once == 4
    said_so = load(write(tmp_path, job + "resources_per_worker: {GPU: 1}\n"), overrides)
    assert plan(said_so, "1x80GB", 4).at_once == 1
    halves = load(write(tmp_path, job), [*overrides, "resources_per_worker={GPU: 0.4}"])
    found = plan(halves, "3x80GB", 9)
    assert (found.at_once, found.changes) == (6, {}), "a share lies on one GPU: two on each, and 0.2 of each is left"
    varied = [("ray_num_workers", {"ray_num_workers": 1}), ("ray_num_workers", {"ray_num_workers": 2})]
    assert plan(load(write(tmp_path, job), overrides), "4x80GB", 9, varied).at_once == 2


def test_ranks_of_one_trial_never_meet_on_a_gpu(models: dict[str, str]) -> None:
    found = plan(small(models, ray_num_workers=4), "8x80GB", 4)
    assert (found.at_once, found.changes) == (2, {})


def test_the_largest_value_of_each_key_counts(models: dict[str, str]) -> None:
    of_base = plan(small(models), "1x80GB", 1).largest
    rows = [("micro_batch_size", {"micro_batch_size": size}) for size in (1, 16, 4)]
    ranks = [("lora_r", {"lora_r": rank}) for rank in (64, 8)]
    found = plan(small(models), "1x80GB", 1, [*ranks, *rows])
    assert (found.job.config.micro_batch_size, found.job.config.lora_r) == (16, 64)
    assert found.largest > of_base


def test_nodes_are_filled_one_by_one(models: dict[str, str]) -> None:
    config = small(models, ray_num_workers=3, ray__trainer_cpus=4)
    gpus = [Node(f"n{i}", {"CPU": 16.0, "GPU": 4.0}, gpu_bytes=80 * GIB) for i in range(3)]
    assert plan(config, gpus, 9).at_once == 4, "a trial may lie on two nodes: twelve GPUs"
    few_cpus = [Node(f"n{i}", {"CPU": 9.0, "GPU": 4.0}, gpu_bytes=80 * GIB) for i in range(3)]
    assert plan(config, few_cpus, 9).at_once == 2, "nine CPUs are two ranks a node, six in all"


def test_without_gpus_cpus_and_memory_decide(models: dict[str, str]) -> None:
    config = small(models)
    needs = plan(config, [Node("a", {"CPU": 8.0})], 1).largest
    assert plan(config, [Node("a", {"CPU": 8.0})], 20).at_once == 8
    found = plan(config, [Node("a", {"CPU": 8.0}, memory=3 * needs), Node("b", {"CPU": 2.0}, memory=9 * needs)], 20)
    assert (found.at_once, found.crowd) == (5, 3)
    # A job starts also where its memory may not suffice, and so does one trial at a time.
    tight = plan(config, [Node("a", {"CPU": 8.0}, memory=needs - 1)], 20)
    assert tight.at_once == 1 and tight.job.problems
    assert plan(small(models, ray_num_workers=9), [Node("a", {"CPU": 8.0})], 20).at_once == 0


def test_what_a_person_is_told(models: dict[str, str]) -> None:
    found = plan(small(models, max_steps=50), "8x80GB", 40)
    lines = text(found, Earlier("outputs/base", step_s=3.0, steps=None), "asha")
    assert lines[0] == "trials      40, 32 at once on 8 x 80 GB, so 2 round(s)"
    assert "4 actors a GPU: each trial with resources_per_worker={GPU: 0.25}" in lines[1]
    assert "steps       40 x 50 = 2,000" in lines
    (spent,) = [line for line in lines if line.startswith("time")]
    assert spent.startswith("time        at most 20m00s: steps of 3 s, as in outputs/base")  # 2 rounds x 50 x 3 s x 4 a GPU
    assert "asha stops some early" in spent
    assert "asha" not in " ".join(text(found, Earlier("outputs/base", 3.0, None), "none"))
    unknown = " ".join(text(found, Earlier("outputs/base", None, None), "none"))
    assert "not known: outputs/base holds no steps of such a job" in unknown


def test_an_earlier_run_tells_how_long_steps_take(models: dict[str, str], tmp_path: Path) -> None:
    ran = small(models, output_dir=str(tmp_path))
    assert earlier(ran) == Earlier(str(tmp_path), None, None)
    (tmp_path / "config.yaml").write_text(dump(ran))
    records = [{"time": 1.0, "kind": "train", "step": i, "step_s": s} for i, s in enumerate((60.0, 2.0, 4.0), start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "events.jsonl").write_text('{"time": 1.0, "kind": "plan", "steps": 30}\n')
    assert earlier(ran) == Earlier(str(tmp_path), step_s=4.0, steps=30)
    ran.learning_rate, ran.num_epochs = 1.0, 7.0
    assert earlier(ran) == Earlier(str(tmp_path), step_s=4.0, steps=None), "steps as long, but not as many"
    ran.sequence_len = 512
    assert earlier(ran) == Earlier(str(tmp_path), None, None)


def test_show_prints_it_and_refuses_what_does_not_fit(
    models: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("orchestrator.sweep_plan_command.read", lambda config: Read(config, 0, (), None))
    config = small(models, output_dir=str(tmp_path), max_steps=10)
    show(a_sweep(config, {"learning_rate": [1e-5]}, scheduler={"name": "asha"}), "2x80GB")
    printed = capsys.readouterr().out
    assert "trials      4, 4 at once on 2 x 80 GB, so 1 round(s)" in printed and "worker 0" in printed
    whole = model_job(models["Llama-3.1-8B"], None, output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="cannot hold a trial of this sweep:\n  worker 0 needs"):
        show(a_sweep(whole, {"learning_rate": [1e-5]}), "1x24GB")
    with pytest.raises(ConfigError, match="sequence_len=8192 micro_batch_size=64 --cluster 1x24GB`"):
        show(a_sweep(config, {"sequence_len": [64, 8192], "micro_batch_size": [64]}), "1x24GB")
    with pytest.raises(ConfigError, match="pbt compares trials that run at the same time, here 40, and there is room for 4"):
        show(a_sweep(config, {"learning_rate": [1e-5]}, num_samples=40, scheduler={"name": "pbt"}), "1x80GB")


def a_sweep(base: JobConfig, space: dict[str, Any], **changes: Any) -> SweepConfig:
    given = {"output_dir": Path("out"), "metric": "loss", "mode": "min", "num_samples": 4, **changes}
    return SweepConfig(base, read_space(space)[0], **given)


def test_trials_that_differ_in_length_or_cost_have_no_time(models: dict[str, str]) -> None:
    found, before = plan(small(models, max_steps=50), "8x80GB", 2), Earlier("outputs/base", step_s=3.0, steps=None)
    for varied, line in {
        "max_steps": "steps       not the same for all trials",
        "sequence_len": "time        not known: steps take longer or shorter with another sequence_len",
    }.items():
        assert line in text(found, before, "none", [varied])
