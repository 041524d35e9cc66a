"""What a run measures: the table of every metric, and the log that keeps them.

`METRICS` is the one place that names a metric: the driver may only write names that stand there, and `report.py`,
`display.py` and `frame.py` read records by those names. A new metric is a line in the table, and one in that of
`ray_metrics.py`. `MetricsLog` writes each record up to four times: a line of `metrics.jsonl` (the record that lasts
and that a resumed run continues), TensorBoard, Weights & Biases, and Ray's metrics, which Prometheus collects.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from actors.errors import EaglerayError
from orchestrator.ray_metrics import RayMetrics
from orchestrator.wandb_run import WandbRun

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["train", "eval"]

METRICS_FILE = "metrics.jsonl"

# name -> (unit, meaning). A name that ends in "/*" is a family: one metric per reward function.
METRICS: dict[str, tuple[str, str]] = {
    "step": ("steps", "optimizer steps done"),
    "policy_version": ("version", "version of the policy that the step published"),
    "epoch": ("epochs", "passes over the training prompts so far"),
    "reward": ("reward", "mean weighted reward of the completions"),
    "reward_std": ("reward", "standard deviation of the weighted reward over the completions"),
    "reward/*": ("reward", "mean reward that one function gave, before weighting"),
    "accuracy": ("share", "share of completions whose first reward function gave 1 or more, of those it scored"),
    "completion_length": ("tokens", "mean length of a completion"),
    "truncated": ("share", "share of completions cut at max_completion_length"),
    "loss": ("nats", "policy loss, with the KL penalty when there is one"),
    "kl": ("nats/token", "KL divergence from the reference model, mean over trained tokens; none when beta is 0"),
    "clip_fraction": ("share", "share of tokens whose policy ratio was clipped"),
    "entropy": ("nats/token", "entropy of the policy's next-token distribution, mean over trained tokens"),
    "grad_norm": ("norm", "gradient norm before clipping"),
    "learning_rate": ("1", "learning rate of the step"),
    "importance_ratio": (
        "ratio",
        "mean truncated ratio of trainer to engine probability of the sampled tokens",
    ),
    "engine_gap": ("nats/token", "mean |trainer logprob - engine logprob| of the sampled tokens"),
    "staleness": ("versions", "most policy versions between sampling a group of the step and training on it"),
    "groups": ("groups", "groups of completions that were sampled"),
    "groups_without_signal": ("groups", "groups that move nothing: equal rewards, or none"),
    "samples_dropped": ("completions", "completions without a reward, which count nowhere"),
    "completion_tokens": ("tokens", "tokens sampled"),
    "sample_s": ("s", "seconds from the first prompt at an engine to the last completion, partly beside training"),
    "score_s": ("s", "seconds spent in reward functions"),
    "train_s": ("s", "seconds spent in forward, backward and the optimizer"),
    "sync_s": ("s", "seconds from publishing the policy until every engine has proved it"),
    "step_s": ("s", "seconds of the whole step"),
    "tokens_per_s": ("tokens/s", "completion tokens per second of the whole step"),
    "gpu_free_training": ("GiB", "free GPU memory when the engines sleep, on the GPU that has least of it"),
    "gpu_free_sampling": ("GiB", "free GPU memory when the engines have woken up, on the GPU that has least of it"),
    "probe_gap": ("nats/token", "|trainer logprob - engine logprob| on the fixed probe after the sync"),
    "snapshot_bytes": ("bytes", "size of the published snapshot"),
    "token_accuracy": ("share", "share of trained tokens that the model finds the likeliest"),
    "reward_chosen": ("reward", "mean reward of the better answers: beta times the log ratio to the reference"),
    "reward_rejected": ("reward", "mean reward of the worse answers"),
    "reward_margin": ("reward", "mean difference of the two rewards of a pair"),
    "pair_accuracy": ("share", "share of pairs whose better answer has the higher reward"),
    "mean_reward": ("reward", "mean reward of all answers"),
    "log_odds_ratio": ("nats", "mean log odds ratio of the better to the worse answer"),
    "eval/loss": ("nats", "loss on the held-out rows"),
    "eval/entropy": ("nats/token", "entropy of the next-token distribution on the held-out rows"),
    "eval/token_accuracy": ("share", "share of trained tokens of held-out rows that the model finds the likeliest"),
    "eval/reward_chosen": ("reward", "mean reward of the better answers of held-out rows"),
    "eval/reward_rejected": ("reward", "mean reward of the worse answers of held-out rows"),
    "eval/reward_margin": ("reward", "mean difference of the two rewards of a held-out pair"),
    "eval/pair_accuracy": ("share", "share of held-out pairs whose better answer has the higher reward"),
    "eval/mean_reward": ("reward", "mean reward of all answers of held-out rows"),
    "eval/kl": ("nats", "KL divergence from the reference model on held-out rows"),
    "eval/log_odds_ratio": ("nats", "mean log odds ratio on held-out rows"),
    "eval/epoch": ("epochs", "passes over the training rows at the evaluation"),
    "eval/accuracy": (
        "share",
        "held-out accuracy: share of completions whose first reward function gave 1 or more",
    ),
    "eval/reward": ("reward", "mean weighted reward on the held-out prompts"),
    "eval/reward/*": (
        "reward",
        "mean reward that one function gave on the held-out prompts, before weighting",
    ),
    "eval/completion_length": ("tokens", "mean length of a completion of a held-out prompt"),
}


def entry(name: str) -> tuple[str, str]:
    """The table's key for a metric, and the reward function's name if the key is a family (else "").

    `entry("reward/exact") == ("reward/*", "exact")`. Raises KeyError for a name that the table does not have.
    """
    if name in METRICS:
        return name, ""
    for key in METRICS:
        if key.endswith("/*") and name.startswith(key[:-1]):
            return key, name.removeprefix(key[:-1])
    raise KeyError(f"no metric is called '{name}'; describe it in METRICS of orchestrator/metrics.py")


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, oldest first; a value that was not finite comes back as NaN.

    A half-written last line, from a process that was killed or is just writing, is left out. Raises EaglerayError
    when the file does not exist or another line is damaged.
    """
    if not path.is_file():
        raise EaglerayError(f"{path} does not exist; give the output_dir of a run that has finished a step")
    records: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if record["kind"] not in get_args(Kind) or not isinstance(record["step"], int | float):
                raise ValueError("not a metrics record")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise EaglerayError(f"{path}, line {number} is not a metrics record; delete that line") from error
        records.append({name: math.nan if value is None else value for name, value in record.items()})
    return records


def usual_step_s(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Median seconds of a step; None = there is none yet."""
    seconds = [record["step_s"] for record in records if math.isfinite(record.get("step_s", math.nan))]
    return median(seconds) if seconds else None


class MetricsLog:
    """Writes a run's records to metrics.jsonl, TensorBoard, Weights & Biases and Ray's metrics.

    `resumed_from` is the step of the checkpoint that the run continues from: records of later steps are dropped,
    since those steps are trained again. 0 is a new run: the metrics of an earlier run in the same folder are moved
    to `metrics.previous.jsonl`. Raises EaglerayError when the file to continue is damaged.
    """

    def __init__(
        self,
        output_dir: Path,
        run: str,
        resumed_from: int = 0,
        use_tensorboard: bool = True,
        wandb: WandbRun | None = None,
        method: str = "",
    ) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / METRICS_FILE
        self._ray = RayMetrics(run, method, METRICS)
        self._tensorboard: SummaryWriter | None = None
        self._use_tensorboard = use_tensorboard
        self._wandb = wandb
        self._open(resumed_from)

    def _open(self, resumed_from: int) -> None:
        _keep_until(self.path, resumed_from)
        self._file = self.path.open("a", encoding="utf-8")
        if self._use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here: it loads torch, which the driver may not need

            # TensorBoard hides what earlier files say about purge_step and later.
            purge_step = resumed_from + 1 if resumed_from else 0
            self._tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=purge_step)

    def go_back(self, step: int) -> None:
        """Drops the records of later steps, which are trained again."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._open(step)

    def write(self, kind: Kind, record: Mapping[str, float]) -> None:
        """Log one record, which must hold `step`; it is on disk when this returns.

        Raises KeyError, before anything is written, for a name that METRICS does not have.
        """
        entries = {name: entry(name) for name in record}
        step = int(record["step"])
        self._file.write(_line(kind, record))
        self._file.flush()
        if self._tensorboard is not None:
            for name in record.keys() - {"step"}:
                self._tensorboard.add_scalar(name, float(record[name]), step)
            self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.write({name: value for name, value in record.items() if name != "step"}, step)
        for name, (key, function) in entries.items():
            self._ray.write(key, function, float(record[name]))

    def keep_result(self) -> None:
        """Tells Weights & Biases that the result lies in output_dir."""
        if self._wandb is not None:
            self._wandb.upload_result()

    def close(self, failed: bool = False) -> None:
        """Close the files; calling it twice does no harm."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.close(failed)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=error is not None)


def _line(kind: Kind, record: Mapping[str, float]) -> str:
    # JSON has no NaN: null keeps the file readable for everything else that reads JSON.
    values: dict[str, float | None] = {
        name: value if isinstance(value, int) else float(value) if math.isfinite(value) else None
        for name, value in record.items()
    }
    return json.dumps({"time": round(time.time(), 3), "kind": kind, **values}, allow_nan=False) + "\n"


def _keep_until(path: Path, step: int) -> None:
    """Leave only records up to `step` in the file, in one rename; step 0 sets the whole file aside."""
    if not path.is_file():
        return
    if step == 0:
        path.replace(path.with_name("metrics.previous.jsonl"))
        return
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="utf-8") as file:
        for record in read(path):
            if record["step"] <= step:
                nulls = {
                    name: None if isinstance(value, float) and math.isnan(value) else value
                    for name, value in record.items()
                }
                file.write(json.dumps(nulls, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
