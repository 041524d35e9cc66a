"""What several unit tests start from: a tiny Llama on disk, and adapters of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.tiny import save_llama  # here: it loads torch, which tests of the configuration do without

    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def adapter(tmp_path: Path, base: str) -> Callable[..., Path]:
    """Writes an adapter on all linear layers, or with changes, and returns its folder."""
    from tests.tiny import save_adapter

    def write(task: str = "CAUSAL_LM", base: str = base, **changes: Any) -> Path:
        save_adapter(base, tmp_path / "start", task, **{"target_modules": "all-linear"} | changes)
        return tmp_path / "start"

    return write
