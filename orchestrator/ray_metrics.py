"""A run's records as metrics of Ray, which Ray's dashboard shows and Prometheus collects as `ray_<name>`.

`RAY_METRICS` is the one table of their names; what each means is in METRICS of metrics.py. A new metric there needs a line
here, and cluster/grafana/METRICS.md is this table for people. Every series carries `job_id` (Ray's), `run` and `method`;
metrics of a reward function carry `function` too. It is not `job`: that label is Prometheus's own.
"""

from collections.abc import Mapping
from typing import Literal

import ray
from ray.util.metrics import Counter, Gauge, Histogram

Kind = Literal["gauge", "counter", "histogram"]

TAGS = ("job_id", "run", "method")
STEP_SECONDS = [0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 3600]

# name -> (kind, the record's metric): a gauge is the last step's value, a counter adds the steps' values up
RAY_METRICS: dict[str, tuple[Kind, str]] = {
    "eagleray_steps": ("gauge", "step"),
    "eagleray_policy_version": ("gauge", "policy_version"),
    "eagleray_epochs": ("gauge", "epoch"),
    "eagleray_reward": ("gauge", "reward"),
    "eagleray_reward_std": ("gauge", "reward_std"),
    "eagleray_function_reward": ("gauge", "reward/*"),
    "eagleray_accuracy_ratio": ("gauge", "accuracy"),
    "eagleray_completion_length_tokens": ("gauge", "completion_length"),
    "eagleray_truncated_ratio": ("gauge", "truncated"),
    "eagleray_loss_nats": ("gauge", "loss"),
    "eagleray_kl_nats_per_token": ("gauge", "kl"),
    "eagleray_clipped_ratio": ("gauge", "clip_fraction"),
    "eagleray_entropy_nats_per_token": ("gauge", "entropy"),
    "eagleray_grad_norm": ("gauge", "grad_norm"),
    "eagleray_learning_rate": ("gauge", "learning_rate"),
    "eagleray_importance_ratio": ("gauge", "importance_ratio"),
    "eagleray_engine_gap_nats_per_token": ("gauge", "engine_gap"),
    "eagleray_staleness_versions": ("gauge", "staleness"),
    "eagleray_groups_total": ("counter", "groups"),
    "eagleray_groups_without_signal_total": ("counter", "groups_without_signal"),
    "eagleray_samples_dropped_total": ("counter", "samples_dropped"),
    "eagleray_completion_tokens_total": ("counter", "completion_tokens"),
    "eagleray_sample_seconds": ("gauge", "sample_s"),
    "eagleray_score_seconds": ("gauge", "score_s"),
    "eagleray_train_seconds": ("gauge", "train_s"),
    "eagleray_sync_seconds": ("gauge", "sync_s"),
    "eagleray_step_seconds": ("gauge", "step_s"),
    "eagleray_step_duration_seconds": ("histogram", "step_s"),
    "eagleray_tokens_per_second": ("gauge", "tokens_per_s"),
    "eagleray_gpu_free_training_gibibytes": ("gauge", "gpu_free_training"),
    "eagleray_gpu_free_sampling_gibibytes": ("gauge", "gpu_free_sampling"),
    "eagleray_probe_gap_nats_per_token": ("gauge", "probe_gap"),
    "eagleray_snapshot_bytes_total": ("counter", "snapshot_bytes"),
    "eagleray_token_accuracy_ratio": ("gauge", "token_accuracy"),
    "eagleray_reward_chosen": ("gauge", "reward_chosen"),
    "eagleray_reward_rejected": ("gauge", "reward_rejected"),
    "eagleray_reward_margin": ("gauge", "reward_margin"),
    "eagleray_pair_accuracy_ratio": ("gauge", "pair_accuracy"),
    "eagleray_mean_reward": ("gauge", "mean_reward"),
    "eagleray_log_odds_nats": ("gauge", "log_odds_ratio"),
    "eagleray_eval_loss_nats": ("gauge", "eval/loss"),
    "eagleray_eval_entropy_nats_per_token": ("gauge", "eval/entropy"),
    "eagleray_eval_token_accuracy_ratio": ("gauge", "eval/token_accuracy"),
    "eagleray_eval_reward_chosen": ("gauge", "eval/reward_chosen"),
    "eagleray_eval_reward_rejected": ("gauge", "eval/reward_rejected"),
    "eagleray_eval_reward_margin": ("gauge", "eval/reward_margin"),
    "eagleray_eval_pair_accuracy_ratio": ("gauge", "eval/pair_accuracy"),
    "eagleray_eval_mean_reward": ("gauge", "eval/mean_reward"),
    "eagleray_eval_kl_nats": ("gauge", "eval/kl"),
    "eagleray_eval_log_odds_nats": ("gauge", "eval/log_odds_ratio"),
    "eagleray_eval_epochs": ("gauge", "eval/epoch"),
    "eagleray_eval_accuracy_ratio": ("gauge", "eval/accuracy"),
    "eagleray_eval_reward": ("gauge", "eval/reward"),
    "eagleray_eval_function_reward": ("gauge", "eval/reward/*"),
    "eagleray_eval_completion_length_tokens": ("gauge", "eval/completion_length"),
}


def described(name: str, meanings: Mapping[str, tuple[str, str]]) -> str:
    """What a metric of the table says, with its unit. meanings: METRICS."""
    unit, meaning = meanings[RAY_METRICS[name][1]]
    return f"{meaning} [{unit}]"


class RayMetrics:
    """The metrics of one run. Each exists from the first record that has it, as Ray wants every tag in every sample."""

    def __init__(self, run: str, method: str, meanings: Mapping[str, tuple[str, str]]) -> None:
        self._meanings = meanings
        self._run = {"run": run, "method": method}
        self._by_metric: dict[str, list[str]] = {}
        for name, (_, metric) in RAY_METRICS.items():
            self._by_metric.setdefault(metric, []).append(name)
        self._made: dict[str, Gauge | Counter | Histogram] = {}

    def write(self, key: str, function: str, value: float) -> None:
        """One value of a record. key: of METRICS; function: of a family, else "". Nothing where there is no Ray."""
        if not ray.is_initialized():
            return
        tags = {"job_id": ray.get_runtime_context().get_job_id(), **self._run} | ({"function": function} if function else {})
        for name in self._by_metric[key]:
            metric = self._metric(name)
            if isinstance(metric, Gauge):
                metric.set(value, tags=tags)
            elif isinstance(metric, Histogram):
                metric.observe(value, tags=tags)
            elif value > 0:  # Ray refuses to add nothing
                metric.inc(value, tags=tags)

    def _metric(self, name: str) -> Gauge | Counter | Histogram:
        if name not in self._made:
            kind, metric = RAY_METRICS[name]
            text = described(name, self._meanings)
            tags = (*TAGS, "function") if metric.endswith("/*") else TAGS
            if kind == "histogram":
                self._made[name] = Histogram(name, text, boundaries=STEP_SECONDS, tag_keys=tags)
            else:
                self._made[name] = (Gauge if kind == "gauge" else Counter)(name, text, tag_keys=tags)
        return self._made[name]
