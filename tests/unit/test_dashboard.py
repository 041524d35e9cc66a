"""What is made of the answers of Ray's dashboard, and of those that it does not give."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from actors.errors import ActorError
from orchestrator.dashboard import Dashboard, address_of, named

ANSWERS: dict[str, tuple[int, bytes]] = {}  # by path
ASKED: list[tuple[str, dict[str, list[str]], str | None]] = []  # path, query, token


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        ASKED.append((url.path, parse_qs(url.query), self.headers.get("Authorization")))
        code, body = ANSWERS.get(url.path, (404, b"no such page"))
        self.send_response(code)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    ANSWERS.clear()
    ASKED.clear()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_the_token_is_found_where_ray_keeps_it(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ANSWERS["/api/v0/logs/file"] = (200, b"")
    Dashboard(address).log("a", "err", 5)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of-file\n")
    Dashboard(address).log("a", "err", 5)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-variable")
    Dashboard(f"http://{address}/").log("a", "err", 5)
    assert [token for _, _, token in ASKED] == [None, "Bearer of-file", "Bearer of-variable"]
    assert ASKED[0][1] == {"format": ["text"], "actor_id": ["a"], "suffix": ["err"], "lines": ["5"]}


@pytest.mark.parametrize(
    ("code", "body", "expected"),
    [
        (401, b"Unauthorized", "refuses this token, or none; put what `ray get-auth-token` prints"),
        (500, b"Traceback ...\nValueError: no such actor", r"has no answer to /nodes \(ValueError: no such actor\)"),
        (200, b"<html>hello</html>", "what answers at http://127.0.0.1:[0-9]+ is no dashboard of Ray"),
        (200, b"{}", r"is no dashboard of this version of Ray \(KeyError: 'data'\)"),
        (200, b"[]", r"is no dashboard of this version of Ray \(TypeError: "),
        (200, b'{"data": {"summary": [null]}}', r"is no dashboard of this version of Ray \(TypeError: "),
    ],
)
def test_what_is_no_answer_is_one_message(address: str, code: int, body: bytes, expected: str) -> None:
    ANSWERS["/nodes"] = (code, body)
    with pytest.raises(ActorError, match=expected):
        Dashboard(address).machines()


def test_no_method_takes_another_answer_for_rays(address: str) -> None:
    for path in ("/api/v0/actors", "/api/v0/jobs", "/api/v0/logs"):
        ANSWERS[path] = (200, b"{}")
    dashboard = Dashboard(address)
    for ask in (lambda: dashboard.actors("02"), dashboard.running_jobs, lambda: dashboard.files("n1", "*")):
        with pytest.raises(ActorError, match="is no dashboard of this version of Ray"):
            ask()


def test_a_damaged_token_is_one_message(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_bytes(b"\xff")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ActorError, match=f"^Ray's token in {tmp_path}/token cannot be read"):
        Dashboard(address)


def test_another_ones_address_gets_no_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ANSWERS["/api/v0/logs/file"] = (200, b"")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a secret")
    Dashboard(address, with_token=False).log("a", "err", 5)
    assert [token for _, _, token in ASKED] == [None]


def test_where_a_dashboard_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert address_of(None) == address_of("") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "head:8265/")
    assert address_of(None) == "http://head:8265"
    assert address_of("https://other") == "https://other"


def test_nobody_there_is_one_message() -> None:
    with pytest.raises(ActorError, match=r"^Ray's dashboard at http://127.0.0.1:9 does not answer \(ConnectionError\)$"):
        Dashboard("127.0.0.1:9").machines()


def test_a_log_may_hold_what_is_no_text(address: str) -> None:
    ANSWERS["/api/v0/logs/file"] = (200, b"loading \xe2\x96\x88\xff\n")
    assert Dashboard(address).log("a", "out", 5) == "loading \u2588\ufffd\n"


def test_workers_of_ray_train_are_called_by_their_rank(address: str) -> None:
    """And Ray's own helpers are left out."""

    def row(actor_id: str, name: str, class_name: str) -> dict[str, Any]:
        base = {"state": "ALIVE", "node_id": "n1", "pid": 7, "num_restarts": 0, "death_cause": None}
        return {**base, "actor_id": actor_id, "name": name, "class_name": class_name}

    rows = [
        row("a", "", "RayTrainWorker"),
        row("b", "", "RayTrainWorker"),
        row("c", "", "TrainController"),
        row("d", "reports", "Reports"),
        row("e", "train_v2_state_actor", "TrainStateActor"),
    ]
    ANSWERS["/api/v0/actors"] = (200, json.dumps({"data": {"result": {"result": rows}}}).encode())
    ANSWERS["/logical/actors"] = (200, json.dumps({"data": {"actors": {}}}).encode())
    runs = [
        {"job_id": "01", "attempts": [{"workers": [{"actor_id": "a", "world_rank": 5}]}]},
        {"job_id": "02", "attempts": [{"workers": [{"actor_id": "b", "world_rank": 0}, {"actor_id": "a", "world_rank": 1}]}]},
    ]
    ANSWERS["/api/train/v2/runs/v1"] = (200, json.dumps({"train_runs": runs}).encode())
    found = Dashboard(address).actors("02")
    assert [(actor.name, actor.actor_id) for actor in found] == [("worker 0", "b"), ("worker 1", "a"), ("reports", "d")]
    assert ASKED[0][1]["filter_values"] == ["02"]


def test_the_newest_actor_of_a_name_is_shown_and_the_others_are_counted() -> None:
    def row(name: str, state: str, **changes: Any) -> dict[str, Any]:
        cause = {"actor_died_error_context": {"error_message": "gone"}} if state == "DEAD" else None
        base = {"name": name, "class_name": "E", "state": state, "node_id": "n1", "pid": 7, "num_restarts": 0}
        return {**base, "actor_id": f"{name}/{state}", "death_cause": cause, **changes}

    rows = [
        row("engine 0, start 3", "ALIVE", num_restarts=1),
        row("engine 0", "DEAD"),
        row("engine 0, start 2", "DEAD"),
        row("reward a.b", "DEAD"),
        row("reward a.b, start 2", "DEAD", death_cause={"x": {"error_message": "was killed by `ray.kill`"}}),
        row("reward a.b, start 3", "ALIVE"),
        row("engine 10", "PENDING_CREATION", node_id=None, pid=0),
        row("engine 2", "ALIVE"),
        row("trainer", "DEAD"),
        row("worker 0", "DEAD", actor_id="w1"),
        row("worker 0", "ALIVE", actor_id="w2"),
    ]
    processes = {
        "engine 0, start 3/ALIVE": {"startTime": 30, "processStats": {"memoryInfo": {"rss": 5}}},
        "engine 0/DEAD": {"startTime": 10, "processStats": None},
        "w1": {"startTime": 1},
        "w2": {"startTime": 2, "gpus": [{"processesPids": [{"pid": 7, "gpuMemoryUsage": 100}]}, {"processesPids": None}]},
    }
    found = named(rows, processes)
    assert [(a.name, a.state, a.restarts) for a in found] == [
        ("trainer", "DEAD", 0),
        ("worker 0", "ALIVE", 1),
        ("engine 0", "ALIVE", 3),
        ("engine 2", "ALIVE", 0),
        ("engine 10", "PENDING_CREATION", 0),
        ("reward a.b", "ALIVE", 2),
    ]
    assert found[5].death == "gone", "of the start that nobody had asked to end"
    assert found[0].death == "gone" and found[0].killed
    assert found[2].memory == 5 and found[1].gpu_memory == 100 and found[4].node_id == ""
