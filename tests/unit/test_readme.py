"""What the README says of configurations is what `load` takes."""

import re
from pathlib import Path

import pytest
import yaml

from orchestrator.config import load
from orchestrator.runnable import ensure_runnable
from tests.job_files import GRPO, write

README = Path(__file__).parents[2] / "README.md"
METHODS = dict(re.findall(r"^\| (\w[\w. ]+) \| `([^`]*trl: [^`]+)`", README.read_text(encoding="utf-8"), re.MULTILINE))


def test_the_table_of_methods_is_there() -> None:
    assert set(METHODS) == {"Dr. GRPO", "DAPO", "GSPO", "CISPO", "RLOO", "GDPO"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_few_keys(tmp_path: Path, method: str) -> None:
    job = yaml.safe_load(GRPO)
    for section, keys in yaml.safe_load(METHODS[method]).items():
        job[section] = {**job.get(section, {}), **keys}
    ensure_runnable(load(write(tmp_path, yaml.safe_dump(job))))
