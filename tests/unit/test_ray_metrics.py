"""What Prometheus gets: the table of names, what is done to Ray's metrics, and that the dashboard asks for what there is."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from orchestrator import ray_metrics
from orchestrator.metrics import METRICS, MetricsLog
from orchestrator.ray_metrics import RAY_METRICS, TAGS

GRAFANA = Path(__file__).parents[2] / "cluster" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "eagleray.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
UNITS = {  # of METRICS: how a name in Prometheus must end
    "s": "_seconds",
    "tokens": "_tokens",
    "tokens/s": "_per_second",
    "bytes": "_bytes",
    "GiB": "_gibibytes",
    "share": "_ratio",
    "nats": "_nats",
    "nats/token": "_nats_per_token",
    "versions": "_versions",
    "epochs": "_epochs",
    "steps": "_steps",
}


def test_every_metric_is_exported_and_has_its_unit_in_its_name() -> None:
    assert {metric for _, metric in RAY_METRICS.values()} == set(METRICS)
    for name, (kind, metric) in RAY_METRICS.items():
        assert re.fullmatch(r"eagleray_[a-z_]+", name)
        assert name.endswith("_total") == (kind == "counter"), f"{name}: Prometheus's name for a counter ends in _total"
        assert name.removesuffix("_total").endswith(UNITS.get(METRICS[metric][0], "")), name


class Fake:
    """A metric of Ray's that keeps what it is told."""

    made: dict[str, "Fake"] = {}

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...], boundaries: list[float] | None = None) -> None:
        assert name not in self.made, "Ray would count it twice"
        self.description, self.tag_keys, self.boundaries = description, tag_keys, boundaries
        self.told: list[tuple[str, float, dict[str, str]]] = []
        self.made[name] = self

    def _tell(self, what: str, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == set(self.tag_keys)  # Ray raises over a tag that is missing or too many
        assert what != "inc" or value > 0  # and over nothing to add
        self.told.append((what, value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._tell("set", value, tags)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        self._tell("inc", value, tags)

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self._tell("observe", value, tags)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Fake]:
    monkeypatch.setattr(Fake, "made", {})
    for kind in ("Gauge", "Counter", "Histogram"):
        monkeypatch.setattr(ray_metrics, kind, type(kind, (Fake,), {}))
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: True)
    context = type("Context", (), {"get_job_id": staticmethod(lambda: "02000000")})
    monkeypatch.setattr(ray_metrics.ray, "get_runtime_context", context)
    return Fake.made


def test_a_record_becomes_gauges_counters_and_a_histogram(tmp_path: Path, made: dict[str, Fake]) -> None:
    with MetricsLog(tmp_path, "sums", use_tensorboard=False, method="grpo") as log:
        log.write("train", {"step": 1, "reward/a": 0.5, "reward/b": 0.25, "completion_tokens": 100, "samples_dropped": 0})
        log.write("train", {"step": 2, "reward/a": 0.75, "completion_tokens": 50, "samples_dropped": 3, "step_s": 7.0})
        log.write("eval", {"step": 2, "eval/accuracy": 0.1})
    tags = {"job_id": "02000000", "run": "sums", "method": "grpo"}
    assert made["eagleray_steps"].told[-1] == ("set", 2.0, tags)
    assert made["eagleray_function_reward"].told == [
        ("set", 0.5, {**tags, "function": "a"}),
        ("set", 0.25, {**tags, "function": "b"}),
        ("set", 0.75, {**tags, "function": "a"}),
    ]
    assert [value for _, value, _ in made["eagleray_completion_tokens_total"].told] == [100.0, 50.0]
    assert made["eagleray_samples_dropped_total"].told == [("inc", 3.0, tags)]
    assert made["eagleray_step_seconds"].told == [("set", 7.0, tags)]
    histogram = made["eagleray_step_duration_seconds"]
    assert histogram.told == [("observe", 7.0, tags)]
    assert histogram.boundaries and histogram.boundaries == sorted(histogram.boundaries)
    assert made["eagleray_eval_accuracy_ratio"].description.startswith("held-out accuracy")
    assert len(made) == 7


def test_nothing_is_exported_without_ray(tmp_path: Path, made: dict[str, Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics.ray, "is_initialized", lambda: False)
    with MetricsLog(tmp_path, "run", use_tensorboard=False) as log:
        log.write("train", {"step": 1, "reward": 1.0})
    assert not made


def test_the_document_is_the_table() -> None:
    rows = re.findall(r"^\| `ray_(\w+)` \| (\w+) \| `([^`]+)` \| (.*) \[(.*)\] \|$", document(), re.MULTILINE)
    told = {name: (kind, metric, meaning.replace("&#124;", "|"), unit) for name, kind, metric, meaning, unit in rows}
    expected = {
        name: (kind, metric, METRICS[metric][1], METRICS[metric][0]) for name, (kind, metric) in RAY_METRICS.items()
    }
    assert told == expected


def document() -> str:
    return (GRAFANA / "METRICS.md").read_text(encoding="utf-8")


def queried(query: str) -> list[tuple[str, str, str]]:
    """Metrics of a query: the table's name, what is appended to it, and the range, if one is asked for."""
    found = re.findall(r"\b(ray_\w+?|eagleray_\w+?)(_bucket|_sum|_count)?\{[^}]*\}(\[\w+\])?", query)
    return [(name.removeprefix("ray_"), suffix, span) for name, suffix, span in found]


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_asks_for_what_is_exported(query: str) -> None:
    """With labels that it has, a range exactly where the kind wants one, and nothing that is no metric of ours."""
    metrics = queried(query)
    assert metrics
    for name, suffix, span in metrics:
        kind, _ = RAY_METRICS[name]
        assert bool(span) == (kind != "gauge"), f"{name} is a {kind}"
        assert (suffix == "_bucket") == (kind == "histogram")
    left = re.sub(r"\{[^}]*\}", "", query)
    words = set(re.findall(r"[a-zA-Z_]\w*", re.sub(r"\[\w+\]", "", left))) - {f"ray_{n}{s}" for n, s, _ in metrics}
    assert words <= {"rate", "increase", "sum", "by", "histogram_quantile", "run", "le"}
    labels = re.findall(r"(\w+)\s*=~", query)
    assert set(labels) == {"run", "job_id"} <= set(TAGS)
    assert left.count("(") == left.count(")")


def test_legends_name_labels_that_the_metric_has() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            of_function = all(RAY_METRICS[name][1].endswith("/*") for name, _, _ in queried(target["expr"]))
            assert labels <= {*TAGS, *(["function"] if of_function else [])}, target
            assert not of_function or "function" in labels, "its series could not be told apart"


def test_the_dashboard_has_the_shape_that_grafana_reads() -> None:
    """Keys of its dashboard schema; panels on the grid of 24 columns that do not cover each other."""
    assert {"uid", "title", "schemaVersion", "panels", "templating", "time", "refresh"} <= set(DASHBOARD)
    assert "id" not in DASHBOARD, "an id belongs to one Grafana"
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    for name in ("run", "job_id"):
        query = variables[name]["query"]["query"]
        metric = re.match(r"label_values\(ray_(\w+)", query)
        assert metric and metric[1] in RAY_METRICS and query.endswith(f", {name})") and name in TAGS
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["type"] in ("timeseries", "stat") and panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
    for one, other in combinations([panel["gridPos"] for panel in DASHBOARD["panels"]], 2):
        assert not (overlaps(one, other, "x", "w") and overlaps(one, other, "y", "h")), (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in DASHBOARD["panels"])


def overlaps(one: dict[str, int], other: dict[str, int], start: str, length: str) -> bool:
    return one[start] < other[start] + other[length] and other[start] < one[start] + one[length]


def test_prometheus_finds_rays_nodes_and_grafana_finds_prometheus() -> None:
    def parsed(path: str) -> Any:
        return yaml.safe_load((GRAFANA / path).read_text(encoding="utf-8"))

    (scrape,) = parsed("prometheus.yml")["scrape_configs"]
    assert scrape["file_sd_configs"][0]["files"] == ["/tmp/ray/prom_metrics_service_discovery.json"]
    (source,) = parsed("provisioning/datasources/prometheus.yaml")["datasources"]
    readme = (GRAFANA / "README.md").read_text(encoding="utf-8")
    assert source["type"] == "prometheus" and source["url"].removeprefix("http://") in readme
    (provider,) = parsed("provisioning/dashboards/eagleray.yaml")["providers"]
    variable = provider["options"]["path"].strip("${}")
    assert f"{variable}=$PWD/cluster/grafana/dashboards" in readme
