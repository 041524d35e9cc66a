"""The actor that scores with a reward model: one number a conversation, from a sequence classifier with one label.

The numbers are those of TRL's GRPOTrainer (1.16) for the same model: prompt and completion are written with the reward
model's own chat template, or joined as plain text, and nothing is cut. The model is a folder or a name on the hub: a whole
model, or an adapter that holds its head, as rl: reward_trainer leaves it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from actors import adapter, device, hub
from actors.errors import ConfigError
from actors.rewards import checked
from actors.specs import RewardModelSpec
from actors.types import Completion, RolloutGroup, Scores

KEY = "trl.reward_funcs"
HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # as transformers' classifiers name them
TRAIN_ONE = "rl: reward_trainer trains one"
TOKENS_AT_ONCE = 2**14  # of a forward pass, padding included: bounds its memory, and fills a GPU


class RewardModelWorker:
    """One reward model in a process of its own."""

    def __init__(self, spec: RewardModelSpec, after: Sequence[Any] = ()) -> None:
        """after: actors that must have loaded before this one takes memory of the GPU that it may share with them."""
        device.set_threads(spec.threads)
        device.take_turn(after)
        self.spec = spec
        self.tokenizer = load_tokenizer(spec)
        self.model = load_model(spec).to(device.device())
        # The reward is read at the last token that is not this one.
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id

    def __repr__(self) -> str:  # what the dashboard and Ray's logs call it
        return f"reward model {self.spec.path}"

    def ready(self) -> None:
        """Returns once the model is loaded: calls are timed from then on."""

    def score(self, prompt: Any, columns: Mapping[str, Any], group: RolloutGroup) -> Scores:
        """Rewards of one group. What fails is a failure in the result, never a zero."""
        try:
            completions = group.completions(conversational=not isinstance(prompt, str))
            rewards = self.rewards([self.text(prompt, completion) for completion in completions])
            return Scores(self.spec.path, checked(rewards, len(group.texts)), None)
        except Exception as error:  # the fault boundary: a chat template may raise anything, and memory may run out
            return Scores(self.spec.path, (), f"{type(error).__name__}: {error}")

    def text(self, prompt: Any, completion: Completion) -> str:
        """What the model reads."""
        if isinstance(completion, str):
            return str(prompt) + completion
        messages = [*prompt, *completion]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.spec.chat_template_kwargs))

    @torch.inference_mode()
    def rewards(self, texts: Sequence[str]) -> list[float]:
        """One number a text, whatever the others are."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False)
        rows = [{name: values[i] for name, values in encoded.items()} for i in range(len(texts))]
        rewards = [0.0] * len(texts)
        for batch in batches([len(row["input_ids"]) for row in rows], TOKENS_AT_ONCE):
            padded = self.tokenizer.pad([rows[i] for i in batch], padding_side="right", return_tensors="pt")
            logits_B1 = self.model(**padded.to(device.device())).logits
            for i, reward in zip(batch, logits_B1[:, 0].tolist(), strict=True):
                rewards[i] = reward
        return rewards


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Indices of rows in batches of at most `tokens` tokens when padded, shortest first; a longer row goes alone."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def load_tokenizer(spec: RewardModelSpec) -> Any:
    """The reward model's own tokenizer; that of its base where an adapter came without one."""
    from transformers import AutoTokenizer

    folder = _folder(spec)
    own = (folder / "tokenizer_config.json").is_file() or not _is_adapter(folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder if own else _base(spec, folder), trust_remote_code=spec.model.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(spec: RewardModelSpec) -> Any:
    """The classifier, ready to score. Raises ConfigError when its files lack the head.

    An adapter stays beside its base: merged into bfloat16 weights it would lose its smallest parts, and rewards shift.
    """
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    folder = _folder(spec)
    adapted = _is_adapter(folder)
    model, loaded = AutoModelForSequenceClassification.from_pretrained(
        _base(spec, folder) if adapted else folder,
        num_labels=1,
        dtype=getattr(torch, spec.model.dtype),
        trust_remote_code=spec.model.trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    if adapted:
        model = PeftModel.from_pretrained(model, str(folder))
    elif loaded["missing_keys"]:
        missing = ", ".join(sorted(loaded["missing_keys"])[:3])
        raise ConfigError(f"{KEY}: {spec.path} lacks {missing}, so it is no reward model; {TRAIN_ONE}")
    model.config.use_cache = False
    return model.eval()


def ensure_reward_model(spec: RewardModelSpec, *, conversational: bool) -> None:
    """Raises ConfigError for what is not there or no reward model. Reads files' headers, no weights.

    conversational: whether prompts are chat messages, which need a chat template.
    """
    folder = _folder(spec)
    if _is_adapter(folder):
        task = json.loads((folder / adapter.CONFIG_FILE).read_text(encoding="utf-8")).get("task_type")
        if task != "SEQ_CLS":
            raise ConfigError(f"{KEY}: {spec.path} is an adapter for {task}, not a reward model (SEQ_CLS); {TRAIN_ONE}")
        _base(spec, folder)
        labels = _adapter_labels(spec, folder)
    else:
        labels = _model_labels(spec, folder)
    if labels != 1:
        raise ConfigError(f"{KEY}: {spec.path} gives {labels} numbers a text, and a reward model gives one; {TRAIN_ONE}")
    if conversational and load_tokenizer(spec).chat_template is None:
        raise ConfigError(
            f"{KEY}: the prompts are chat messages, and the tokenizer of {spec.path} has no chat template to write them "
            "with; use prompts of plain text, or add the template that the model was trained with to its folder"
        )


def _adapter_labels(spec: RewardModelSpec, folder: Path) -> int:
    """Rows of the head that the adapter holds."""
    if not (folder / adapter.WEIGHTS_FILE).is_file():
        raise ConfigError(f"{KEY}: {spec.path} holds no {adapter.WEIGHTS_FILE}; run the job that writes it to its end")
    for name, shape in adapter.read_shapes(folder).items():
        if name.endswith(HEADS):
            return shape[0]
    raise ConfigError(f"{KEY}: the adapter {spec.path} holds no head, so it gives no reward; {TRAIN_ONE}")


def _model_labels(spec: RewardModelSpec, folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.model.trust_remote_code)
    classes = [*(config.architectures or []), *getattr(config, "auto_map", {})]
    if not any(name.endswith("ForSequenceClassification") for name in classes):
        what = ", ".join(config.architectures or []) or "a model of no named class"
        raise ConfigError(f"{KEY}: {spec.path} is {what}, not a reward model (a sequence classifier); {TRAIN_ONE}")
    if not any(folder.glob("*.safetensors")):
        raise ConfigError(f"{KEY}: {spec.path} holds no *.safetensors; save the model with save_pretrained")
    return int(config.num_labels)


def _folder(spec: RewardModelSpec) -> Path:
    if _is_adapter(Path(spec.model.name)):
        return Path(spec.model.name)
    try:
        return Path(hub.resolve(spec.model.name, KEY))
    except ConfigError as error:
        raise ConfigError(f"{error}. If a job of yours writes it, run that job first") from None


def _base(spec: RewardModelSpec, folder: Path) -> str:
    name = json.loads((folder / adapter.CONFIG_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    return hub.resolve(str(name), f"{KEY}: the base model of {spec.path}")


def _is_adapter(folder: Path) -> bool:
    return (folder / adapter.CONFIG_FILE).is_file()
