"""What this version runs, and what it names instead: every key, method and reward that a job file may hold."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from actors.errors import ConfigError
from actors.specs import JudgeSpec, RewardModelSpec, RewardSpec, SandboxSpec
from orchestrator import dataset_keys, online_keys
from orchestrator.config import dump, load
from orchestrator.plan import Node, make_plan
from orchestrator.rewards import ensure_rewards, reward_models, reward_specs
from orchestrator.runnable import ensure_runnable, keys
from tests.job_files import FULL_GRPO, GRPO, SFT, grpo, messages, write


@pytest.mark.parametrize("tables", [online_keys, dataset_keys], ids=lambda tables: tables.__name__)
def test_every_key_is_acted_on_or_named(tables: ModuleType) -> None:
    acts_on, idle, not_yet = set(tables.ACTS_ON), set(tables.IDLE), set(tables.NOT_YET)
    assert acts_on | idle | not_yet == set(keys())
    assert not acts_on & idle and not acts_on & not_yet and not idle & not_yet
    assert {key for key, _, _ in tables.LIMITS} <= acts_on | idle


def test_grpo_runs(tmp_path: Path) -> None:
    ensure_runnable(
        grpo(
            tmp_path,
            "sdp_attention: true\nmodel_type: AutoModelForCausalLM\ntokenizer_type: AutoTokenizer\nsave_steps: 5\n"
            "val_set_size: 0.1\neval_steps: 5\nchat_template: tokenizer_default\nlr_scheduler: constant\n",
        )
    )


@pytest.mark.parametrize("rl", ["simpo"])
def test_later_methods_load_and_are_named(tmp_path: Path, rl: str) -> None:
    config = load(write(tmp_path, SFT + f"rl: {rl}\n"))
    assert config.rl == rl
    with pytest.raises(ConfigError, match=f":4: rl: {rl} is not implemented yet: this version of Eagleray runs grpo, dpo"):
        ensure_runnable(config)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("ray_num_workers: [1, 2]\nfsdp_version: 2\n", ":4: ray_num_workers: a model in shards belongs to one number"),
        ("ray_num_workers: [1, 2]\nstreaming: true\nmax_steps: 9\n", ":4: ray_num_workers: a stream cannot be dealt anew"),
        ("ray_num_workers: [2, 4]\n", ":4: ray_num_workers: 3 workers cannot share the 4 micro batches of a step"),
        ("ray_num_workers: [2, 4]\n", "use a gradient_accumulation_steps that 3 divides"),
        ("rl: kto\n", "micro_batch_size: is 1; kto compares each answer with those of the other rows of its batch"),
        ("rl: dpo\ndpo_loss_type: [sigmoid, sigmod]\n", "dpo_loss_type: 'sigmod' is not one of sigmoid, hinge"),
        ("early_stopping_patience: 2\n", "early_stopping_patience: there are no rows to evaluate on"),
        ("lr_scheduler: linear\ncosine_min_lr_ratio: 0.1\n", "cosine_min_lr_ratio: lr_scheduler: linear has no such floor"),
        ("lr_scheduler: cosine_with_min_lr\n", "lr_scheduler: cosine_with_min_lr needs its floor"),
        ("saves_per_epoch: 2\nsave_strategy: epoch\n", "save_strategy: epoch contradicts saves_per_epoch"),
    ],
)
def test_contradictions_of_dataset_jobs(tmp_path: Path, extra: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        load(write(tmp_path, SFT + extra))


@pytest.mark.parametrize("rl", [None, "dpo", "ipo", "kto", "orpo", "reward_trainer"])
def test_dataset_methods_run(tmp_path: Path, rl: str | None) -> None:
    own = {None: "alpaca", "reward_trainer": "bradley_terry.chat_template"}.get(rl, "chatml.intel")
    text = SFT.replace("alpaca", own) + "micro_batch_size: 2\n" + (f"rl: {rl}\n" if rl else "")
    ensure_runnable(load(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("context_parallel_size: 2\n", "context_parallel_size: is not implemented yet"),
        ("optimizer: muon\n", "optimizer: muon is not implemented yet; use one of adamw_torch"),
        ("lr_scheduler: rex\n", "lr_scheduler: rex is not implemented yet"),
        ("bnb_config_kwargs: {a: 1}\n", "bnb_config_kwargs: is not implemented yet"),
        ("bnb_config_kwargs: {bnb_4bit_quant_type: fp4}\n", "bnb_config_kwargs: is not implemented yet"),
        ("dp_shard_size: 2\n", "dp_shard_size: is not implemented yet"),
        ("test_datasets: [{path: x, type: creative_acr.load_answer}]\n", "creative_acr.load_answer is not implemented yet"),
        ("test_datasets: [{path: x, type: messages.chat}]\n", "messages.chat is not implemented yet; use chat_template, with"),
        ("test_datasets: [{path: x, type: llama2_chat}]\n", "llama2_chat is not implemented yet; use chat_template, with"),
        ("test_datasets: [{path: x, type: reflection}]\n", "reflection is not implemented yet; write the rows"),
        ("test_datasets: [{path: x, type: mine.rows}]\n", "mine.rows is a function of your own"),
        ("pretraining_dataset: x\nmax_steps: 3\n", "use datasets with type: completion, streaming: true and max_steps"),
    ],
)
def test_what_dataset_methods_do_not_do_is_named(tmp_path: Path, extra: str, expected: str) -> None:
    config = load(write(tmp_path, SFT + extra))
    with pytest.raises(ConfigError, match=re.escape(expected)):
        ensure_runnable(config)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("bnb_config_kwargs: {a: 1}\n", "bnb_config_kwargs: is not implemented yet; NF4"),
        ("fsdp_config: {a: 1}\n", "fsdp_config.a: is not an option that Eagleray knows"),
        ("fsdp_config: {reshard_after_forward: false}\n", "fsdp_config.reshard_after_forward: false is not possible"),
        ("fsdp_config: {fsdp_offload_params: true}\n", "fsdp_config.offload_params: is not possible with rl: grpo yet"),
        ("deepspeed: z.json\n", "deepspeed: there is no file z.json"),
        ("lora_model_dir: a\nfsdp_version: 2\nrl_beta: 0.1\n", "lora_model_dir: the KL term's second adapter"),
        ("ray_num_workers: [1, 2]\n", "ray_num_workers: a trainer's ranks cannot change while it runs"),
        ("vllm: {data_parallel_size: 2}\n", "vllm.data_parallel_size: use ray.engines"),
        ("tensor_parallel_size: 2\n", "tensor_parallel_size: is not implemented yet"),
        ("context_parallel_size: 2\n", "context_parallel_size: is not implemented yet"),
        ("wandb_watch: all\n", "wandb_watch: gradients are not watched; remove it"),
        ("wandb_log_model: checkpoint\n", "wandb_log_model: checkpoint is not implemented yet; end uploads the result"),
        ("hub_model_id: a/b\n", "hub_model_id: pushing to the hub"),
        ("streaming: true\nmax_steps: 3\n", "streaming: is not implemented yet"),
        ("plugins: [mine.Plugin]\n", "plugins: ['mine.Plugin'] cannot be loaded"),
        ("special_tokens: {eos_token: x}\n", "special_tokens: {'eos_token': 'x'} is not implemented yet"),
        ("optimizer: lomo\n", "optimizer: lomo is not implemented yet; use adamw_torch_fused or adamw_torch"),
        ("lr_scheduler: rex\n", "lr_scheduler: rex is not implemented yet"),
        ("lr_scheduler: cosine_with_min_lr\n", "lr_scheduler: cosine_with_min_lr is not implemented yet; use one of linear"),
        ("cosine_min_lr_ratio: 0.1\n", "cosine_min_lr_ratio: rl: grpo has no schedule with a floor yet; remove it"),
        ("model_type: LlamaModel\n", "model_type: LlamaModel is no class of language models; remove the key"),
        ("tokenizer_type: Llama\n", "tokenizer_type: Llama is no class of tokenizers; remove the key"),
        ("attn_implementation: xformers\n", "attn_implementation: xformers is not implemented yet"),
        ("lora_modules_to_save: [lm_head]\n", "lora_modules_to_save: only LoRA weights are synchronized"),
        ("  generation_kwargs: {n: 3}\n", "trl.generation_kwargs: takes stop, "),
        ("test_datasets: [{path: x, type: alpaca}]\n", "test_datasets[0].type: alpaca: rl: grpo does not read it"),
        ("lora_target_modules: embed_tokens\n", "lora_target_modules: embeddings cannot be synchronized"),
        (
            "test_datasets: [{path: x, roles: {user: [u]}}]\n",
            "test_datasets[0].roles: rl: grpo does not read it",
        ),
    ],
)
def test_what_grpo_does_not_do_yet(tmp_path: Path, extra: str, expected: str) -> None:
    config = grpo(tmp_path, extra)
    with pytest.raises(ConfigError) as caught:
        ensure_runnable(config)
    assert f"job.yaml:14: {expected}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_slash_or_a_folder_is_a_reward_model_and_a_dotted_name_is_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside").mkdir()
    for folder in ("beside/judge", "here", "here.v2", "beside/both", "both"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    names = ["sums.exact", "here", "here.v2", "judge", "./here", "both", "org/judge", "outputs/not/yet", str(tmp_path / "here")]
    config = grpo(tmp_path / "beside", "", f"trl.reward_funcs={names}")
    assert reward_models(config) == names[1:]
    plan = make_plan(config, [Node("a", {"CPU": 2.0})], 8, "float32", reward_models(config))
    function, *models = reward_specs(config, plan)
    assert isinstance(function, RewardSpec) and function.path == "sums.exact"
    assert [(model.path, model.model.name) for model in models if isinstance(model, RewardModelSpec)] == [
        ("here", str(tmp_path / "here")),
        ("here.v2", str(tmp_path / "here.v2")),
        ("judge", str(tmp_path / "beside" / "judge")),
        ("./here", str(tmp_path / "here")),
        ("both", str(tmp_path / "both")),  # the current folder comes first
        ("org/judge", "org/judge"),
        ("outputs/not/yet", "outputs/not/yet"),
        (str(tmp_path / "here"), str(tmp_path / "here")),
    ]


@pytest.mark.parametrize("name", ["exact", "a.b c"])
def test_what_names_no_function_and_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    config = grpo(tmp_path, "", f"trl.reward_funcs=['{name}']")
    with pytest.raises(ConfigError, match=f"trl.reward_funcs: {name} is no folder, and no function's name; name functions"):
        reward_models(config)


JUDGE = """\
ray:
  reward_timeout_s: 50
  sandbox: {time_s: 2, memory_mib: 256}
  judges:
    kind:
      url: http://127.0.0.1:8000/v1
      model: org/judge
      prompt: 'Rate {completion} of {prompt} in ${money}'
      api_key_env: KIND_KEY
      scale: [1, 5]
"""  # ray: stands at line 14


def test_a_judge_is_a_reward_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = grpo(tmp_path, JUDGE, "trl.reward_funcs=[judge.kind, sums.exact]")
    assert load(write(tmp_path, dump(config))) == config
    assert reward_models(config) == []
    plan = make_plan(config, [Node("a", {"CPU": 2.0})], 8, "float32")
    judge, function = reward_specs(config, plan)
    assert judge == JudgeSpec(
        path="judge.kind",
        name="kind",
        url="http://127.0.0.1:8000/v1",
        model="org/judge",
        prompt="Rate {completion} of {prompt} in ${money}",
        api_key_env="KIND_KEY",
        max_tokens=512,
        temperature=0.0,
        timeout_s=30.0,
        limit_s=45.0,
        concurrency=16,
        scale=(1.0, 5.0),
    )
    assert isinstance(function, RewardSpec) and function.sandbox == SandboxSpec(2.0, 256, 1)

    monkeypatch.delenv("KIND_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"job.yaml:\d+: ray.judges.kind.api_key_env: KIND_KEY is not set where this command"):
        ensure_rewards(config, plan, conversational=True)
    monkeypatch.setenv("KIND_KEY", "hush")
    ensure_rewards(config, plan, conversational=True)
    assert "hush" not in dump(config) + repr(reward_specs(config, plan))
    monkeypatch.delenv("KIND_KEY")
    unused = grpo(tmp_path, JUDGE)
    ensure_rewards(unused, plan, conversational=True)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trl.reward_funcs=[judge.kidn]", "trl.reward_funcs: judge.kidn names a judge, and ray.judges has kind; add it there"),
        ("ray.judges.kind.url=''", "ray.judges.kind.url: is ''; give the server's address, for example http://"),
        ("ray.judges.kind.url=127.0.0.1:8000", "ray.judges.kind.url: is '127.0.0.1:8000'; give the server's address"),
        ("ray.judges.kind.model=''", "ray.judges.kind.model: is empty; name a model"),
        ("ray.judges.kind.prompt='Rate {prompt}'", "ray.judges.kind.prompt: does not say where the completion goes; write"),
        ("ray.judges.kind.api_key_env=sk-123", "ray.judges.kind.api_key_env: takes the name of an environment variable, and"),
        ("ray.judges.kind.scale=[5, 5]", "ray.judges.kind.scale: is [5.0, 5.0]; give the lowest and the highest number"),
        ("ray.judges.kind.scale=[5]", "ray.judges.kind.scale: is [5.0]; give the lowest and the highest number"),
        ("ray.judges.kind.max_tokens=0", "ray.judges.kind.max_tokens: is 0; it must be 1 or more"),
        ("ray.judges.kind.concurrency=0", "ray.judges.kind.concurrency: is 0; it must be 1 or more"),
        ("ray.judges.kind.temperature=-1", "ray.judges.kind.temperature: is -1; it must be 0 or more"),
        ("ray.judges.kind.timeout_s=50", "ray.judges.kind.timeout_s: is 50; it must be above 0 and below ray.reward_timeout_s"),
        ("ray.judges.a-b={url: http://a, model: m, prompt: '{completion}'}", "ray.judges.a-b: a judge's name has letters"),
        ("ray.judges.b={url: http://a, prompt: '{completion}'}", "ray.judges.b.model: is missing; name a model"),
        ("ray.judges.kind.modell=m", "ray.judges.kind.modell: unknown key 'modell'; did you mean ray.judges.kind.model?"),
        ("ray.judges.kind.max_tokens=many", "ray.judges.kind.max_tokens: takes a whole number, not 'many'"),
        ("ray.judges=[kind]", "ray.judges: takes a section for each name; indent its keys under the name"),
        ("ray.sandbox.time_s=0", "ray.sandbox.time_s: is 0; it must be"),
        ("ray.sandbox.memory_mib=0", "ray.sandbox.memory_mib: is 0; it must be 1 or more"),
        ("ray.sandbox.file_mib=0", "ray.sandbox.file_mib: is 0; it must be 1 or more"),
    ],
)
def test_what_judges_and_the_sandbox_may_not_be(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        grpo(tmp_path, JUDGE, override)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_program_has_less_time_than_the_call_that_runs_it(tmp_path: Path) -> None:
    code = "trl.reward_funcs=[actors.verifiers.passes_tests]"
    grpo(tmp_path, "", "ray.sandbox.time_s=60")
    with pytest.raises(ConfigError, match="ray.sandbox.time_s: is 60, no less than ray.reward_timeout_s, in which"):
        grpo(tmp_path, "", "ray.sandbox.time_s=60", code)


def test_dataset_jobs_say_that_rewards_are_not_theirs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ensure_runnable(load(write(tmp_path, SFT + JUDGE + "trl: {multi_objective_aggregation: normalize_then_sum}\n")))
    for key in ("ray.sandbox", "ray.judges", "ray.reward_timeout_s", "trl.multi_objective_aggregation"):
        assert sum(f"{key}: not used: it concerns rl: grpo" in text for text in messages(caplog)) == 1


def test_rewards_that_are_normalized_first_leave_scale_rewards_nothing_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = "trl.multi_objective_aggregation=normalize_then_sum"
    ensure_runnable(grpo(tmp_path, "", first))
    assert messages(caplog) == []
    ensure_runnable(grpo(tmp_path, "", first, "trl.scale_rewards=batch"))
    assert ["trl.scale_rewards: not used" in text for text in messages(caplog)] == [True]


def test_full_fine_tuning_has_no_adapter_to_put_into_a_slot(tmp_path: Path) -> None:
    ensure_runnable(load(write(tmp_path, FULL_GRPO)))
    with pytest.raises(ConfigError, match="ray.sync: is fused, a way for adapters, but all weights are trained"):
        load(write(tmp_path, FULL_GRPO + "ray: {sync: fused}\n"))


def test_a_forgotten_adapter_trains_no_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_r: is set, but adapter is not, so all weights would be trained"):
        load(write(tmp_path, GRPO.replace("adapter: lora\n", "")))


def test_a_second_model_in_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trl.beta: the KL term's second model cannot be in shards yet"):
        ensure_runnable(load(write(tmp_path, FULL_GRPO + "fsdp_version: 2\nrl_beta: 0.1\n")))


@pytest.mark.parametrize(
    "extra",
    [
        "  vllm_mode: colocate\n  vllm_enable_sleep_mode: true\n",
        "load_in_4bit: true\n",
        "load_in_8bit: true\n",
        "ray_num_workers: 4\nfsdp_version: 2\n",
        "ray_num_workers: 2\ndeepspeed: {zero_optimization: {stage: 3}}\n",
        "vllm: {tensor_parallel_size: 4}\n",
    ],
)
def test_what_grpo_does(tmp_path: Path, extra: str, caplog: pytest.LogCaptureFixture) -> None:
    ensure_runnable(grpo(tmp_path, extra))
    assert messages(caplog) == []


@pytest.mark.parametrize(
    "extra",
    [
        "dp_shard_size: 1\ndp_replicate_size: 1\n",
        "tensor_parallel_size: 1\ncontext_parallel_size: 1\n",
        "tokens: []\nunfrozen_parameters: []\nlr_groups: []\nlora_modules_to_save: []\n",
        "bnb_config_kwargs: {}\n",
        "bnb_config_kwargs: {bnb_4bit_quant_type: nf4}\n",
        "bnb_config_kwargs: {llm_int8_has_fp16_weight: false, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}\n",
    ],
)
def test_what_asks_for_nothing_is_not_refused(tmp_path: Path, extra: str, caplog: pytest.LogCaptureFixture) -> None:
    ensure_runnable(grpo(tmp_path, extra))
    ensure_runnable(load(write(tmp_path, SFT + extra)))
    assert messages(caplog) == []


def test_dataset_jobs_say_that_an_adapter_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = "lora_r: 8\nlora_alpha: 16\nlora_target_linear: true\nlora_modules_to_save: [lm_head]\n"
    ensure_runnable(load(write(tmp_path, SFT + adapter + "adapter: lora\n")))
    assert messages(caplog) == []
    ensure_runnable(load(write(tmp_path, SFT + adapter + "adapter:\n")))
    for line, key in enumerate(("lora_r", "lora_alpha", "lora_target_linear", "lora_modules_to_save"), start=4):
        assert sum(f":{line}: {key}: not used: adapter is not set, so all" in text for text in messages(caplog)) == 1


def test_idle_keys_get_a_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = grpo(
        tmp_path,
        "  vllm_enable_sleep_mode: true\nsample_packing: true\ntf32: true\nstrict: false\n"
        "plugins: [axolotl.integrations.liger.LigerPlugin]\nspecial_tokens: {pad_token: x}\n",
    )
    ensure_runnable(config)
    lines = sorted(messages(caplog))
    named = (
        (14, "trl.vllm_enable_sleep_mode"),
        (15, "sample_packing"),
        (16, "tf32"),
        (18, "plugins"),
        (19, "special_tokens"),
    )
    for number, key in named:
        assert sum(f":{number}: {key}: not " in text for text in lines) == 1
    assert len(lines) == len(named)  # strict: false is the default and asks for nothing
