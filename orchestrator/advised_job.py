"""The job file that `eagleray advise` writes: what follows for its keys from a method, the rows and the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from typing import Any

import yaml

from orchestrator.config import load
from orchestrator.plan import Node, total_gpus
from orchestrator.planning import LORA
from orchestrator.row_kinds import Fit
from orchestrator.row_sample import Sample
from orchestrator.schema import JobConfig
from orchestrator.sizing import Keys, ModelSize, Way, way_for

# Where to start from with LoRA.
LEARNING_RATES = {"sft": 2e-4, "dpo": 5e-5, "orpo": 1e-4, "kto": 5e-5, "reward_trainer": 1e-4, "grpo": 1e-4}
OWN: dict[str, Keys] = {  # keys of a method
    "sft": {},
    "dpo": {"rl_beta": 0.1},
    "orpo": {"orpo_alpha": 0.1},
    "kto": {"rl_beta": 0.1},
    "reward_trainer": {"center_rewards_coefficient": 0.01},
    "grpo": {},
}

MULTIPLE = 64  # sequence_len is one of it
FAR_OUT = 2  # times the 99th percentile: rows that long are left out rather than paid for by all
UNSEEN = 1.1  # rows that nobody has looked at may be longer
LONGEST_DOCUMENT = 2048  # tokens: longer plain text is cut
TOKENS_AT_ONCE = 4096  # of a forward pass
GENERATIONS = 8
COMPLETIONS = 64  # of a step of GRPO: 8 prompts
COMPLETION_TOKENS = {"gpu": 512, "cpu": 64}
HELD_OUT_SHARE, HELD_OUT_MOST = 0.05, 64
FEW_ROWS = 40  # of which none are held out
SMALL, LARGE = 1000, 10_000  # rows, for the size of a step
SHORT_DATA = 5000  # rows that SFT sees three times
WIDTH = 110  # columns of the file
GROUPS = ("adapter", "datasets", "micro_batch_size", "trl", "vllm", "ray")  # keys before which the file has a blank line


@dataclass(frozen=True)
class Found:
    """What a job file follows from."""

    data: str  # a path or a name on the hub, as given
    sample: Sample
    model: str
    size: ModelSize
    chat_template: str | None  # that a job must name; None = the model has its own
    nodes: tuple[Node, ...]
    reward: str | None  # of trl.reward_funcs
    folders: tuple[str, ...]  # where files and functions are looked for: the current one, and the job file's

    @property
    def completion_tokens(self) -> int:
        """Of a completion of GRPO, at most."""
        return COMPLETION_TOKENS["gpu" if self.gpu else "cpu"]

    @property
    def gpu(self) -> bool:
        """Whether there is one."""
        return total_gpus(self.nodes) > 0


def keys_of(found: Found, method: str, fit: Fit) -> Keys:
    """The keys of the job in the file's order. Raises ConfigError when the model does not fit the cluster."""
    rl = None if method == "sft" else method
    rows = found.sample.total
    job: Keys = {
        "base_model": found.model,
        "output_dir": f"outputs/{Path(found.data).stem}-{method.removesuffix('_trainer')}",
        **({"rl": rl, **OWN[method]} if rl else {}),
        **LORA,
        "datasets": [fit.layout.entry(found.data)],
        **({"val_set_size": min(HELD_OUT_MOST, ceil(HELD_OUT_SHARE * rows))} if rows >= FEW_ROWS else {}),
        **rows_of(found, method, fit),
        "num_epochs": 3 if method == "sft" and rows < SHORT_DATA else 1,
        "learning_rate": LEARNING_RATES[method],
        "lr_scheduler": "constant_with_warmup" if method == "grpo" else "cosine",
        "warmup_ratio": 0.05,
        **({"gradient_checkpointing": True} if found.gpu else {}),
    }
    own: Keys = {}
    if rl == "grpo":
        job["trl"] = {
            "num_generations": GENERATIONS,
            "max_completion_length": found.completion_tokens,
            "reward_funcs": [found.reward],
            "log_completions": True,
        }
        own = {} if found.gpu else {"kv_cache_gib": 1}
    if fit.bad:  # half as many again as in the sample
        own["max_bad_rows"] = max(1, ceil(150 * len(fit.bad) / (len(fit.lengths) + len(fit.bad)))) / 100
    job |= {"ray": own} if own else {}

    def placed(way: Way) -> Keys:
        return _merged(job, {**way, **batches_of(method, job["sequence_len"], rows, way)})

    way = way_for(rl, found.model, found.size, found.nodes, rows, lambda way: config_of(placed(way), found.folders))
    return _in_order(placed(way))


def rows_of(found: Found, method: str, fit: Fit) -> Keys:
    """How rows are written and how long they may be: all but those far out, and no more than the model was made for."""
    longest, most = fit.lengths[-1], percentile(fit.lengths, 99)
    wanted = longest if longest <= FAR_OUT * most else most
    if found.sample.total > len(found.sample.rows):
        wanted = ceil(wanted * UNSEEN)
    if fit.layout.type == "completion":
        wanted = min(wanted, LONGEST_DOCUMENT)
    rounded = ceil((wanted + _added(found, method)) / MULTIPLE) * MULTIPLE
    keys: Keys = {"sequence_len": min(rounded, found.size.context or rounded)}
    if found.chat_template and isinstance(fit.layout.type, str) and "chat_template" in fit.layout.type:
        keys["chat_template"] = found.chat_template
    return keys


def percentile(lengths: Sequence[int], percent: int) -> int:
    """Of sorted numbers: so many percent of them are no greater."""
    return lengths[max(0, ceil(percent / 100 * len(lengths)) - 1)]


def config_of(keys: Mapping[str, Any], folders: Sequence[str]) -> JobConfig:
    """The keys as a job file of theirs loads. folders: where it looks for what they name. Raises ConfigError."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "job.yaml")
        file.write_text(yaml.safe_dump(dict(keys), allow_unicode=True), encoding="utf-8")
        config = load(file)
    config.source = replace(config.source, elsewhere=tuple(folders))
    return config


def text_of(keys: Keys, told: Sequence[str]) -> str:
    """The file, with what is told at its top; indented lines of that are commands, and stay whole."""
    lines = [line for one in told for line in ([one] if one.startswith(" ") else wrap(one, WIDTH))]
    comment = "".join(f"# {line}\n" for line in lines)
    parts = []
    for key, value in keys.items():
        written = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True, width=WIDTH)
        parts.append(f"\n{written}" if key in GROUPS else written)
    return comment + "".join(parts)


def _added(found: Found, method: str) -> int:
    """Tokens of a sequence that are not in its row."""
    return found.completion_tokens if method == "grpo" else 0


def batches_of(method: str, length: int, rows: int, way: Way) -> Keys:
    """How many rows, or completions, a step has. length: tokens of a row, at most. rows: of the data. way: its ranks count."""
    ranks = way.get("ray_num_workers", 1)
    sequences = 2 if method in ("dpo", "orpo", "reward_trainer") else 1  # of a row, which go through the model together
    most = max(1, TOKENS_AT_ONCE // (length * sequences))
    micro = 1 << min(4 if method == "grpo" else 3, most.bit_length() - 1)  # a power of two, up to 16 or 8
    step = COMPLETIONS if method == "grpo" else 8 if rows < SMALL else 16 if rows < LARGE else 32
    if method == "kto":
        micro = max(2, micro)  # each answer is compared with the others of its batch
    return {"micro_batch_size": micro, "gradient_accumulation_steps": max(1, step // (micro * ranks))}


def _merged(keys: Mapping[str, Any], more: Mapping[str, Any]) -> Keys:
    """Both, where sections of the same name have the keys of both."""
    merged = dict(keys)
    for key, value in more.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _in_order(keys: Keys) -> Keys:
    """Sections last, and what belongs to the adapter beside it."""
    last = ["num_epochs", "learning_rate", "lr_scheduler", "warmup_ratio", "gradient_checkpointing", "trl", "vllm", "ray"]
    moved = ["load_in_4bit", "micro_batch_size", "gradient_accumulation_steps", "ray_num_workers", "fsdp_version", *last]
    first = [key for key in keys if key not in moved]
    at = first.index("adapter") + 1
    order = [*first[:at], "load_in_4bit", *first[at:], *moved[1:]]
    return {key: keys[key] for key in order if key in keys}
