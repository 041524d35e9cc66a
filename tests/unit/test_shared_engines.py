"""What jobs may differ in that share engines, and what the engines themselves reserve."""

from pathlib import Path

import pytest

from actors.specs import LoraSpec
from orchestrator.config import load
from orchestrator.plan import Node, make_plan
from orchestrator.shared_engines import SharedEngines, _widest, engines_plan, unshareable
from tests.job_files import FULL_GRPO, GRPO, SFT, grpo, write


@pytest.mark.parametrize(
    "overrides",
    [
        ["learning_rate=1e-4", "seed=7", "trl.beta=0.1", "trl.temperature=0.7", "trl.max_completion_length=64"],
        ["lora_r=64", "lora_alpha=8", "lora_target_linear=false", "lora_target_modules=[q_proj]"],
        ["trl.num_generations=2", "gradient_accumulation_steps=4", "ray.max_staleness=1", "max_steps=5"],
    ],
)
def test_trials_may_differ_in_what_is_trained_and_drawn(tmp_path: Path, overrides: list[str]) -> None:
    assert unshareable(grpo(tmp_path), [grpo(tmp_path), grpo(tmp_path, "", *overrides)]) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["base_model=org/other"], "made of: model;"),
        (["sequence_len=1024"], "made of: max_model_len;"),
        (["bf16=false"], "made of: model;"),
        (["trl.chat_template_kwargs={enable_thinking: true}"], "made of: chat_template_kwargs;"),
        (["vllm.enforce_eager=true"], "made of: enforce_eager;"),
        (["ray.engines=2"], "are the base's; take ray.engines, ray.engine_gpus"),
        (["ray.kv_cache_gib=2"], "ray.kv_cache_gib out of the space"),
        (["ray.sync=fused"], "(ray.sync: adapter)"),
        (["trl.vllm_mode=colocate"], "every rank has an engine of its own"),
    ],
)
def test_trials_may_not_differ_in_what_an_engine_is_made_of(tmp_path: Path, overrides: list[str], message: str) -> None:
    own = grpo(tmp_path, "", "bf16=true")
    assert message in str(unshareable(own, [own, grpo(tmp_path, "", "bf16=true", *overrides)]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SFT, "only jobs of rl: grpo"),
        (FULL_GRPO, "adapter: lora on a base that is not quantized"),
        (GRPO.replace("adapter: lora", "adapter: qlora\nload_in_4bit: true"), "adapter: lora on a base that is not quantized"),
        (GRPO + "load_in_8bit: true\n", "adapter: lora on a base that is not quantized"),
        (GRPO.replace("trl:\n", "trl:\n  vllm_mode: colocate\n"), "every rank has an engine of its own"),
    ],
)
def test_what_cannot_be_shared_at_all(tmp_path: Path, text: str, message: str) -> None:
    config = load(write(tmp_path, text))
    assert message in str(unshareable(config, [config]))


def test_engines_have_room_for_each_adapter() -> None:
    """vLLM would leave out, without a word, what a trial trains elsewhere."""
    attention, output = LoraSpec(8, 16, target_modules=("q_proj", "v_proj")), LoraSpec(64, 8, target_modules=("o_proj",))
    widest = _widest([attention, output])
    assert (widest.r, widest.target_modules) == (64, ("o_proj", "q_proj", "v_proj"))
    assert _widest([attention, LoraSpec(4, 4)]).target_modules == "all-linear"


def test_engines_have_bundles_once_and_trials_none_for_them(tmp_path: Path) -> None:
    """Four trials of one GPU each beside two engines need six GPUs, not twelve."""
    config = grpo(tmp_path, "", "ray.engines=2")
    nodes = [Node("a", {"CPU": 32.0, "GPU": 6.0})]
    engines, trial = engines_plan(config, nodes), make_plan(config, nodes, 100, shared=True)
    assert [str(bundle) for bundle in engines.bundles] == ["engine 0", "engine 1"]
    assert [str(bundle) for bundle in trial.bundles] == ["trainer 0"]
    gpus = sum(bundle.resources["GPU"] for bundle in (*engines.bundles, *(4 * trial.bundles)))
    assert gpus == 6
    laptop = [Node("laptop", {"CPU": 8.0})]
    beside, alone = make_plan(config, laptop, 100, shared=True), make_plan(config, laptop, 100)
    assert (beside.trainer_threads, alone.trainer_threads) == (1, 8), "trials compute side by side"
    alone = make_plan(config, nodes, 100)
    assert trial.prompts_per_engine == alone.prompts_per_engine and trial.max_num_seqs == alone.max_num_seqs


def test_a_record_is_read_back() -> None:
    shared = SharedEngines("somewhere", ("engine 0", "engine 1")).of("trial 3")
    assert SharedEngines.from_record(shared.record()) == shared
