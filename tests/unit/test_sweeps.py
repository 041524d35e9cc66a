"""What a sweep makes of the folder that it is given, before Ray starts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.errors import ConfigError, EaglerayError
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


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{", "sweep.json cannot be read as what a sweep wrote there: "),
        ("[]", "sweep.json cannot be read as what a sweep wrote there: it has no version"),
        ('{"version": 2, "metric": "eval/loss", "mode": "min"}', "is of version 2; this Eagleray reads version 1"),
        ('{"version": 1, "metric": "loss", "mode": "min"}', 'holds another sweep: its metric is "loss", not "eval/loss"'),
    ],
)
def test_a_folder_that_holds_no_such_sweep_is_one_message(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "sweep.json").write_text(written)
    with pytest.raises(EaglerayError, match=said):
        sweeps._holds_this(config(), tmp_path)
