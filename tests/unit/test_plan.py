"""The plan: batch arithmetic by hand, and bundles on clusters that exist only here."""

from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.description import describe
from orchestrator.plan import Node, ensure_placeable, make_plan
from orchestrator.schema import JobConfig, JudgeConfig

LAPTOP = [Node("laptop", {"CPU": 2.0})]
TWO_GPUS = [Node("a", {"CPU": 16.0, "GPU": 2.0})]


def job(**changes: Any) -> JobConfig:
    config = JobConfig(
        rl="grpo", base_model="m", learning_rate=1.0, micro_batch_size=4, gradient_accumulation_steps=6, bf16=False
    )
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        setattr(getattr(config, section) if section else config, key, value)
    return config


def test_batch_arithmetic() -> None:
    # 4 x 6 = 24 completions; 24 / 8 = 3 prompts; 2 engines get 2 and 1; 100 / 3 = 33.3 steps an epoch
    plan = make_plan(job(num_epochs=2.0, warmup_ratio=0.1, ray__engines=2), TWO_GPUS, 100)
    assert (plan.completions_per_step, plan.prompts_per_step, plan.prompts_per_engine) == (24, 3, 2)
    assert plan.max_num_seqs == 16
    assert plan.total_steps == 67
    assert plan.warmup_steps == 7
    assert plan.save_steps == 33


def test_max_steps_wins_over_epochs() -> None:
    assert make_plan(job(max_steps=5, save_steps=2), LAPTOP, 100).total_steps == 5


def test_cpu_bundles_and_threads() -> None:
    plan = make_plan(job(), LAPTOP, 100)
    assert [(str(b), dict(b.resources)) for b in plan.bundles] == [("trainer 0", {"CPU": 1}), ("engine 0", {"CPU": 1})]
    assert plan.placement == (0, 0)
    assert (plan.trainer_threads, plan.engine_threads) == (2, 2)  # they take turns, so each may use the machine
    two = make_plan(job(ray__engines=2), LAPTOP, 100)
    assert (two.trainer_threads, two.engine_threads) == (2, 1)  # the engines sample at once
    behind_a_head = make_plan(job(ray__engines=2), [Node("head", {"CPU": 0.0}), *LAPTOP], 100)
    assert (behind_a_head.trainer_threads, behind_a_head.engine_threads) == (2, 1)
    asynchronous = make_plan(job(ray__max_staleness=1), LAPTOP, 100)
    assert (asynchronous.trainer_threads, asynchronous.engine_threads) == (1, 1)  # they run side by side


def test_when_to_save_and_evaluate() -> None:
    # 100 rows, 3 prompts a step: 33.3 steps an epoch, 67 steps in two
    def saves(**changes: Any) -> tuple[int, int | None]:
        plan = make_plan(job(num_epochs=2.0, **changes), LAPTOP, 100)
        return plan.save_steps, plan.eval_steps

    assert saves() == (33, None)
    assert saves(save_steps=5, eval_steps=4) == (5, 4)
    assert saves(save_steps=0.1, eval_steps=0.5) == (7, 34)
    assert saves(saves_per_epoch=3, evals_per_epoch=2) == (11, 17)


def test_gpu_bundles() -> None:
    plan = make_plan(job(), TWO_GPUS, 100)
    assert [dict(b.resources) for b in plan.bundles] == [{"CPU": 1, "GPU": 1.0}, {"CPU": 1, "GPU": 1}]
    assert (plan.trainer_threads, plan.engine_threads) == (None, None)
    ensure_placeable(plan.problems)


def test_a_gpu_can_be_shared() -> None:
    one = [Node("a", {"CPU": 8.0, "GPU": 1.0})]
    plan = make_plan(job(resources_per_worker={"GPU": 0.5}, ray__engine_gpus=0.5), one, 100)
    ensure_placeable(plan.problems)
    assert plan.gpu_memory_utilization == pytest.approx(0.45)


def test_a_reward_model_takes_of_a_gpu_what_a_trainer_takes() -> None:
    names = ["out/judge", "org/judge"]
    config = job(trl__reward_funcs=["a.b", *names], resources_per_worker={"GPU": 0.25})
    plan = make_plan(config, TWO_GPUS, 100, reward_models=names)
    rewards = [(str(bundle), dict(bundle.resources)) for bundle in plan.bundles[2:]]
    assert rewards == [("reward 0", {"GPU": 0.25}), ("reward 1", {"GPU": 0.25})]
    assert [plan.reward_bundle(name) for name in names] == [2, 3]
    ensure_placeable(plan.problems)
    lines = "\n".join(describe(config, plan))
    assert "reward 1: 0.25 GPU on a" in lines and "reward model org/judge: in reward 1" in lines
    assert "reward a.b: its own process" in lines
    four_gpus = [Node("a", {"CPU": 4.0, "GPU": 4.0})]
    several = make_plan(job(resources_per_worker={"GPU": 2.0}), four_gpus, 9, reward_models=names[:1])
    assert several.bundles[-1].resources == {"GPU": 1.0}  # it is one process on one GPU


def test_a_judge_reserves_nothing() -> None:
    judges = {"kind": JudgeConfig("http://host:8000/v1", "org/judge", "Rate {completion}")}
    config = job(trl__reward_funcs=["judge.kind", "a.b"], ray__judges=judges)
    plan = make_plan(config, TWO_GPUS, 100)
    assert [bundle.role for bundle in plan.bundles] == ["trainer", "engine"]
    lines = "\n".join(describe(config, plan))
    assert "reward judge.kind: asks org/judge at http://host:8000/v1 from its own process, no reserved CPU" in lines
    assert "reward a.b: its own process" in lines


def test_a_reward_model_that_has_no_gpu_left_is_told_what_would_fit() -> None:
    with pytest.raises(ConfigError) as error:
        ensure_placeable(make_plan(job(), TWO_GPUS, 100, reward_models=["out/judge"]).problems)
    text = str(error.value)
    assert "reward 0 needs 1 GPU, but a has 14 CPU left" in text
    assert "resources_per_worker: {GPU: 0.5} and ray.engine_gpus: 0.5" in text
    shared = job(resources_per_worker={"GPU": 0.5})
    ensure_placeable(make_plan(shared, TWO_GPUS, 100, reward_models=["out/judge"]).problems)


def test_reward_models_on_cpus_reserve_nothing_and_take_turns() -> None:
    plan = make_plan(job(trl__reward_funcs=["out/judge"]), LAPTOP, 100, reward_models=["out/judge"])
    assert [str(bundle) for bundle in plan.bundles] == ["trainer 0", "engine 0"]
    assert plan.reward_bundle("out/judge") is None
    assert plan.reward_threads == 2
    lines = "\n".join(describe(job(trl__reward_funcs=["out/judge"]), plan))
    assert "reward model out/judge: its own process, up to 2 thread(s), no reserved CPU" in lines
    assert make_plan(job(), LAPTOP, 100, reward_models=["a/b", "c/d"]).reward_threads == 1
    assert make_plan(job(ray__max_staleness=1), LAPTOP, 100, reward_models=["a/b"]).reward_threads == 1


def test_what_does_not_fit_and_what_would() -> None:
    one = [Node("a", {"CPU": 8.0, "GPU": 1.0})]
    with pytest.raises(ConfigError) as error:
        ensure_placeable(make_plan(job(), one, 100).problems)
    text = str(error.value)
    assert "engine 0 needs 1 CPU + 1 GPU, but a has 7 CPU left" in text
    assert "resources_per_worker: {GPU: 0.5} and ray.engine_gpus: 0.5" in text
    assert "add a node with 1 CPU + 1 GPU" in text


def test_cpus_that_are_missing() -> None:
    with pytest.raises(ConfigError, match=r"engine 0 needs 2 CPU, but laptop has 1 CPU left; lower ray.engine_cpus"):
        ensure_placeable(make_plan(job(ray__engine_cpus=2), LAPTOP, 100).problems)


def test_ranks_have_bundles_and_share_the_batch() -> None:
    plan = make_plan(job(ray_num_workers=3, ray__engines=2), [Node("a", {"CPU": 12.0})], 100)
    assert [str(bundle) for bundle in plan.bundles] == ["trainer 0", "trainer 1", "trainer 2", "engine 0", "engine 1"]
    assert (plan.completions_per_step, plan.prompts_per_step) == (72, 9)
    assert (plan.trainer_threads, plan.engine_threads) == (4, 6)
    assert "4 micro_batch_size x 6 gradient_accumulation_steps x 3 ray_num_workers = 72 completions a step" in " ".join(
        " ".join(describe(job(ray_num_workers=3), plan)).split()
    )


def test_colocated_engines_share_the_bundles_of_the_ranks() -> None:
    config = job(ray_num_workers=2, trl__vllm_mode="colocate", trl__vllm_enable_sleep_mode=True)
    plan = make_plan(config, TWO_GPUS, 100)
    ensure_placeable(plan.problems)
    bundles = [(str(bundle), dict(bundle.resources)) for bundle in plan.bundles]
    assert bundles == [(f"trainer and engine {i}", {"CPU": 2, "GPU": 1}) for i in range(2)]
    assert plan.prompts_per_engine == 3
    assert "trainer and engine share a GPU; engines sleep while the trainer computes" in " ".join(describe(config, plan))
    with pytest.raises(ConfigError, match="trainer and engine 2 needs .*ask for ray_num_workers: 2"):
        config.ray_num_workers = 3
        ensure_placeable(make_plan(config, TWO_GPUS, 100).problems)


def test_two_ranks_never_meet_on_one_gpu() -> None:
    for share in (0.5, 0.3):
        with pytest.raises(ConfigError, match="resources_per_worker.GPU: .* NCCL refuses; use more than 0.5"):
            make_plan(job(ray_num_workers=2, resources_per_worker={"GPU": share}), TWO_GPUS, 100)
    make_plan(job(ray_num_workers=2, resources_per_worker={"GPU": 0.6}, ray__engine_gpus=0.4), TWO_GPUS, 100)
    with pytest.raises(ConfigError) as error:
        ensure_placeable(make_plan(job(ray_num_workers=2), TWO_GPUS, 100).problems)
    assert "engine 0 needs" in str(error.value) and "0.5" not in str(error.value)


def test_a_colocated_engine_needs_a_share() -> None:
    with pytest.raises(ConfigError, match="resources_per_worker.GPU: is 0, but with vllm_mode: colocate"):
        make_plan(job(trl__vllm_mode="colocate", resources_per_worker={"GPU": 0}), TWO_GPUS, 100)


def test_what_the_adapter_stands_on_is_told() -> None:
    config = job(adapter="qlora", load_in_4bit=True, lora_r=16, lora_alpha=32)
    lines = describe(config, make_plan(config, LAPTOP, 100))
    assert "adapter     QLoRA r=16 alpha=32, on a base in NF4" in lines


def test_a_tensor_parallel_engine_is_one_bundle() -> None:
    # Each of its GPUs talks to the others at every layer, so no two of them may lie on different nodes.
    nodes = [Node("a", {"CPU": 16.0, "GPU": 2.0}), Node("b", {"CPU": 16.0, "GPU": 4.0})]
    plan = make_plan(job(vllm__tensor_parallel_size=4, ray_num_workers=2), nodes, 100)
    assert [bundle.resources["GPU"] for bundle in plan.bundles] == [1, 1, 4]
    assert plan.placement == (0, 0, 1)
    short = make_plan(job(vllm__tensor_parallel_size=4), [nodes[0], nodes[0]], 100)
    with pytest.raises(ConfigError, match="engine 0 needs 1 CPU . 4 GPU"):
        ensure_placeable(short.problems)


def test_sixty_four_gpus_on_eight_nodes() -> None:
    nodes = [Node(f"n{i}", {"CPU": 64.0, "GPU": 8.0}) for i in range(8)]
    plan = make_plan(job(ray__engines=63), nodes, 1000)
    ensure_placeable(plan.problems)
    placed = [plan.placement.count(i) for i in range(8)]
    assert placed == [8] * 8
    with pytest.raises(ConfigError, match="engine 63 needs .*ask for ray.engines: 63"):
        ensure_placeable(make_plan(job(ray__engines=64), nodes, 1000).problems)


def test_a_message_does_not_grow_with_the_cluster() -> None:
    """Sixteen engines of a thousand have no place: that is one line, with the number of engines that there is room for."""
    nodes = [Node(f"n{i}", {"CPU": 128.0, "GPU": 8.0}) for i in range(63)]
    problems = make_plan(job(ray_num_workers=24, ray__engines=976, ray__engine_gpus=0.5), nodes, 10_000).problems
    assert len(problems) == 1 and len(problems[0]) < 400, problems
    assert problems[0].startswith("engine 960 and 15 more need 1 CPU + 0.5 GPU, but n0 has ")
    assert "none of the other 59 nodes has room; " in problems[0] and "ask for ray.engines: 960" in problems[0]
    few = [Node("a", {"CPU": 1.0}), Node("b", {"CPU": 1.0})]
    both = make_plan(job(ray__trainer_cpus=2, ray__engine_cpus=2), few, 10).problems
    assert [line.split(" needs")[0] for line in both] == ["trainer 0", "engine 0"]


def test_a_bundle_never_spans_two_nodes() -> None:
    nodes = [Node("a", {"CPU": 1.0}), Node("b", {"CPU": 1.0})]
    assert make_plan(job(), nodes, 10).placement == (0, 1)
    assert make_plan(job(ray__trainer_cpus=2), nodes, 10).placement[0] is None


def test_dtype_follows_the_configuration() -> None:
    assert make_plan(job(bf16=True), LAPTOP, 10).dtype == "bfloat16"
    assert make_plan(job(bf16=False), LAPTOP, 10).dtype == "float32"
    assert make_plan(job(bf16="auto"), TWO_GPUS, 10).dtype == "bfloat16"
    assert make_plan(job(bf16="auto"), LAPTOP, 10, "bfloat16").dtype == "bfloat16"
    assert make_plan(job(vllm__dtype="float"), TWO_GPUS, 10).dtype == "float32"


def test_an_engine_without_a_gpu_on_a_gpu_cluster_is_refused() -> None:
    with pytest.raises(ConfigError, match="ray.engine_gpus: is 0, but the cluster has GPUs"):
        make_plan(job(ray__engine_gpus=0.0), TWO_GPUS, 10)


def test_a_worker_may_ask_for_any_resource_that_ray_counts() -> None:
    asked = {"GPU": 1.0, "CPU": 2.0, "fast_disk": 1.0}
    plan = make_plan(job(resources_per_worker=asked), [Node("a", {"CPU": 8.0, "fast_disk": 1.0, "node:a": 1.0})], 10)
    assert plan.bundles[0].resources == {"CPU": 2.0, "fast_disk": 1.0}
    assert plan.placement == (0, 0)
    assert any("trainer 0: 2 CPU + 1 fast_disk on a" in line for line in describe(job(), plan))
    missing = make_plan(job(resources_per_worker=asked), LAPTOP, 10)
    assert "trainer 0 needs 2 CPU + 1 fast_disk" in missing.problems[0]


@pytest.mark.parametrize(("changes", "warned"), [({}, True), ({"adapter": "lora"}, False), ({"bf16": False}, False)])
def test_updates_that_bfloat16_loses_are_told_of(changes: dict[str, Any], warned: bool) -> None:
    config = job(**{"bf16": True, **changes})
    lines = describe(config, make_plan(config, TWO_GPUS, 100))
    assert any("small updates vanish in bfloat16" in line for line in lines) == warned
