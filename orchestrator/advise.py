"""`eagleray advise`: from rows of data to the method that they allow, and to a job file that runs as it is.

The tree: a reward function, or prompts whose answers can be verified -> GRPO; a better and a worse answer -> DPO, ORPO for a
model that nobody has taught to answer yet, or a reward model; one answer and whether it was liked -> KTO; answers to imitate
-> SFT. Which rows are which is a question for row_kinds.py and prompt_rows.py, what stands in the file for advised_job.py.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.errors import DataError
from actors.formats.base import RowError
from actors.formats.kto import label_of
from actors.functions import load_function
from actors.model import load_tokenizer
from actors.specs import ModelSpec
from orchestrator import sizing
from orchestrator.advised_job import LEARNING_RATES, Found, batches_of, config_of, keys_of, rows_of, text_of
from orchestrator.dataset_plan import METHOD_NAMES
from orchestrator.hardware import AUTO
from orchestrator.plan import Node
from orchestrator.prompt_rows import Verifier, prompt_fit, verifier_of
from orchestrator.rewards import reward_models
from orchestrator.row_kinds import LAYOUTS, Fit, fits_of, template_for
from orchestrator.row_sample import Sample, take_sample
from orchestrator.runnable import ensure_runnable
from orchestrator.schema import DatasetConfig, JobConfig
from orchestrator.sizing import Keys

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # comes with Eagleray, and runs without a GPU
# The methods, and what each is for.
WHY_ELSE = {
    "dpo": "with the model as it is for a reference",
    "orpo": "in one stage without a reference, for a model that nobody has taught to answer",
    "reward_trainer": "to score the completions of a GRPO job by what these pairs prefer",
    "kto": "from single answers that were liked or not",
    "sft": "to imitate the answers",
    "grpo": "from completions of its own, if something rewards them",
}
# What each method needs, for rows that none can use.
NEEDS = {
    "grpo": "prompt, question, problem or instruction; and --reward FN, or answer (short), solution, test_list or input_output",
    "dpo": "chosen and rejected; beside them messages, prompt, question, instruction or input, or all in conversations",
    "orpo": "the same as DPO",
    "reward_trainer": "the same as DPO",
    "kto": "messages, prompt, question, instruction or input; completion; and a label that is true or false",
    "sft": "messages or conversations; instruction and output; question and answer; prompt and completion; or text",
}


@dataclass(frozen=True)
class Other:
    """Another method that the rows allow."""

    method: str
    overrides: tuple[str, ...]  # of the job file, which make it a job of that method
    again: tuple[str, ...] = ()  # arguments of `advise`, for a method that needs a file of its own

    def command(self, file: str) -> str:
        """How one gets there from a job file of that name."""
        return shlex.join(["eagleray", "advise", *self.again] if self.again else ["eagleray", "run", file, *self.overrides])


@dataclass(frozen=True)
class Advice:
    """What was found, and the job that follows from it."""

    found: Found
    fit: Fit  # how the rows are read
    method: str  # a key of WHY_ELSE
    why: str
    others: tuple[Other, ...]
    keys: Keys  # of the job file
    config: JobConfig  # the same, loaded

    def text(self, file: str) -> str:
        """The job file. file: its name, for the commands in its comment."""
        lines = [f"{name_of(self.method)}: {self.why}.", f"  {shlex.join(['eagleray', 'run', file])}"]
        for other in self.others:
            lines += [f"Or {name_of(other.method)}, {WHY_ELSE[other.method]}:", f"  {other.command(file)}"]
        return text_of(self.keys, lines)


def name_of(method: str) -> str:
    """A key of WHY_ELSE for a person."""
    name = METHOD_NAMES[None if method == "sft" else method]
    return f"a {name}" if name.islower() else name


def advise(data: str, model: str | None, reward: str | None, nodes: Sequence[Node], folder: Path, where: str = AUTO) -> Advice:
    """Looks at the rows of `data`. folder: where the job file will lie. where: how `--cluster` named the nodes.

    Raises DataError for data that cannot be read or that no method can use, ConfigError for a model that cannot be had or
    does not fit, and for a reward function that cannot be imported.
    """
    name = model or DEFAULT_MODEL
    folders = (str(Path.cwd()), str(folder.resolve()))
    tokenizer = load_tokenizer(ModelSpec(name, "float32"))
    sample = take_sample(DatasetConfig(path=data), folders)
    tried = {method: fits_of(method, sample, tokenizer) for method in LAYOUTS} | {"grpo": [prompt_fit(sample, tokenizer)]}
    good = {method: fits[-1] for method, fits in tried.items() if fits and fits[-1].good}
    labels = _labels(good["kto"], sample) if "kto" in good else Counter[bool]()
    if len(labels) < 2:
        good.pop("kto", None)  # nothing to compare
    chats = bool(tokenizer.chat_template)
    verifier = verifier_of(sample, chats) if "grpo" in good else None
    chosen = _chosen(good, labels, chats, reward, verifier)
    if chosen is None:
        raise DataError(_no_method(data, sample, tried, reward))
    method, why = chosen
    fit = good["dpo" if method == "orpo" else method]
    rewarded = reward or (verifier.reward if verifier else None)
    found = Found(data, sample, name, sizing.size_of(name), template_for(tokenizer), tuple(nodes), rewarded, folders)
    keys = keys_of(found, method, fit)
    config = config_of(keys, folders)
    ensure_runnable(config)
    if reward is not None and not reward_models(config):
        load_function("--reward", reward, folders)
    options = [*(["--model", model] if model else []), *(["--cluster", where] if where != AUTO else [])]
    again = (data, *options, "--reward", rewarded or "FN")
    return Advice(found, fit, method, why, tuple(_others(method, good, keys, found, again)), keys, config)


def _chosen(
    good: Mapping[str, Fit], labels: Counter[bool], chats: bool, reward: str | None, verifier: Verifier | None
) -> tuple[str, str] | None:
    """The method, and why it is that one; None where there is none."""
    asked = good["grpo"].layout.columns[0] if "grpo" in good else ""
    if reward is not None:
        return ("grpo", f"{reward} rewards what the model answers to `{asked}`") if asked else None
    if "reward_trainer" in good and (good["reward_trainer"].layout.columns[0] == "input" or "dpo" not in good):
        return "reward_trainer", "a better and a worse answer to `input`, as rows to score with have them"
    if "dpo" in good and chats:
        return "dpo", "a better and a worse answer to each prompt, for a model that has been taught to answer"
    if "dpo" in good:
        return "orpo", "a better and a worse answer to each prompt, for a model without a chat template: both in one stage"
    if "kto" in good:
        counts = (f"{count} {str(label).lower()}" for label, count in labels.items())
        return "kto", f"single answers with a label: {' and '.join(counts)}"
    if verifier is not None:
        return "grpo", f"prompts in `{asked}` with {verifier.needs}, by which {verifier.reward} rewards completions"
    if "sft" in good:
        columns = " and ".join(f"`{name}`" for name in good["sft"].layout.columns)
        return "sft", f"text to imitate in {columns}"
    return None


def _labels(fit: Fit, sample: Sample) -> Counter[bool]:
    """How often each label occurs, as KTO reads it; rows that it refuses have none."""
    counts = Counter[bool]()
    for row in sample.rows:
        with suppress(RowError):
            counts[label_of(row, fit.layout.columns[-1])] += 1
    return counts


def _others(method: str, good: Mapping[str, Fit], keys: Keys, found: Found, again: tuple[str, ...]) -> Iterator[Other]:
    """again: arguments of `advise` that make it GRPO."""
    for other in WHY_ELSE:
        fit = good.get("dpo" if other == "orpo" else other)
        if other == method or fit is None:
            continue
        if other == "grpo":
            if fit.layout.columns != ("text",):  # which is seldom a question
                yield Other(other, (), again)
            continue
        rows = rows_of(found, other, fit)
        changes = {
            "rl": None if other == "sft" else other,
            "datasets[0]": fit.layout.entry(found.data),
            **rows,
            **batches_of(other, rows["sequence_len"], found.sample.total, keys),
            "learning_rate": LEARNING_RATES[other],
        }
        now = {**keys, "datasets[0]": keys["datasets"][0]}
        overrides = tuple(f"{key}={_flow(value)}" for key, value in changes.items() if now.get(key) != value)
        yield Other(other, overrides)


def _flow(value: Any) -> str:
    """A value as an override has it, in one line: JSON is YAML."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _no_method(data: str, sample: Sample, tried: Mapping[str, Sequence[Fit]], reward: str | None) -> str:
    columns = ", ".join(f"{name} ({_kind(sample, name)})" for name in sample.columns) or "none"
    asked = f"--reward {reward} needs prompts, and" if reward else "no method can train on these rows:"
    lines = [f"{data}: {asked} their columns are {columns}"]
    for method in ("grpo",) if reward else ("sft", "dpo", "orpo", "reward_trainer", "kto", "grpo"):
        near = max(tried.get(method, []), key=lambda fit: len(fit.layout.columns), default=None)
        why = ""
        if near and near.bad and (reward or method != "grpo"):
            looked = len(near.bad) + len(near.lengths)
            why = f"; {len(near.bad)} of {looked} rows do not fit, such as {near.bad[0].place}: {near.bad[0].reason}"
        lines.append(f"  {name_of(method)} needs {NEEDS[method]}{why}")
    return "\n".join(lines)


def _kind(sample: Sample, name: str) -> str:
    value = next((row[name] for row in sample.rows if row.get(name) is not None), None)
    kinds = {bool: "true or false", str: "text", int: "a number", float: "a number", list: "a list", dict: "a mapping"}
    return kinds.get(type(value), "empty" if value is None else type(value).__name__)
