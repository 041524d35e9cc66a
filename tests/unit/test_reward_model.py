"""Reward models: their scores beside those of transformers for each text alone, and what is refused before a job starts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from actors import reward_model
from actors.errors import ConfigError
from actors.reward_model import RewardModelWorker, batches, ensure_reward_model
from actors.specs import ModelSpec, RewardModelSpec
from actors.types import RolloutGroup
from tests.tiny import save_llama, save_reward_llama

pytestmark = pytest.mark.usefixtures("one_thread")

COMPLETIONS = ("w7 w8 w9 w10 w11 w12", "w20", "w30 w31", "", "w7 w8", "w40 w41 w42 w43 w44 w45 w46 w47 w7 w9")
CHAT = [{"role": "system", "content": "w10"}, {"role": "user", "content": "w11 w12"}]


def spec(folder: str, **changes: Any) -> RewardModelSpec:
    return RewardModelSpec("the/model", ModelSpec(folder, "float32"), **changes)


def group(completions: tuple[str, ...] = COMPLETIONS) -> RolloutGroup:
    nothing = tuple(np.zeros(1, np.int32) for _ in completions)
    logprobs = tuple(np.zeros(1, np.float32) for _ in completions)
    return RolloutGroup(0, np.zeros(1, np.int32), nothing, logprobs, (False,) * len(completions), completions)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_llama(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llama(tmp_path_factory.mktemp("base"))


def save_adapter(base: str, folder: Path, task: str = "SEQ_CLS", labels: int = 1) -> Any:
    """A random adapter with its head in `folder`; returns the model that has it."""
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(folder)
    if task != "SEQ_CLS":
        edit(folder / "adapter_config.json", task_type=task)
    return tuned.eval()


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def alone(model: Any, folder: str, texts: list[str]) -> list[float]:
    """Scores of each text without any other: nothing is padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [float(model(input_ids=torch.tensor([i])).logits[0, 0]) for i in ids]


@pytest.mark.parametrize("at_once", [2**14, 12])
def test_scores_are_those_of_each_text_alone(whole: str, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(reward_model, "TOKENS_AT_ONCE", at_once)
    model = AutoModelForSequenceClassification.from_pretrained(whole)
    worker = RewardModelWorker(spec(whole, chat_template_kwargs={"ending": "w6"}))
    plain = worker.score("w13 w14 ", {}, group())
    assert plain.failure is None
    expected = alone(model, whole, ["w13 w14 " + completion for completion in COMPLETIONS])
    assert plain.rewards == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.05, "equal scores would show nothing"
    chat = worker.score(CHAT, {"a_column": 1}, group())
    written = [f"w3 w10 w4 w3 w11 w12 w4 w3 {completion} w4 w6" for completion in COMPLETIONS]
    assert chat.rewards == pytest.approx(alone(model, whole, written), abs=1e-5)
    turns = tuple([{"role": "assistant", "content": text}, {"role": "user", "content": "w15"}] for text in COMPLETIONS)
    played = worker.score(CHAT, {}, replace(group(), messages=turns))
    written = [text.removesuffix("w6") + "w3 w15 w4 w6" for text in written]
    assert played.rewards == pytest.approx(alone(model, whole, written), abs=1e-5)


@pytest.mark.parametrize("pad_token", ["<pad>", None])
def test_a_tokenizers_own_padding_and_cutting_change_nothing(tmp_path: Path, pad_token: str | None) -> None:
    folder = save_reward_llama(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    expected = alone(model, folder, list(COMPLETIONS[:3]))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    odd = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        truncation_side="left",
        model_max_length=2,
        **({"pad_token": pad_token} if pad_token else {}),
    )
    odd.backend_tokenizer.enable_truncation(2)
    if pad_token:
        odd.backend_tokenizer.enable_padding(length=7, pad_token=pad_token, pad_id=0)
    odd.save_pretrained(folder)
    edit(tmp_path / "config.json", pad_token_id=None)
    found = RewardModelWorker(spec(folder)).score("", {}, group(COMPLETIONS[:3]))
    assert found.rewards == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_an_adapter_scores_as_where_it_was_made(base: str, tmp_path: Path, with_tokenizer: bool) -> None:
    tuned = save_adapter(base, tmp_path)
    if with_tokenizer:
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    expected = alone(tuned, base, ["w13 " + completion for completion in COMPLETIONS])
    ensure_reward_model(spec(str(tmp_path)), conversational=False)
    found = RewardModelWorker(spec(str(tmp_path))).score("w13 ", {}, group())
    assert found.rewards == pytest.approx(expected, abs=1e-5)
    with torch.no_grad(), tuned.disable_adapter():
        assert alone(tuned, base, ["w13 w20"]) != pytest.approx(expected[1:2], abs=1e-2), "the adapter matters"


def test_what_fails_is_a_failure_and_the_worker_goes_on(whole: str) -> None:
    worker = RewardModelWorker(spec(whole))
    found = worker.score([{"role": "user"}], {}, group())
    assert found.rewards == () and found.failure is not None and "content" in found.failure
    assert worker.score("w13", {}, group()).failure is None
    with torch.no_grad():
        worker.model.score.weight.fill_(float("nan"))
    found = worker.score("w13", {}, group())
    assert found.rewards == () and "returned nan for completion 0" in str(found.failure)


def test_batches_hold_what_fits_and_everything_once() -> None:
    lengths = [5, 1, 9, 30, 2, 5]
    found = list(batches(lengths, 12))
    assert found == [[1, 4], [0, 5], [2], [3]]  # 2 x 2, 2 x 5, 9, and 30 alone
    assert list(batches([], 12)) == []


def no_folder(base: str, folder: Path) -> str:
    return str(folder / "nowhere")


def an_empty_folder(base: str, folder: Path) -> str:
    return str(folder)


def a_language_model(base: str, folder: Path) -> str:
    return base


def two_labels(base: str, folder: Path) -> str:
    return save_reward_llama(folder, labels=2)


def no_weights(base: str, folder: Path) -> str:
    save_reward_llama(folder)
    (folder / "model.safetensors").unlink()
    return str(folder)


def a_language_adapter(base: str, folder: Path) -> str:
    save_adapter(base, folder, task="CAUSAL_LM")
    return str(folder)


def an_adapter_with_two_labels(base: str, folder: Path) -> str:
    save_adapter(base, folder, labels=2)
    return str(folder)


def an_adapter_without_weights(base: str, folder: Path) -> str:
    save_adapter(base, folder)
    (folder / "adapter_model.safetensors").unlink()
    return str(folder)


def an_adapter_without_a_head(base: str, folder: Path) -> str:
    from safetensors.torch import load_file, save_file

    save_adapter(base, folder)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "score" not in name}, path)
    return str(folder)


def an_adapter_without_its_base(base: str, folder: Path) -> str:
    save_adapter(base, folder)
    edit(folder / "adapter_config.json", base_model_name_or_path="/nowhere/at/all")
    return str(folder)


def no_chat_template(base: str, folder: Path) -> str:
    save_adapter(base, folder)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (no_folder, "there is no folder .*nowhere. If a job of yours writes it, run that job first"),
        (an_empty_folder, "holds no config.json, so it is no model. If a job of yours writes it"),
        (a_language_model, r"the/model is LlamaForCausalLM, not a reward model .*; rl: reward_trainer trains one"),
        (two_labels, "the/model gives 2 numbers a text, and a reward model gives one"),
        (no_weights, r"the/model holds no \*.safetensors"),
        (a_language_adapter, "the/model is an adapter for CAUSAL_LM, not a reward model"),
        (an_adapter_with_two_labels, "the/model gives 2 numbers a text"),
        (an_adapter_without_weights, "the/model holds no adapter_model.safetensors; run the job that writes it"),
        (an_adapter_without_a_head, "the adapter the/model holds no head"),
        (an_adapter_without_its_base, "the base model of the/model: there is no folder /nowhere/at/all"),
        (no_chat_template, "the tokenizer of the/model has no chat template"),
    ],
)
def test_what_is_no_reward_model_is_told_at_once(
    base: str, tmp_path: Path, make: Callable[[str, Path], str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"^trl.reward_funcs: .*{reason}"):
        ensure_reward_model(spec(make(base, tmp_path)), conversational=True)


def test_a_whole_reward_model_is_accepted(whole: str) -> None:
    ensure_reward_model(spec(whole), conversational=True)


def test_a_classifier_whose_head_is_missing_is_not_given_a_random_one(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_reward_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "score" not in k}, path, {"format": "pt"})
    with pytest.raises(ConfigError, match="the/model lacks score.weight, so it is no reward model"):
        RewardModelWorker(spec(folder))


def test_the_readmes_lines_load_an_adapter(base: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    tuned = save_adapter(base, tmp_path)
    texts = list(COMPLETIONS[:3])
    expected = alone(tuned, base, texts)
    for loaded in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1),
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1),
    ):
        assert alone(loaded.eval(), base, texts) == pytest.approx(expected, abs=1e-5)
    assert isinstance(loaded, PeftModel)
