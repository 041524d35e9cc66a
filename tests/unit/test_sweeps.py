"""What a sweep makes of the folder that it is given, before Ray starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator import sweeps


def config(**changes: Any) -> Any:
    """A sweep as far as its folder is concerned."""
    space = SimpleNamespace(texts=lambda: {"learning_rate": "grid [0.1]"}, keys=("learning_rate",))
    about = {"metric": "eval/loss", "mode": "min", "space": space, "trials": 1, "scheduler": {"name": "none"}, "seed": 42}
    return SimpleNamespace(**{**about, "share_engines": False, **changes})


def test_a_file_of_a_persons_is_not_overwritten(tmp_path: Path) -> None:
    """As with base: base.yaml and output_dir: . in one file."""
    assert not sweeps._holds_this(config(), tmp_path)
    (tmp_path / "base.yaml").write_text("rl: grpo")
    with pytest.raises(ConfigError, match="holds a file base.yaml, which the sweep would overwrite; choose another folder"):
        sweeps._holds_this(config(), tmp_path)
