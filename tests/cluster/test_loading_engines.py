"""Engines that trials of a sweep share, while they load."""

import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors import device
from actors.errors import ActorError
from orchestrator import sweep_search
from orchestrator.display import Display
from orchestrator.shared_engines import Loading, SharedEngines
from orchestrator.sweep_search import Live


@ray.remote(num_cpus=0)
class Engine:
    def __init__(self, gate: str, error: str = "") -> None:
        while not Path(gate).exists():
            time.sleep(0.01)
        if error:
            raise ValueError(error)

    def ready(self) -> None:
        pass


def test_a_sweep_ends_with_the_reason_of_an_engine_that_cannot_load(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = Engine.remote(str(tmp_path / "1")), Engine.remote(str(tmp_path / "2"), "not enough memory")
    loading = Loading({"engine 0": good.ready.remote(), "engine 1": bad.ready.remote()}, until=time.monotonic() + 100)
    assert "did not answer" in replace(loading, until=0.0).failure()
    assert loading.failure() == "" and len(loading.refs) == 2, "neither is waited for"
    (tmp_path / "1").touch()
    while len(loading.refs) == 2:
        assert loading.failure() == ""
    assert list(loading.refs) == ["engine 1"]
    live = Live(tmp_path, 1, SharedEngines("here", ("engine 0", "engine 1")), loading)

    def fit() -> None:
        """As Tune: its callback ends it, here after a trial that waited for the engine has ended too."""
        (tmp_path / "2").touch()
        ray.wait(list(loading.refs.values()))
        live.lost = "there is no engine 1 any more"
        raise ActorError(live.lost)

    def tuner(*_: Any) -> Any:
        return SimpleNamespace(fit=fit)

    monkeypatch.setattr(sweep_search, "_tuner", tuner)
    config: Any = None
    setting: Any = None
    with pytest.raises(ActorError, match=r"(?s)^shared engines: engine 1, loading its model.*not enough memory"):
        sweep_search.search(config, live, setting, Display())


@ray.remote(num_cpus=0)
class Beside:
    """What shares a GPU with engines."""

    def __init__(self, after: tuple[Any, ...], mark: str) -> None:
        device.take_turn(after)
        Path(mark).touch()

    def ready(self) -> None:
        pass


def test_what_shares_a_gpu_with_engines_allocates_after_them(cluster: None, tmp_path: Path) -> None:
    gates = [tmp_path / "1", tmp_path / "2"]
    engines = tuple(Engine.remote(str(gate)) for gate in gates)
    beside = Beside.remote(engines, str(tmp_path / "allocated"))
    gates[1].touch()
    ray.get(engines[1].ready.remote())
    assert not ray.wait([beside.ready.remote()], timeout=1)[0] and not (tmp_path / "allocated").exists()
    gates[0].touch()
    ray.get(beside.ready.remote())
    (tmp_path / "3").touch()
    lost = Beside.remote((Engine.remote(str(tmp_path / "3"), "not enough memory"),), str(tmp_path / "never"))
    with pytest.raises(ray.exceptions.RayActorError, match="not enough memory"):
        ray.get(lost.ready.remote())
