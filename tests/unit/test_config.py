"""Job files: what loads, what it means, and what each mistake is answered with."""

import dataclasses
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from actors.errors import ConfigError
from orchestrator.axolotl_keys import AS_HERE, HINTS, ONLY_WITH, REFUSED, RENAMED
from orchestrator.config import dump, load
from orchestrator.runnable import ensure_runnable, keys
from orchestrator.schema import SandboxConfig
from orchestrator.values import CHOICES, RANGES
from tests.job_files import GRPO, SFT, grpo, messages, write

ROOT = Path(__file__).parents[2]

# The contract: every key of the dialect, with a value that people write.
DIALECT = """
rl: dpo | reward_model: false | base_model: m | model_type: LlamaForCausalLM | tokenizer_type: AutoTokenizer
trust_remote_code: true | output_dir: out | hub_model_id: a/b | adapter: qlora | load_in_4bit: true
load_in_8bit: false | lora_r: 8 | lora_alpha: 16 | lora_dropout: 0.1 | lora_target_linear: true
lora_target_modules: [q_proj] | lora_modules_to_save: [lm_head] | lora_model_dir: d | peft_use_dora: true
peft_use_rslora: true | datasets: [{path: d}] | test_datasets: [{path: d}] | val_set_size: 0 | sequence_len: 1024
sample_packing: true | pad_to_sequence_len: true | dataset_prepared_path: p | chat_template: chatml
train_on_inputs: true | streaming: true | shuffle_merged_datasets: false | micro_batch_size: 2
gradient_accumulation_steps: 2 | num_epochs: 3 | max_steps: 5 | learning_rate: 1e-4 | optimizer: paged_adamw_8bit
lr_scheduler: linear | warmup_steps: 3 | weight_decay: 0.1 | max_grad_norm: 0.5 | bf16: true
fp16: false | tf32: true | gradient_checkpointing: offload | seed: 7 | flash_attention: true
sdp_attention: false | attn_implementation: flash_attention_2 | torch_compile: true | save_steps: 5
eval_steps: 0.1 | save_total_limit: 2 | logging_steps: 1 | resume_from_checkpoint: c
auto_resume_from_checkpoints: true | use_wandb: true | wandb_project: w | wandb_entity: w | wandb_name: w
wandb_run_id: w | wandb_mode: offline | wandb_watch: w | wandb_log_model: end | use_tensorboard: true
deepspeed: {zero_optimization: {stage: 2}} | use_ray: true | ray_num_workers: [1, 4]
resources_per_worker: {GPU: 0.5} | ray_run_name: r | rl_beta: 0.2 | dpo_loss_type: [sigmoid]
dpo_label_smoothing: 0.1 | orpo_alpha: 0.1 | kto_desirable_weight: 0.2 | kto_undesirable_weight: 0
center_rewards_coefficient: 0.01 | special_tokens: {pad_token: x} | tokens: [a] | eot_tokens: [b]
plugins: [axolotl.integrations.liger.LigerPlugin] | liger_rope: true | liger_rms_norm: true
liger_glu_activation: true | liger_layer_norm: true | liger_swiglu: true | liger_cross_entropy: true
liger_fused_linear_cross_entropy: true | cut_cross_entropy: true | eval_sample_packing: false | strict: false
gradient_checkpointing_kwargs: {use_reentrant: false} | activation_offloading: legacy | eval_batch_size: 2
adam_beta1: 0.8 | adam_beta2: 0.95 | adam_epsilon: 1e-6 | early_stopping_patience: 3
loss_watchdog_threshold: 5.0 | loss_watchdog_patience: 3 | save_strategy: steps | save_only_model: true
ddp_timeout: 1 | ddp_bucket_cap_mb: 1 | ddp_broadcast_buffers: true | ddp_find_unused_parameters: true
tensor_parallel_size: 2 | context_parallel_size: 2 | dp_shard_size: 2 | dp_replicate_size: 2
unfrozen_parameters: [a] | lora_fan_in_fan_out: true | bnb_config_kwargs: {bnb_4bit_quant_type: nf4} | gptq: true
lr_groups: [{name: a, modules: [b], lr: 1e-3}] | cosine_min_lr_ratio: 0.1
vllm: {tensor_parallel_size: 2, data_parallel_size: 2, gpu_memory_utilization: 0.8, max_model_len: 2048, dtype: auto}
vllm: {enable_prefix_caching: true, enforce_eager: true}
trl: {beta: 0.1, use_vllm: true, vllm_mode: colocate, vllm_enable_sleep_mode: true, vllm_lora_sync: true}
trl: {vllm_sync_interval: 2, num_generations: 4, max_completion_length: 64, reward_funcs: [a.b], reward_weights: [1]}
trl: {temperature: 0.7, top_p: 0.9, top_k: 50, min_p: 0.1, num_iterations: 2, epsilon: 0.2, epsilon_high: 0.28}
trl: {loss_type: dr_grpo, scale_rewards: false, importance_sampling_level: sequence, mask_truncated_completions: true}
trl: {generation_kwargs: {stop_token_ids: [1]}, chat_template_kwargs: {enable_thinking: false}, log_completions: true}
datasets: [{path: p, type: {field_instruction: q, format: "[INST] {instruction}"}, name: n, split: train[:10%]}]
datasets: [{path: p, data_files: [a.json], ds_type: json, revision: main, trust_remote_code: true, field: text}]
datasets: [{path: p, field_messages: c, message_property_mappings: {role: from}, roles: {user: [human]}}]
datasets: [{path: p, roles_to_train: [assistant], train_on_eos: turn, drop_system_message: true}]
saves_per_epoch: 2 | evals_per_epoch: 2 | warmup_ratio: 0.1 | fsdp_version: 2 | fsdp_config: {offload_params: true}
pretraining_dataset: [{path: p, name: n}] | deepspeed: deepspeed_configs/zero3.json | dpo_loss_type: ipo
"""


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    return str(caught.value)


# What loads


def test_values_of_the_file_and_defaults(tmp_path: Path) -> None:
    config = grpo(tmp_path)
    assert (config.base_model, config.rl, config.lora_r) == ("org/model", "grpo", 16)
    assert config.learning_rate == 0.0002  # YAML 1.1 reads 2e-4 as text
    assert config.datasets is not None
    assert (config.datasets[0].path, config.datasets[0].type) == ("sums.jsonl", "sums.prompts")
    assert config.output_dir == "./model-out"
    assert (config.sequence_len, config.micro_batch_size, config.num_epochs, config.seed) == (512, 1, 1, 42)
    assert (config.optimizer, config.lr_scheduler, config.bf16) == ("adamw_torch_fused", "cosine", "auto")
    assert (config.lora_dropout, config.weight_decay, config.val_set_size) == (0, 0, 0)
    assert (config.ray_num_workers, config.resources_per_worker, config.use_ray) == (1, {"GPU": 1}, True)
    assert (config.kto_desirable_weight, config.kto_undesirable_weight) == (1, 1)
    assert (config.vllm.gpu_memory_utilization, config.vllm.dtype) == (0.9, "auto")
    assert (config.trl.beta, config.trl.num_generations, config.trl.scale_rewards) == (0.0, 8, "group")
    assert (config.ray.engines, config.ray.max_staleness, config.ray.sync) == (1, 0, "auto")
    assert (config.ray.importance_sampling_cap, config.ray.engine_gpus) == (3.0, None)


@pytest.mark.parametrize(
    "entry", [e.strip() for line in DIALECT.split("\n") for e in line.split(" | ") if e.strip()]
)
def test_every_key_of_the_dialect_is_known(tmp_path: Path, entry: str) -> None:
    """Each alone may contradict the rest of a minimal file, but is never unknown, refused or of a wrong type."""
    key = entry.partition(":")[0]
    kept = "".join(line + "\n" for line in SFT.splitlines() if not line.startswith(f"{key}:"))
    path = write(tmp_path, kept + entry + "\n")
    try:
        load(path)
    except ConfigError as error:
        for rejection in ("unknown key", "does not support", "takes "):
            assert rejection not in str(error)


def test_zero_weight_stays_zero(tmp_path: Path) -> None:
    config = load(write(tmp_path, SFT + "rl: kto\nmicro_batch_size: 2\nkto_undesirable_weight: 0\n"))
    assert config.kto_undesirable_weight == 0.0


def test_overrides_win_and_reach_sections_and_list_entries(tmp_path: Path) -> None:
    config = grpo(
        tmp_path,
        "",
        "trl.beta=0.1",
        "learning_rate=3e-5",
        "datasets[0].path=other.jsonl",
        "ray.engines=2",
        "trl.reward_funcs=[sums.exact, sums.short]",
        "output_dir=a=b",
    )
    assert config.trl.beta == 0.1
    assert config.learning_rate == 0.00003
    assert config.datasets is not None and config.datasets[0].path == "other.jsonl"
    assert config.datasets[0].type == "sums.prompts"
    assert config.ray.engines == 2
    assert config.trl.reward_funcs == ["sums.exact", "sums.short"]
    assert config.output_dir == "a=b"


@pytest.mark.parametrize(
    ("text", "beta"),
    [("rl_beta: 0.2\n", 0.2), ("rl_beta: 0.2\ntrl: {beta: 0.1, reward_funcs: [a.b]}\n", 0.1), ("", 0.0)],
)
def test_trl_beta_wins_over_rl_beta(tmp_path: Path, text: str, beta: float) -> None:
    base = GRPO.replace("trl:\n  reward_funcs: [sums.exact]\n", "") if "trl:" in text else GRPO
    assert load(write(tmp_path, base + text)).trl.beta == beta


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("", 512),
        ("  max_completion_length: 256\n", 512),
        ("  max_completion_length: 1024\n", 1536),
        ("  max_completion_length: 1024\nvllm: {max_model_len: 2048}\n", 2048),
        ("  max_completion_length: 1024\nsequence_len: 1100\n", 1100),
    ],
)
def test_an_online_job_that_says_no_length_has_room_for_prompt_and_completion(tmp_path: Path, text: str, length: int) -> None:
    assert grpo(tmp_path, text).sequence_len == length


@pytest.mark.parametrize(
    ("written", "meant"), [("true", "group"), ("false", "none"), ("batch", "batch"), ("none", "none")]
)
def test_scale_rewards_accepts_the_old_boolean(tmp_path: Path, written: str, meant: str) -> None:
    assert grpo(tmp_path, f"  scale_rewards: {written}\n").trl.scale_rewards == meant


def test_empty_values_mean_absent_but_null_turns_the_correction_off(tmp_path: Path) -> None:
    config = grpo(
        tmp_path,
        "  temperature:\nwandb_project:\nload_in_8bit:\nfsdp:\nray: {importance_sampling_cap: null}\n",
    )
    assert config.trl.temperature == 1.0
    assert config.load_in_8bit is False
    assert config.ray.importance_sampling_cap is None


def test_keys_with_two_spellings_are_settled(tmp_path: Path) -> None:
    config = grpo(tmp_path, "sdp_attention: true\nfp16: true\nsave_strategy: no\n")
    assert (config.attn_implementation, config.bf16, config.save_strategy) == ("sdpa", False, "no")
    assert load(write(tmp_path, SFT + "reward_model: true\n")).rl == "reward_trainer"
    assert load(write(tmp_path, SFT + "bf16:\n")).bf16 is False


def test_dollar_braces_mean_themselves(tmp_path: Path) -> None:
    config = grpo(tmp_path, "  chat_template_kwargs: {a: '${x} \\${y} ${'}\noutput_dir: out/${seed}\n")
    assert config.trl.chat_template_kwargs == {"a": "${x} \\${y} ${"}
    assert config.output_dir == "out/${seed}"


def test_a_mapping_replaces_its_default(tmp_path: Path) -> None:
    assert grpo(tmp_path, "resources_per_worker: {CPU: 2}\n").resources_per_worker == {"CPU": 2.0}


def test_yaml_merge_keys_keep_their_lines(tmp_path: Path) -> None:
    config = load(
        write(tmp_path, SFT + "trl: &t {beta: 0.3}\nvllm:\n  <<: {max_model_len: 99}\n  dtype: half\n")
    )
    assert (config.trl.beta, config.vllm.max_model_len, config.vllm.dtype) == (0.3, 99, "half")
    assert config.source.lines["vllm.max_model_len"] == 6


@pytest.mark.parametrize(
    "text",
    [
        GRPO,
        GRPO
        + "  scale_rewards: false\n  generation_kwargs: {stop: ['${x'], frequency_penalty: 1e-1}\nrl_beta: 0.5\n",
        GRPO + "ray: {importance_sampling_cap: null, engine_gpus: 0.25}\nsdp_attention: true\nbf16:\n",
        SFT + "reward_model: true\nray_num_workers: [1, 2]\nsave_steps: 0.25\n",
        SFT + "deepspeed: {a: {b: [1, x]}}\n",
        SFT + "lora_target_modules: .*proj\nadapter: lora\nlora_r: 8\nlora_alpha: 8\noutput_dir: 'no'\n",
    ],
)
def test_dump_reads_back_equal(tmp_path: Path, text: str) -> None:
    config = load(write(tmp_path, text))
    again = load(write(tmp_path, dump(config)))
    assert again == config
    assert "\nsource:" not in dump(config)
    assert again != load(write(tmp_path, text), ["seed=43"])


def test_every_shipped_recipe_loads() -> None:
    recipes = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")
    assert recipes, "configs/ holds no recipe"
    for recipe in recipes:
        load(recipe)


def test_loading_needs_no_framework() -> None:
    code = (
        "import sys, orchestrator.config, orchestrator.runnable; "
        "sys.exit(bool({'torch', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# What is refused: the text is appended to GRPO, whose last line is 13


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("lora_rr: 3\n", [":14: lora_rr: unknown key 'lora_rr'", "did you mean lora_r?"]),
        ("  temprature: 1\n", [":14: trl.temprature: unknown key 'temprature'", "did you mean trl.temperature?"]),
        ("max_staleness: 1\n", [":14: max_staleness: unknown key", "did you mean ray.max_staleness?"]),
        ("qwertz: 1\n", [":14: qwertz: unknown key 'qwertz'; it is not known here; correct its name, or remove it"]),
        ("use_dynamic_finetuning: true\n", [":14: use_dynamic_finetuning: eagleray does not support", "the method's own"]),
        ("use_onebitllms: true\n", [":14: use_onebitllms: eagleray does not support use_onebitllms; leave it out"]),
        ("lora_rank_pattern: {q_proj: 4}\n", [":14: lora_rank_pattern: eagleray does not support", "use plain lora"]),
        ("lora_alpha_pattern: {q_proj: 4}\n", [":14: lora_alpha_pattern: eagleray does not support", "use plain lora"]),
        ("lora_exclude_modules: [a]\n", [":14: lora_exclude_modules: eagleray does not support", "in lora_target_modules"]),
        ("spectrum_top_fraction: 0.5\n", [":14: spectrum_top_fraction: eagleray does not support", "lora_target_modules"]),
        ("test_datasets: [{path: x, overlap_len: 3}]\n", [":14: test_datasets[0].overlap_len: eagleray does not support"]),
        ("curriculum_sampling: true\n", [":14: curriculum_sampling:", "rows are always shuffled; remove it"]),
        ("sample_pack_sequentially: true\n", [":14: sample_pack_sequentially:", "packed where they fit best; remove it"]),
        ("ring_attn_func: a\ncontext_parallel_size: 2\n", [":14: ring_attn_func:", "remove it with context_parallel_size"]),
        (
            "pretraining_sample_concatenation: true\npretraining_dataset: x\nmax_steps: 3\n",
            [":14: pretraining_sample_concatenation:", "type: completion, streaming: true and max_steps"],
        ),
        ("  sync_ref_model: true\n  ref_model_sync_steps: 9\n", [":15: trl.ref_model_sync_steps: eagleray does not support"]),
        ("chat_template_kwargs: {a: 1}\n", [":14: chat_template_kwargs:", "into a chat_template_jinja"]),
        ("ray:\n  engine: 2\n", [":15: ray.engine: unknown key", "did you mean ray.engines?"]),
        ("test_datasets:\n  - path: x\n    pth: y\n", [":16: test_datasets[0].pth", "did you mean test_datasets[0].path?"]),
        ("relora: true\n", [":14: relora: eagleray does not support relora", "use adapter: lora"]),
        ("  async_prefetch: true\n", [":14: trl.async_prefetch: eagleray does not support async_prefetch"]),
        ("  rollout_func: play\n", [":14: trl.rollout_func: play is no function's name; write module.fn"]),
        (
            "  rollout_func: game.play\n  generation_kwargs: {ignore_eos: true}\n",
            [":15: trl.generation_kwargs: ignore_eos lets no turn end before the length limit", "remove one of the two"],
        ),
        ("tokenizer_use_fast: false\n", [":14: tokenizer_use_fast: eagleray does not support"]),
        ("test_datasets: [{path: x, shards: 3}]\n", [":14: test_datasets[0].shards: eagleray does not support shards"]),
        ("lora_r: 8\n", [":14: lora_r: is written twice, at lines 4 and 14", "keep one"]),
        ("  reward_funcs: [a.b]\n", [":14: trl.reward_funcs: is written twice, at lines 13 and 14"]),
        ("warmup_steps: many\n", [":14: warmup_steps: takes a whole number, not 'many'"]),
        ("max_steps: 1.5\n", [":14: max_steps: takes a whole number, not 1.5"]),
        ("fp16: 3\n", [":14: fp16: takes true or false, not 3"]),
        ("seed: true\n", [":14: seed: takes a whole number"]),
        ("output_dir: true\n", [":14: output_dir: takes text"]),
        ("weight_decay: .nan\n", [":14: weight_decay: takes a number, not nan"]),
        ("weight_decay: .inf\n", [":14: weight_decay: takes a number, not inf"]),
        ("lora_target_modules: [1]\n", [":14: lora_target_modules: takes text or a list"]),
        ("resources_per_worker: {GPU: x}\n", [":14: resources_per_worker: takes a mapping of names to a number"]),
        ("vllm: 5\n", [":14: vllm: is a section, not 5"]),
        ("test_datasets: {path: x}\n", [":14: test_datasets: takes a list of entries"]),
        ("test_datasets: [{type: a.b}]\n", [":14: test_datasets[0].path: is missing"]),
        ("test_datasets: [{path: x, type: 3}]\n", [":14: test_datasets[0].type: takes text or a mapping, not 3"]),
        ("test_datasets: [{path: ''}]\n", [":14: test_datasets[0].path: is empty"]),
        ("test_datasets: [{path: x, train_on_eos: some}]\n", [":14: test_datasets[0].train_on_eos", "all, turn, last"]),
        ("deepspeed: 3\n", [":14: deepspeed: takes a path or a mapping, not 3"]),
        ("load_in_4bit: true\nload_in_8bit: true\n", [":15: load_in_8bit: load_in_4bit and load_in_8bit are both"]),
        ("fp16: true\nbf16: true\n", [":14: fp16: fp16 and bf16 are both on"]),
        ("warmup_steps: 1\nwarmup_ratio: 0.1\n", [":15: warmup_ratio: warmup_steps and warmup_ratio are both set"]),
        ("save_steps: 1\nsaves_per_epoch: 2\n", [":15: saves_per_epoch: save_steps and saves_per_epoch are both"]),
        ("save_steps: 1\nsave_strategy: epoch\n", [":15: save_strategy: epoch contradicts save_steps"]),
        ("val_set_size: 0.1\neval_steps: 1\nevals_per_epoch: 2\n", [":16: evals_per_epoch: eval_steps and"]),
        ("eval_steps: 1\n", [":14: eval_steps: there are no rows to evaluate on", "val_set_size"]),
        ("val_set_size: 0.1\ntest_datasets: [{path: x}]\n", [":14: val_set_size: and test_datasets both"]),
        ("deepspeed: a.json\nfsdp_version: 2\n", [":14: deepspeed: deepspeed and fsdp are both set"]),
        ("flash_attention: true\nsdp_attention: true\n", [":14: flash_attention: flash_attention and sdp_attention"]),
        ("sdp_attention: true\nattn_implementation: eager\n", [":14: sdp_attention: means", "sdpa", "eager"]),
        ("chat_template: jinja\n", [":14: chat_template: jinja needs the template", "chat_template_jinja"]),
        ("streaming: true\n", [":14: streaming: streamed rows have no end; add max_steps"]),
        ("streaming: true\nmax_steps: 9\nval_set_size: 0.1\n", [":16: val_set_size: rows cannot be drawn from a stream"]),
        ("streaming: true\nmax_steps: 9\nsaves_per_epoch: 2\n", [":16: saves_per_epoch: a stream has no epochs"]),
        ("streaming: true\nmax_steps: 9\nsave_strategy: epoch\n", [":16: save_strategy: a stream has no epochs"]),
        ("reward_model: true\n", [":14: reward_model: true means rl: reward_trainer, but rl is grpo"]),
        ("peft_use_dora: true\n", [":14: peft_use_dora: vLLM cannot sample from a DoRA adapter"]),
        ("optimizer: adamw_torch_fuse\n", [":14: optimizer:", "did you mean adamw_torch_fused?"]),
        ("lr_scheduler: cosin\n", [":14: lr_scheduler:", "did you mean cosine?"]),
        ("micro_batch_size: 0\n", [":14: micro_batch_size: is 0; it must be 1 or more"]),
        ("learning_rate2: 0\n", [":14: learning_rate2: unknown key", "did you mean learning_rate?"]),
        ("warmup_ratio: 2\n", [":14: warmup_ratio: is 2; it must be between 0 and 1"]),
        ("ray_num_workers: 0\n", [":14: ray_num_workers: is 0; it must be 1 or more"]),
        ("load_in_4bit: true\nray: {sync: adapter}\n", [":15: ray.sync: a slot adds to the engines' own base", "use fused"]),
        (
            "  vllm_mode: colocate\nvllm: {tensor_parallel_size: 2}\nray: {engines: 3, engine_gpus: 0.5}\n",
            [
                ":15: vllm.tensor_parallel_size: an engine on the GPU of one trainer rank has that GPU alone",
                ":16: ray.engines: is 3; with vllm_mode: colocate each of 1 ranks has one",
                ":16: ray.engine_gpus: with vllm_mode: colocate an engine shares the GPU",
            ],
        ),
        (
            "  vllm_mode: colocate\n  vllm_enable_sleep_mode: true\nray: {max_staleness: 1}\n",
            [":16: ray.max_staleness: engines that sleep while the trainer computes cannot sample ahead"],
        ),
        (
            "vllm: {tensor_parallel_size: 2}\nray: {engine_gpus: 1}\n",
            [":15: ray.engine_gpus: is 1, but vllm.tensor_parallel_size is 2"],
        ),
        ("ray_num_workers: [4, 2]\n", [":14: ray_num_workers: is [4, 2]", "[min, max]"]),
        ("resources_per_worker: {GPU: -1}\n", [":14: resources_per_worker.GPU: is -1; it must be 0 or more"]),
        ("vllm: {max_model_len: 100}\nsequence_len: 512\n", [":14: vllm.max_model_len: 100 is below sequence_len: 512"]),
        ("vllm: {gpu_memory_utilization: 1.5}\n", [":14: vllm.gpu_memory_utilization: is 1.5; it must be above 0"]),
        ("vllm: {dtype: float32}\nbf16: true\n", [":14: vllm.dtype: float32 contradicts bf16: true"]),
        ("vllm: {dtype: int8}\n", [":14: vllm.dtype: 'int8' is not one of auto, bfloat16"]),
        ("ray: {late_steps: 1}\n", [":14: ray.late_steps: needs ray.max_staleness 2 or more"]),
        ("ray: {late_steps: 2, max_staleness: 2, engines: 2}\n", [":14: ray.late_steps: is 2, but ray.max_staleness is 2"]),
        ("ray: {late_steps: 1, max_staleness: 2}\n", [":14: ray.late_steps: needs two engines or more"]),
        ("ray: {max_staleness: -1}\n", [":14: ray.max_staleness: is -1; it must be 0 or more"]),
        ("ray: {sync: fuse}\n", [":14: ray.sync: 'fuse' is not one of auto, fused, adapter", "did you mean fused?"]),
        ("ray: {placement: near}\n", [":14: ray.placement: 'near' is not one of pack, spread"]),
        ("  loss_type: cispo\n", [":12: trl.epsilon_high: cispo caps ratios at epsilon_high itself"]),
        ("  loss_type: gspo\n", [":14: trl.loss_type: 'gspo' is not one of grpo, dr_grpo, dapo, bnpo, cispo"]),
        ("  scale_rewards: std\n", [":14: trl.scale_rewards: 'std' is not one of group, batch, none"]),
        ("  importance_sampling_level: word\n", [":14: trl.importance_sampling_level", "token, sequence"]),
        ("  vllm_mode: sever\n", [":14: trl.vllm_mode: 'sever' is not one of", "did you mean server?"]),
        ("  epsilon: 1.0\n", [":14: trl.epsilon: is 1; it must be above 0 and below 1"]),
        ("  epsilon_high: 0\n", [":14: trl.epsilon_high: is 0; it must be greater than 0"]),
        ("  temperature: 0\n", [":14: trl.temperature: is 0; it must be greater than 0"]),
        ("  num_generations: 1\n", [":14: trl.num_generations: is 1; it must be 2 or more"]),
        ("  reward_weights: [1, 2]\n", [":14: trl.reward_weights: 2 weights for 1 reward_funcs"]),
        ("  max_completion_length: 512\nsequence_len: 512\n", [":14: trl.max_completion_length: 512 leaves no room"]),
        ("a: [1\n", [":15: is not valid YAML"]),
        ("ray: &r\n  engines: *r\n", [":15: ray.engines: refers to itself"]),
    ],
)  # fmt: skip
def test_message_names_file_line_key_and_remedy(tmp_path: Path, extra: str, expected: list[str]) -> None:
    path = write(tmp_path, GRPO + extra)
    message = error_of(path)
    assert f"{path}{expected[0]}" in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("2e-4", "fast", ":7: learning_rate: takes a number, not 'fast'"),
        ("2e-4", "0", ":7: learning_rate: is 0; it must be greater than 0"),
        ("learning_rate: 2e-4\n", "", ": learning_rate: is missing; add it"),
        ("base_model: org/model\n", "", ": base_model: is missing; name the model"),
        ("rl: grpo", "rl: grop", ":2: rl: 'grop' is not one of dpo, ipo, simpo, kto, orpo, grpo, reward_trainer"),
        ("adapter: lora", "adapter: lore", ":3: adapter: 'lore' is not one of lora, qlora; did you mean lora?"),
        ("adapter: lora", "adapter: qlora", ":3: adapter: qlora needs load_in_4bit: true; add it, or use adapter: lora"),
        ("adapter: lora", "load_in_4bit: true", ":3: load_in_4bit: a quantized model cannot be trained in full"),
        ("lora_r: 16\n", "", ": lora_r: adapter: lora needs a rank"),
        ("lora_alpha: 32\n", "", ": lora_alpha: adapter: lora needs a scale"),
        ("lora_target_linear: true\n", "", ": lora_target_modules: adapter: lora needs layers"),
        ("lora_r: 16", "ray: {sync: adapter}\nlora_r: 24", ":5: lora_r: ray.sync: adapter needs a rank that vLLM has"),
        ("  reward_funcs: [sums.exact]", "  beta: 0", ": trl.reward_funcs: rl: grpo needs rewards"),
        (
            "lora_target_linear: true\n",
            "lora_target_linear: true\nlora_target_modules: [q_proj, lm_head]\n",
            ":7: lora_target_modules: lm_head is not among",
        ),
        ("datasets:\n  - path: sums.jsonl\n    type: sums.prompts\n", "", ": datasets: names no data"),
    ],
)  # fmt: skip
def test_message_about_a_changed_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GRPO
    path = write(tmp_path, GRPO.replace(old, new))
    message = error_of(path)
    if expected.startswith(": trl."):  # the section was written, its key was not
        assert expected[2:] in message
    else:
        assert f"{path}{expected}" in message


@pytest.mark.parametrize(
    ("overrides", "numbers", "remedy"),
    [
        # lcm(4, 8) / 4 = 2: accumulation in steps of 2; the divisors of 12 next to 8 are 6 and 12
        (
            ["micro_batch_size=4", "gradient_accumulation_steps=3"],
            "micro_batch_size 4 x gradient_accumulation_steps 3 x ray_num_workers 1 = 12",
            "use gradient_accumulation_steps 2 or 4, or num_generations 6 or 12",
        ),
        # 3 ranks of 1: lcm(3, 8) / 3 = 8; the divisors of 9 next to 8 are 3 and 9
        (
            ["ray_num_workers=3", "gradient_accumulation_steps=3"],
            "ray_num_workers 3 = 9",
            "use gradient_accumulation_steps 8, or num_generations 3 or 9",
        ),
        # every size of an elastic group must fit: 2 ranks give 16, 3 ranks give 24
        (
            ["trl.num_generations=16", "ray_num_workers=[2, 3]"],
            "ray_num_workers 3 = 24",
            "use gradient_accumulation_steps 16, or num_generations 12 or 24",
        ),
    ],
)
def test_groups_must_be_whole(tmp_path: Path, overrides: list[str], numbers: str, remedy: str) -> None:
    message = error_of(write(tmp_path, GRPO), *overrides)
    assert "trl.num_generations: micro_batch_size" in message
    assert numbers + " completions per step" in message
    assert remedy in message


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    path = write(tmp_path, GRPO + "lora_rr: 1\nrelora: true\nseed: x\n")
    assert [line.split(": ")[0] for line in error_of(path).splitlines()] == [
        f"{path}:{n}" for n in (14, 15, 16)
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "trl.betta=0.1",
            ["override 'trl.betta=0.1'", "trl.betta: unknown key 'betta'", "did you mean trl.beta?"],
        ),
        ("lora_r=big", ["override 'lora_r=big'", "lora_r: takes a whole number, not 'big'"]),
        ("trl={reward_funcs: [a.b], epsilon: 3}", ["override 'trl={", "trl.epsilon: is 3"]),
        ("lora_r", ["override 'lora_r'", "is not key=value"]),
        ("=3", ["override '=3'", "is not key=value"]),
        ("datasets[1].path=x", ["override 'datasets[1].path=x'", "has no datasets[1] to set"]),
        ("seed.x=1", ["override 'seed.x=1'", "unknown key"]),
        ("lora_r.x=1", ["override 'lora_r.x=1'", "has no lora_r.x to set"]),
        ("seed={1", ["override 'seed={1'", "is not a YAML value"]),
    ],
)
def test_message_names_the_override(tmp_path: Path, override: str, expected: list[str]) -> None:
    message = error_of(write(tmp_path, GRPO + "  epsilon: 0.2\n"), override)
    if override == "seed.x=1":  # a section is made on the way, and seed is none
        assert "seed: takes a whole number" in message and "override 'seed.x=1'" not in message
        return
    for part in expected:
        assert part in message


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_a_file_without_a_mapping(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    assert error_of(path).startswith(f"{path}: holds no mapping of keys")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    assert "no.yaml: cannot read the job file (No such file or directory)" in error_of(tmp_path / "no.yaml")
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in error_of(tmp_path / "job.yaml")


# What is dropped


def test_hints_are_dropped_with_a_line_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "eagleray"):
        config = grpo(
            tmp_path,
            "  num_completions_to_print: 4\nlora_mlp_kernel: true\nuse_mlflow: true\ns2_attention: false\nrelora:\n"
            "vllm: {port: 8000}\nrl_beta: 0.3\n",
            "trl.beta=0.1",
        )
    lines = messages(caplog)
    for line, key in (
        (14, "trl.num_completions_to_print"),
        (15, "lora_mlp_kernel"),
        (16, "use_mlflow"),
        (17, "s2_attention"),
        (19, "vllm.port"),
    ):
        assert sum(f":{line}: {key}: dropped: " in text for text in lines) == 1
    assert any("rl_beta: not used: trl.beta (0.1) wins" in text for text in lines)
    assert len(lines) == 6  # the empty relora asks for nothing
    assert config.trl.beta == 0.1


def test_an_empty_key_asks_for_nothing_whoever_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grpo(tmp_path, "relora:\ndpo_beta:\nqwertz:\n")
    (line,) = messages(caplog)
    assert ":16: qwertz: dropped: it is not known here, and it is empty" in line


@pytest.mark.parametrize(
    "extra",
    [
        "experimental_skip_move_to_device: true\n",
        "use_sonicmoe: false\n",
        "gptq_disable_exllama: true\n",
        "preprocess_iterable: true\n",
        "eval_table_max_new_tokens: 128\n",
        "lm_eval_tasks: [arc_easy]\n",
        "shuffle_before_merging_datasets: true\n",
        "loraplus_lr_embedding: 1e-6\n",
        "heads_k_stride: 1\n",
        "ring_attn_func: varlen_llama3\nsequence_parallel_degree: 1\n",
        "pretrain_multipack_attn: true\n",
        "pretraining_sample_concatenation: true\n",
        "trl: {ref_model_mixup_alpha: 0.6}\n",
        "trl: {sync_ref_model: false, ref_model_sync_steps: 512}\n",
    ],
)
def test_what_changes_no_result_is_dropped(tmp_path: Path, extra: str, caplog: pytest.LogCaptureFixture) -> None:
    assert load(write(tmp_path, SFT + extra)) == load(write(tmp_path, SFT))
    assert messages(caplog) and all(": dropped: " in text for text in messages(caplog))


@pytest.mark.parametrize(
    ("extra", "meant"),
    [
        ("dpo_beta: 0.3\n", "rl_beta: 0.3\n"),
        ("noisy_embedding_alpha: 5\n", "neftune_noise_alpha: 5\n"),
        ("flex_attention: true\n", "attn_implementation: flex_attention\n"),
        ("xformers_attention: true\n", "attn_implementation: sdpa\n"),
        ("cosine_constant_lr_ratio: 0\n", ""),
        ("eager_attention: true\n", "attn_implementation: eager\n"),
        ("trl: {vllm_dtype: float32, repetition_penalty: 1.1}\n",
         "vllm: {dtype: float32}\ntrl: {generation_kwargs: {repetition_penalty: 1.1}}\n"),
        ("trl: {repetition_penalty: 1.1, generation_kwargs: {stop: [x]}}\n",
         "trl: {generation_kwargs: {repetition_penalty: 1.1, stop: [x]}}\n"),
        ("fsdp: [full_shard, auto_wrap]\n", "fsdp_version: 2\nfsdp_config: {}\n"),
        ("fsdp: full_shard auto_wrap\n", "fsdp_version: 2\nfsdp_config: {}\n"),
        ("fsdp: [shard_grad_op, offload]\nfsdp_version: 1\nfsdp_config: {use_orig_params: true}\n",
         "fsdp_version: 1\nfsdp_config: {use_orig_params: true, reshard_after_forward: false, offload_params: true}\n"),
        ("bfloat16: true\n", "bf16: true\n"),
        ("bfloat16: true\nbf16: true\n", "bf16: true\n"),
        ("bfloat16: true\nbf16:\n", "bf16: true\n"),
        ("float32: true\nbf16: false\n", "bf16: false\n"),
        ("val_set_size: 0.1\nevals_per_epoch: 0\nsaves_per_epoch: 0\n", "val_set_size: 0.1\n"),
        ("val_set_size: 0.1\neval_steps: 0\nsave_steps: 0\n", "val_set_size: 0.1\n"),
        ("max_steps: -1\nwandb_mode: ''\n", ""),
        ("val_set_size: 0.1\neval_strategy: 'no'\nevals_per_epoch: 0\n", "val_set_size: 0.1\n"),
        ("base_model_config: org/model\ntokenizer_config: org/model\n", ""),
        ("lr_scheduler: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.2}\n",
         "lr_scheduler: cosine_with_min_lr\ncosine_min_lr_ratio: 0.2\n"),
        ("adapter: lora\nlora_r: 8.0\nlora_alpha: 16.0\nlora_target_linear: true\n",
         "adapter: lora\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"),
        ("val_set_size: 0.1\neval_strategy: epoch\n", "val_set_size: 0.1\nevals_per_epoch: 1\n"),
        ("val_set_size: 0.1\neval_strategy: steps\neval_steps: 5\n", "val_set_size: 0.1\neval_steps: 5\n"),
    ],
)  # fmt: skip
def test_other_names_and_spellings_mean_the_same(tmp_path: Path, extra: str, meant: str) -> None:
    assert load(write(tmp_path, SFT + extra)) == load(write(tmp_path, SFT + meant))


def test_gdpo_is_grpo_with_one_key(tmp_path: Path) -> None:
    config = load(write(tmp_path, GRPO.replace("rl: grpo", "rl: gdpo")))
    assert (config.rl, config.trl.multi_objective_aggregation) == ("grpo", "normalize_then_sum")
    assert config.trl.reward_funcs == ["sums.exact"]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("fsdp: [full_shard, hybrid_shard]\n", ":4: fsdp: eagleray does not support fsdp; use full_shard, shard_grad_op"),
        ("eval_strategy: epoch\neval_steps: 3\nval_set_size: 0.1\n", ":4: eval_strategy: eagleray does not support"),
        ("eval_strategy: 'no'\neval_steps: 3\nval_set_size: 0.1\n", ":4: eval_strategy: eagleray does not support"),
        ("bfloat16: true\nbf16: false\n", ":4: bfloat16: eagleray does not support bfloat16; use bf16: true"),
        ("base_model_config: org/other\n", ":4: base_model_config: eagleray does not support"),
        ("lr_scheduler_kwargs: {min_lr_rate: 0.2}\n", ":4: lr_scheduler_kwargs: eagleray does not support"),
        ("loraplus_lr_embedding: 1e-6\nloraplus_lr_ratio: 16\n", ":4: loraplus_lr_embedding: eagleray does not support"),
        ("num_labels: 2\n", ":4: num_labels: eagleray does not support num_labels; a reward model has one output"),
        ("dpo_beta: x\n", ":4: rl_beta: takes a number, not 'x'"),
        ("flash_attention: true\nflex_attention: true\n", ":4: flash_attention: means attn_implementation: flash_attention_2"),
    ],
)
def test_what_they_do_not_mean_is_refused(tmp_path: Path, extra: str, expected: str) -> None:
    assert expected in error_of(write(tmp_path, SFT + extra))


def test_of_two_names_the_schemas_own_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(write(tmp_path, SFT + "rl: dpo\ndpo_beta: 0.3\nrl_beta: 0.2\n"))
    assert config.rl_beta == 0.2
    assert [":5: dpo_beta: not used: rl_beta is written too" in text for text in messages(caplog)] == [True]


def test_evaluations_without_rows_are_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load(write(tmp_path, SFT + "evals_per_epoch: 4\nval_set_size: 0.0\n"))
    assert config.evals_per_epoch is None
    assert [":4: evals_per_epoch: not used: there are no rows" in text for text in messages(caplog)] == [True]


def test_a_clean_file_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ensure_runnable(grpo(tmp_path))
    assert messages(caplog) == []


def test_tables_do_not_overlap() -> None:
    known = set(keys())
    assert not set(HINTS) & set(REFUSED)
    assert not set(RENAMED) & (set(HINTS) | set(REFUSED)) and set(AS_HERE) <= set(REFUSED) | known
    assert set(ONLY_WITH) <= set(REFUSED) and set(ONLY_WITH.values()) <= set(REFUSED) | known
    assert not (set(HINTS) | set(REFUSED) | set(RENAMED)) & known
    within = {f"ray.sandbox.{f.name}" for f in dataclasses.fields(SandboxConfig)}
    assert set(CHOICES) <= known and set(RANGES) <= known | within
