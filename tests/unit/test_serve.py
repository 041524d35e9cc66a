"""How models share engines, what is refused before any starts, and how requests are written."""

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from actors.errors import ActorError
from actors.requests import as_trained, guard
from actors.specs import ServedModelSpec
from orchestrator.answering import sampling_plan
from orchestrator.cli import main
from orchestrator.plan import Node
from orchestrator.results import Result, Weights, find
from orchestrator.serve import _ensure_free, _in_url, _Serving
from orchestrator.served import Engine, engine_arguments, engines_of, models_of
from tests.tiny import save_llama
from tests.unit.test_results import Told, run  # noqa: F401  (a fixture)

Run = Callable[..., Path]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def adapter(run: Run) -> Result:  # noqa: F811
    return find(run(), Told())


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


def beside(result: Result, name: str) -> Result:
    """The same adapter under another name."""
    folder = result.folder.parent / name
    return replace(result, folder=folder, run=folder)


def shared(results: list[Result], *, base: bool = False, whole: tuple[Result, ...] = ()) -> list[Engine]:
    weights = [Weights(str(r.folder), None) if r in whole else Weights(r.config.base_model, r.folder) for r in results]
    return engines_of(results, weights, base=base)


def names(engines: list[Engine]) -> list[list[str]]:
    return [[served.name for served in models_of(engine)] for engine in engines]


def test_one_adapter_alone_is_merged_and_several_share_an_engine_with_their_base(adapter: Result, base: str) -> None:
    one, two = adapter, beside(adapter, "replies")
    shown = Path(base).name
    (alone,) = shared([one])
    assert (alone.fused, alone.slots, alone.model, names([alone])) == (one, (), base, [["sums"]])
    (both,) = shared([one, two])
    assert (both.fused, both.slots, names([both])) == (None, (one, two), [[shown, "sums", "replies"]])
    (asked,) = shared([one], base=True)
    assert (asked.fused, asked.slots, names([asked])) == (None, (one,), [[shown, "sums"]])


def test_whole_models_and_other_bases_have_engines_of_their_own(adapter: Result, base: str, tmp_path: Path) -> None:
    whole = beside(adapter, "all-weights")
    other = replace(beside(adapter, "other"), config=replace(adapter.config, base_model=save_llama(tmp_path / "llama")))
    engines = shared([adapter, whole, other], whole=(whole,))
    assert names(engines) == [["sums"], ["all-weights"], ["other"]]
    assert [engine.model for engine in engines] == [base, str(whole.folder), str(tmp_path / "llama")]
    assert names(shared([whole], base=True, whole=(whole,))) == [[Path(base).name], ["all-weights"]]


def test_slots_are_as_wide_as_vllm_has_them(adapter: Result) -> None:
    plan = sampling_plan(adapter.config, [Node("here", {"CPU": 2.0})], engines=1)
    wide = beside(adapter, "wide")
    wide = replace(wide, config=replace(wide.config, lora_r=24))
    (engine,) = shared([adapter, wide])
    arguments = engine_arguments(engine, plan)
    assert (arguments["max_loras"], arguments["max_lora_rank"], arguments["dtype"]) == (2, 32, "float32")
    assert [module["name"] for module in arguments["lora_modules"]] == ["sums", "wide"]
    (alone,) = shared([adapter])
    assert "enable_lora" not in engine_arguments(alone, plan), "slots cost speed"


@pytest.mark.usefixtures("no_ray")
def test_what_cannot_be_served_is_one_message(
    adapter: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(adapter.folder)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, message in {
            (out, "--host", "0.0.0.0"): "--host 0.0.0.0 is open to others, so requests need a key",
            (out, "--host", "example.org"): "is open to others",
            (out, "--api-key-env", "NO_SUCH_KEY"): "--api-key-env: NO_SUCH_KEY is not set where this command runs",
            (out, "--replicas", "0"): "--replicas is 0; it must be 1 or more",
            (out, "--port", port): f"--port {port} of 127.0.0.1 cannot be used",
            (out, "--port", "99999"): "--port 99999 of 127.0.0.1 cannot be used",
            (out, out): "two of the models would be called sums",
        }.items():
            assert main(["serve", *arguments]) == 1, arguments
            error = capsys.readouterr().err
            assert error.count("eagleray: ") == 1 and message in error


@pytest.mark.parametrize(
    "running", [{"applications": {"theirs": "RUNNING"}, "proxies": {}}, {"applications": {}, "proxies": {"n1": "HEALTHY"}}]
)
def test_a_ray_serve_that_runs_is_neither_used_nor_ended(running: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one without applications, which may listen for others."""
    monkeypatch.setattr(ray, "serve", SimpleNamespace(status=lambda: SimpleNamespace(**running)), raising=False)
    with pytest.raises(ActorError, match="runs on this cluster already, and is not replaced"):
        _Serving([], [], [], "127.0.0.1", 8000, 1, None).__enter__()


def test_an_address_of_ipv6_is_asked_for_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def create_server(address: tuple[str, int], *, family: int) -> socket.socket:
        asked.append((address[0], family))
        return socket.socket()

    monkeypatch.setattr(socket, "create_server", create_server)
    _ensure_free("::1", 8000)
    _ensure_free("127.0.0.1", 8000)
    assert asked == [("::1", socket.AF_INET6), ("127.0.0.1", socket.AF_INET)]
    assert (_in_url("::1"), _in_url("127.0.0.1")) == ("[::1]", "127.0.0.1")


class Text(BaseModel):
    """The fields of vLLM's requests that are written."""

    stop_token_ids: list[int] | None = None


class Chat(Text):
    chat_template: str | None = None
    chat_template_kwargs: dict[str, object] | None = None


def test_requests_are_written_as_in_training() -> None:
    served = ServedModelSpec("sums", "base", TEMPLATE, {"enable_thinking": False}, (7,))
    theirs = "{{ 'theirs' }}"
    chat = Chat(stop_token_ids=[5], chat_template=theirs, chat_template_kwargs={"chat_template": theirs, "tools": None})
    written = as_trained(chat, served)
    assert (written.chat_template, written.stop_token_ids) == (TEMPLATE, [5, 7])
    assert written.chat_template_kwargs == {"enable_thinking": False, "tools": None}
    assert as_trained(chat, replace(served, chat_template=None)).chat_template is None
    assert as_trained(Text(), served).stop_token_ids == [7]
    assert as_trained(chat, None) is chat


def test_without_the_key_nothing_is_answered() -> None:
    app = FastAPI()
    app.get("/v1/models", dependencies=[Depends(guard("a secret"))])(lambda: "fine")
    client = TestClient(app)
    for header, status in {"Bearer a secret": 200, "Bearer other": 401, "a secret": 401, "": 401}.items():
        assert client.get("/v1/models", headers={"Authorization": header} if header else {}).status_code == status
    assert "a secret" not in str(vars(guard("a secret"))) + str([c.cell_contents for c in guard("a secret").__closure__ or ()])
