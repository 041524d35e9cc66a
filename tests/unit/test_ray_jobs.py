"""submit, status, logs and stop: Ray's own client against a small server that answers as Ray's dashboard does."""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import ray

from orchestrator.cli import main
from tests.job_files import SFT, write


@dataclass
class Dashboard:
    """What the server knows, and what it was sent."""

    address: str = ""
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    submitted: list[dict[str, Any]] = field(default_factory=list)
    packed: set[str] = field(default_factory=set)  # names of the files in the package
    headers: list[dict[str, str]] = field(default_factory=list)
    refusal: tuple[int, str] | None = None  # of every request
    too_large: bool = False

    def add(self, name: str, status: str, **more: Any) -> None:
        job = {"type": "SUBMISSION", "submission_id": name, "status": status, "entrypoint": "python\n  train.py", **more}
        self.jobs[name] = job


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Dashboard]:
    known = Dashboard()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(200, {})

        def do_GET(self) -> None:
            known.headers.append(dict(self.headers))
            if known.refusal:
                self.answer(*known.refusal)
            elif self.path == "/api/version":
                self.answer(200, {"version": "4", "ray_version": ray.__version__, "ray_commit": ""})
            elif self.path == "/api/jobs/":
                self.answer(200, list(known.jobs.values()))
            elif job := self.job():
                self.answer(200, {"logs": "step 1\n"} if self.path.endswith("/logs") else job)
            else:
                self.answer(404, f"{self.path} does not exist")

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if known.too_large:
                self.answer(500, "Traceback (most recent call last):\nValueError: Package size (600.00MiB) exceeds 512.00MiB")
                return
            known.packed = set(zipfile.ZipFile(io.BytesIO(content)).namelist())
            self.answer(200, {})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"] or 0))
            if self.path.endswith("/stop"):
                job = self.job()
                if job is None:
                    self.answer(404, "no-such-job does not exist")
                    return
                running = job["status"] == "RUNNING"
                job["status"] = "STOPPED" if running else job["status"]
                self.answer(200, {"stopped": running})
            else:
                known.submitted.append(json.loads(content))
                self.answer(200, {"submission_id": "raysubmit_1", "job_id": "raysubmit_1"})

        def job(self) -> dict[str, Any] | None:
            return known.jobs.get(self.path.split("/")[3])

        def answer(self, status: int, content: Any) -> None:
            text = content if isinstance(content, str) else json.dumps(content)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    known.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", known.address)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without a token
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    yield known
    server.shutdown()
    server.server_close()


def job_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    (folder / ".venv").mkdir(parents=True)
    (folder / ".venv" / "large").write_text("")
    write(folder, SFT)
    return folder


def test_submit_packs_the_current_folder(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job_folder(tmp_path).parent)
    (tmp_path / "rewards.py").write_text("")
    assert main(["submit", "mine/job.yaml", "num_epochs=2", "output_dir=a b", "--no-wait"]) == 0
    [sent] = dashboard.submitted
    assert sent["entrypoint"] == "python -m orchestrator run mine/job.yaml num_epochs=2 'output_dir=a b'"
    assert dashboard.packed >= {"rewards.py", "mine/job.yaml"} and "mine/.venv/large" not in dashboard.packed
    assert "eagleray logs raysubmit_1 --follow" in capsys.readouterr().out


@pytest.mark.parametrize("elsewhere", ("beside", "/", "home"))
def test_submit_from_elsewhere_packs_the_folder_of_the_configuration(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: str
) -> None:
    config = job_folder(tmp_path / "home") / "job.yaml"
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / elsewhere)
    assert main(["submit", str(config), "--no-wait"]) == 0
    assert dashboard.submitted[0]["entrypoint"] == "python -m orchestrator run job.yaml"
    assert dashboard.packed == {"job.yaml"}


def test_a_home_folder_is_not_packed(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "home").mkdir()
    write(tmp_path / "home", SFT)
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "home/job.yaml", "--no-wait"]) == 0
    monkeypatch.chdir(tmp_path / "home")
    assert main(["submit", "job.yaml", "--no-wait"]) == 1
    assert "put it into a folder of its own" in capsys.readouterr().err


def test_a_home_folder_behind_a_link_is_not_packed(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "home").symlink_to(tmp_path / "disk")
    write(tmp_path / "disk", SFT)
    monkeypatch.chdir(tmp_path / "home")
    assert main(["submit", "job.yaml", "--no-wait"]) == 1
    assert "put it into a folder of its own" in capsys.readouterr().err and not dashboard.submitted


def test_the_address_on_the_command_line_wins(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's client lets both variables win over its own argument."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    dashboard.add("raysubmit_1", "RUNNING")
    assert main(["status", "--address", dashboard.address.removeprefix("http://")]) == 0
    assert "raysubmit_1" in capsys.readouterr().out


def test_status_lists_jobs_with_their_configurations(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    hour = 3_600_000
    what = {"eagleray": "job.yaml trl.beta=1"}
    dashboard.add("raysubmit_2", "RUNNING", start_time=2 * hour, end_time=3 * hour, metadata=what)
    dashboard.add("raysubmit_1", "FAILED", start_time=hour, end_time=hour + 65_000, message="exit code 1\nits last lines")
    assert main(["status"]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert re.fullmatch(r"raysubmit_1 +failed +1970-01-0\d \d\d:\d\d:\d\d +1m05s +python train.py", first)
    assert re.fullmatch(r"raysubmit_2 +running +.* +1h00m +job.yaml trl.beta=1", second)
    assert main(["status", "raysubmit_1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Ray     exit code 1"


def test_logs(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.add("raysubmit_1", "RUNNING")
    assert main(["logs", "raysubmit_1"]) == 0
    assert capsys.readouterr().out == "step 1\n"


def test_stop_waits_for_the_end(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.add("raysubmit_1", "RUNNING")
    assert main(["stop", "raysubmit_1"]) == 0
    assert capsys.readouterr().out == "job raysubmit_1: stopped\n"
    assert main(["stop", "raysubmit_1"]) == 0
    assert capsys.readouterr().out == "job raysubmit_1 was not running: stopped\n"


@pytest.mark.parametrize("command", (["status"], ["logs"], ["logs", "--follow"], ["stop"]))
def test_an_unknown_job_is_one_message(
    dashboard: Dashboard, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "no-such-job"]) == 1
    assert capsys.readouterr().err == "eagleray: there is no job no-such-job; `eagleray status` lists them\n"


@pytest.mark.parametrize("answer", ((401, "Unauthorized: Missing authentication token"), (403, "Forbidden: Invalid")))
def test_a_refused_token_is_one_message(
    dashboard: Dashboard, answer: tuple[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard.refusal = answer
    assert main(["status"]) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"eagleray: {dashboard.address}: the cluster refuses this token, or none (")
    assert answer[1] in text and "RAY_AUTH_TOKEN" in text and text.count("\n") == 1


def test_a_server_of_another_kind_is_one_message(dashboard: Dashboard, capsys: pytest.CaptureFixture[str]) -> None:
    dashboard.refusal = (404, "not found")
    assert main(["status"]) == 1
    assert capsys.readouterr().err.startswith(f"eagleray: {dashboard.address}: Version check returned 404.")


def test_headers_are_sent_along(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--headers", '{"X-Proxy": "one"}']) == 0
    assert all(sent["X-Proxy"] == "one" for sent in dashboard.headers)
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Proxy": "two"}')
    assert main(["status"]) == 0
    assert dashboard.headers[-1]["X-Proxy"] == "two"
    assert main(["status", "--headers", "X-Proxy: one"]) == 1
    assert "is no JSON object" in capsys.readouterr().err


def test_a_folder_that_is_too_large_is_one_message(
    dashboard: Dashboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job_folder(tmp_path))
    dashboard.too_large = True
    assert main(["submit", "job.yaml", "--no-wait"]) == 1
    assert "Package size (600.00MiB) exceeds" in capsys.readouterr().err
    assert not dashboard.submitted


def test_no_cluster_is_one_message(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert main(["status"]) == 1
    assert capsys.readouterr().err.startswith("eagleray: no Ray cluster answers at http://127.0.0.1:9 (Connection refused)")
