"""Dataset jobs before they start: batch arithmetic by hand, bundles, and the arguments that TRL's trainers get."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig
from trl.experimental.orpo import ORPOConfig

from actors import storage
from actors.dataset_loop import as_of_now, model_init_arguments
from actors.specs import DatasetTrainSpec, ModelSpec
from orchestrator.arguments import training_arguments
from orchestrator.dataset_plan import describe, make_dataset_plan
from orchestrator.jobs import attention, warmup_steps
from orchestrator.plan import Node
from orchestrator.schema import DatasetConfig, JobConfig

LAPTOP = [Node("laptop", {"CPU": 2.0})]
FOUR_GPUS = [Node("a", {"CPU": 16.0, "GPU": 2.0}), Node("b", {"CPU": 16.0, "GPU": 2.0})]


def job(**changes: Any) -> JobConfig:
    config = JobConfig(base_model="m", learning_rate=2e-4, micro_batch_size=4, gradient_accumulation_steps=3)
    config.datasets = [DatasetConfig(path="rows.jsonl")]
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(config, section) if section else config, key, value)
    return config


def arguments(**changes: Any) -> dict[str, Any]:
    return training_arguments(job(**changes), gpu=False, dtype="float32", steps_per_epoch=10, total_steps=40)


def test_steps() -> None:
    plan = make_dataset_plan(job(ray_num_workers=2), FOUR_GPUS)
    assert plan.rows_per_step == 4 * 3 * 2
    assert [plan.steps_per_epoch(rows) for rows in (1, 24, 25, 240)] == [1, 1, 2, 10]
    assert plan.total_steps(job(num_epochs=2.5), 240) == 25
    assert plan.total_steps(job(max_steps=7), 240) == 7


def test_every_worker_gets_its_bundle() -> None:
    plan = make_dataset_plan(job(ray_num_workers=4), FOUR_GPUS)
    assert plan.placement == (0, 0, 1, 1) and plan.dtype == "bfloat16" and plan.threads is None
    assert {str(bundle): dict(bundle.resources) for bundle in plan.bundles[:1]} == {"worker 0": {"CPU": 1.0, "GPU": 1.0}}
    assert "4 micro_batch_size x 3 gradient_accumulation_steps x 4 ray_num_workers = 48 rows a step" in "\n".join(
        describe(job(ray_num_workers=4), plan)
    )


def test_a_worker_too_many_is_named_with_what_would_fit() -> None:
    (problem,) = make_dataset_plan(job(ray_num_workers=5), FOUR_GPUS).problems
    assert problem.startswith("worker 4 needs 1 CPU + 1 GPU, but a has 14 CPU left; b has 14 CPU left")
    assert "ask for ray_num_workers: 4" in problem
    assert "share GPUs" not in problem  # two workers on one GPU are what NCCL refuses


def test_a_range_of_workers_needs_room_for_the_fewest() -> None:
    few = make_dataset_plan(job(ray_num_workers=[3, 6]), FOUR_GPUS)
    assert few.problems == [] and (few.min_workers, len(few.bundles), few.rows_per_step) == (3, 6, 4 * 3 * 6)
    assert "3 to 6, as many as there is room for, of Ray Train" in "\n".join(describe(job(), few))
    (problem,) = make_dataset_plan(job(ray_num_workers=[5, 6]), FOUR_GPUS).problems
    assert problem.startswith("worker 4 needs")


def test_noise_on_the_embeddings_is_what_the_job_says() -> None:
    assert arguments()["neftune_noise_alpha"] is None
    assert arguments(neftune_noise_alpha=5.0)["neftune_noise_alpha"] == 5.0


def test_a_step_has_the_same_rows_with_any_number_of_workers(tmp_path: Path) -> None:
    spec = DatasetTrainSpec(
        "sft", ModelSpec("m", "float32"), None, (), (), packed=False, rows_per_step=24, output_dir=str(tmp_path),
        job={}, arguments={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 99, "eval_on_start": True},
    )  # fmt: skip
    found = {count: as_of_now(spec, count) for count in (1, 2, 3)}
    assert [found[count].arguments["gradient_accumulation_steps"] for count in (1, 2, 3)] == [6, 3, 2]
    assert found[1].resume_from is None and found[1].arguments["eval_on_start"] is True
    for step, whole in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / storage.MANIFEST).touch()
    again = as_of_now(spec, 1)
    assert again.resume_from == str(tmp_path / "checkpoint-10") and again.arguments["eval_on_start"] is False


def test_workers_on_one_machine_share_its_cores() -> None:
    assert make_dataset_plan(job(), LAPTOP, "bfloat16").threads == 2
    two = make_dataset_plan(job(ray_num_workers=2), LAPTOP)
    assert (two.threads, two.dtype, two.placement) == (1, "float32", (0, 0))
    assert make_dataset_plan(job(ray_num_workers=2), [Node("head", {"CPU": 0.0}), *LAPTOP]).threads == 1


def test_save_and_eval_intervals() -> None:
    held_out = {"test_datasets": [DatasetConfig(path="x")]}
    found = arguments(save_steps=5, eval_steps=0.1, **held_out)
    assert (found["save_strategy"], found["save_steps"]) == ("steps", 5)
    assert (found["eval_strategy"], found["eval_steps"]) == ("steps", 0.1)
    assert arguments(saves_per_epoch=2, evals_per_epoch=5, **held_out)["eval_steps"] == 2
    assert arguments(saves_per_epoch=2)["save_steps"] == 5
    assert arguments()["save_steps"] == 10 and arguments()["eval_strategy"] == "no"
    assert arguments(**held_out)["eval_steps"] == 40, "held-out rows without an interval are measured at the end"
    assert arguments(save_strategy="no")["save_strategy"] == "no"


def test_what_a_person_wrote_arrives() -> None:
    found = arguments(warmup_ratio=0.1, cosine_min_lr_ratio=0.2, optimizer="adamw_8bit", weight_decay=0.3, seed=7)
    assert (found["warmup_steps"], found["optim"], found["weight_decay"], found["seed"]) == (4, "adamw_bnb_8bit", 0.3, 7)
    assert (found["lr_scheduler_type"], found["lr_scheduler_kwargs"]) == ("cosine_with_min_lr", {"min_lr_rate": 0.2})
    assert arguments(rl="kto", kto_undesirable_weight=0.0)["undesirable_weight"] == 0.0, "0 is a value, not an absence"
    assert arguments(rl="dpo", trl__beta=0.0)["beta"] == 0.0
    assert arguments(rl="ipo")["loss_type"] == "ipo"
    assert arguments(rl="orpo", orpo_alpha=0.3)["beta"] == 0.3
    assert arguments(rl="orpo", orpo_alpha=0.3, trl__beta=0.2)["beta"] == 0.2


def test_without_a_word_a_job_warms_up_as_axolotl_has_it() -> None:
    found = {steps: warmup_steps(job(), steps) for steps in (20, 40, 1000, 100_000)}
    assert found == {20: 0, 40: 1, 1000: 30, 100_000: 100}
    assert (warmup_steps(job(warmup_steps=0), 1000), warmup_steps(job(warmup_ratio=0.0), 1000)) == (0, 0)


def test_flash_attention_is_for_gpus_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(attn_implementation="flash_attention_2")
    assert [attention(asked, gpu) for gpu in (True, False)] == ["flash_attention_2", "sdpa"]
    assert attention(job(attn_implementation="eager"), True) == "eager" and attention(job(), True) is None
    asked_for = ModelSpec("m", "bfloat16", attn_implementation="flash_attention_2")
    spec = DatasetTrainSpec("sft", asked_for, None, (), (), False, "", 1, {}, {})
    for there, used in ((None, "sdpa"), (True, "flash_attention_2")):
        monkeypatch.setattr("actors.dataset_loop.find_spec", lambda name, there=there: there)
        assert model_init_arguments(spec)["attn_implementation"] == used


@pytest.mark.parametrize(
    ("rl", "config"),
    [(None, SFTConfig), ("dpo", DPOConfig), ("kto", KTOConfig), ("orpo", ORPOConfig), ("reward_trainer", RewardConfig)],
)
def test_trl_takes_every_argument(rl: str | None, config: type, tmp_path: Any) -> None:
    found = arguments(rl=rl, output_dir=str(tmp_path), test_datasets=[DatasetConfig(path="x")], early_stopping_patience=2)
    assert set(found) <= set(inspect.signature(config).parameters)
    config(**found)
