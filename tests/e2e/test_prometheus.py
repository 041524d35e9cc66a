"""What the dashboard for Grafana asks for is in a real Prometheus that reads a cluster by cluster/grafana/prometheus.yml."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.e2e.conftest import REPOSITORY, Head, head_node

PROMETHEUS = shutil.which("prometheus")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus is not installed (Debian's package prometheus)"),
]
GRAFANA = REPOSITORY / "cluster" / "grafana"
NONE_HERE = {  # without a GPU, and where no completion is lost
    "ray_eagleray_gpu_free_training_gibibytes",
    "ray_eagleray_gpu_free_sampling_gibibytes",
    "ray_eagleray_samples_dropped_total",
}


@contextmanager
def prometheus(head: Head, folder: Path) -> Iterator[str]:
    """The address of one that reads this cluster."""
    config = (GRAFANA / "prometheus.yml").read_text().replace("/tmp/ray/", f"{head.environment['RAY_TMPDIR']}/")
    (folder / "prometheus.yml").write_text(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with open(folder / "log", "w") as log:
        command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(60)


def queries() -> dict[str, str]:
    """Each of the dashboard's, by the metric that it asks for."""
    panels = json.loads((GRAFANA / "dashboards" / "eagleray.json").read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    found = {}
    for expression in expressions:
        metric = re.search(r"ray_eagleray_\w+", expression)
        assert metric
        found[metric[0]] = expression.replace("$run", ".*").replace("$job_id", ".*")
    return found


def answer(address: str, expression: str) -> list[dict[str, Any]]:
    """What it has had lately. A query that it cannot read fails."""
    reply = requests.get(f"{address}/api/v1/query", params={"query": expression}, timeout=10).json()
    assert reply["status"] == "success", (expression, reply)
    return list(reply["data"]["result"])


def unanswered(address: str, queries: dict[str, str]) -> dict[str, str]:
    return {metric: query for metric, query in queries.items() if not answer(address, query)}


def test_every_panel_has_its_numbers(job: Callable[..., Path], dataset_job: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "held-out.jsonl").write_text('{"prompt": "w20 w22"}\n{"prompt": "w21 w23"}\n')
    pairs = [{"path": str(tmp_path / "pairs.jsonl"), "type": "passthrough"}]
    long = {"max_steps": 60, "save_steps": 60}  # for some readings of Prometheus, which come every ten seconds
    jobs = [
        job(
            "online.yaml",
            output_dir=str(tmp_path / "online"),
            test_datasets=[{"path": "held-out.jsonl"}],
            trl__beta=0.05,
            **long,
        ),
        dataset_job("sft.yaml", output_dir=str(tmp_path / "sft"), **long),
        dataset_job("dpo.yaml", output_dir=str(tmp_path / "dpo"), rl="dpo", datasets=pairs, **long),
    ]
    missing = queries()
    with head_node(3) as head, prometheus(head, tmp_path) as address:
        for config in jobs:
            command = [sys.executable, "-m", "orchestrator", "run", str(config)]
            environment = {**head.environment, "RAY_ADDRESS": head.gcs}
            with open(config.with_suffix(".log"), "w") as log:
                process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log)
                while process.poll() is None:
                    time.sleep(2)
                    missing = unanswered(address, missing)
            assert process.returncode == 0, config.with_suffix(".log").read_text()
        time.sleep(20)  # two readings
        missing = unanswered(address, missing)
    assert set(missing) == NONE_HERE
