"""A job that names its model and its rows on the hub, by the hub's own client, against a hub of a few lines on this machine."""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e import conftest
from tests.e2e.test_run import records

pytestmark = pytest.mark.slow
COMMIT = "1" * 40
TOKEN = "hf_of_the_test"
ROWS = "".join(json.dumps({"text": " ".join(f"w{3 + (i + j) % 40}" for j in range(8))}) + "\n" for i in range(40))


@dataclass
class Hub:
    """What is in it, and what was asked of it."""

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)  # of models, or datasets/NAME: files by path
    asked: list[str] = field(default_factory=list)  # METHOD PATH


@pytest.fixture
def hub(llama: Path) -> Iterator[Hub]:
    hub = Hub()
    hub.repositories["org/tiny"] = {path.name: path.read_bytes() for path in llama.iterdir() if path.is_file()}
    hub.repositories["datasets/org/rows"] = {"train.jsonl": ROWS.encode()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            hub.asked.append(f"{self.command} {path}")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.give(401, b"", X_Error_Code="RepoNotFound")
            if found := re.fullmatch(r"/(.+)/resolve/[^/]+/(.+)", path):
                return self.give_file(hub.repositories.get(found[1], {}).get(found[2]))
            if found := re.fullmatch(r"/api/(?:models/)?((?:datasets/)?org/\w+)(?:/(revision|tree)/\w+(/.+)?)?", path):
                files = hub.repositories.get(found[1], {})
                if found[2] == "tree":
                    entries = [{"type": "file", "path": name, "size": len(b), "oid": oid(b)} for name, b in files.items()]
                    return self.give(200, json.dumps(entries if not found[3] else []).encode())
                siblings = [{"rfilename": name} for name in files]
                return self.give(200, json.dumps({"id": found[1], "sha": COMMIT, "siblings": siblings}).encode())
            return self.give(404, b"", X_Error_Code="EntryNotFound")

        do_HEAD = do_GET

        def give_file(self, content: bytes | None) -> None:
            if content is None:
                return self.give(404, b"", X_Error_Code="EntryNotFound")
            whole = {"ETag": f'"{oid(content)}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
            if part := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                begin, end = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
                return self.give(206, content[begin : end + 1], Content_Range=f"bytes {begin}-{end}/{len(content)}", **whole)
            return self.give(200, content, **whole)

        def give(self, code: int, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content_Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def run(hub: Hub, home: Path, job: Path, token: str = TOKEN) -> tuple[int, str]:
    """`eagleray run JOB` of somebody who has nothing of the hub yet."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": token}
    return conftest.run([sys.executable, "-m", "orchestrator", "run", str(job)], environment)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_model_and_rows_by_their_names(
    hub: Hub, dataset_job: Callable[..., Path], tmp_path: Path, streaming: bool
) -> None:
    rows = [{"path": "org/rows", "type": "completion", "data_files": "train.jsonl"}]
    more = {"streaming": True, "val_set_size": 0, "eval_steps": None} if streaming else {}
    job = dataset_job(base_model="org/tiny", datasets=rows, max_steps=2, **more)
    code, output = run(hub, tmp_path / "home", job)
    assert code == 0, (output, hub.asked)
    assert [record["step"] for record in records(tmp_path / "out", "train")] == [1, 2]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/tiny"
    assert f"GET /org/tiny/resolve/{COMMIT}/model.safetensors" in hub.asked


def test_what_the_hub_does_not_give_is_one_message(hub: Hub, dataset_job: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"path": "org/rows", "type": "completion"}]
    job = dataset_job(datasets=rows)
    code, output = run(hub, tmp_path / "home", job, token="another")
    assert code == 1 and "Traceback" not in output
    assert "datasets: org/rows is no local file and the hub did not give it" in output
    assert any("/datasets/org/rows" in one for one in hub.asked)
