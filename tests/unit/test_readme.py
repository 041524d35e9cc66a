"""What the README says of configurations is what `load` takes, and its commands are what the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import make_parser
from orchestrator.config import load
from orchestrator.runnable import ensure_runnable
from tests.job_files import GRPO, write

README = Path(__file__).parents[2] / "README.md"
METHODS = dict(re.findall(r"^\| (\w[\w. ]+) \| `([^`]*trl: [^`]+)`", README.read_text(encoding="utf-8"), re.MULTILINE))

COMMANDS = re.findall(r"^    eagleray (\w.*?)(?: +#.*)?$", README.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one(command: str) -> None:
    arguments = make_parser().parse_args(shlex.split(command.replace("[JOB]", "JOB")))
    for name in ("config", "output_dir"):
        path = getattr(arguments, name, None) or ""
        assert not path.startswith("configs/") or (README.parent / path).is_file()


def test_every_command_is_there() -> None:
    written = {command.split()[0] for command in COMMANDS}
    assert written == set(re.findall(r"^    (\w+) ", make_parser().format_help(), re.MULTILINE))


def test_the_whole_job_is_one(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    (whole,) = (block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "base_model" in block)
    config = load(write(tmp_path, whole))
    ensure_runnable(config)
    assert config.rl == "grpo"
    as_sft = {key: value for key, value in yaml.safe_load(whole).items() if key not in ("rl", "trl")}
    as_sft["datasets"] = [{"path": "rows.jsonl", "type": "chat_template"}]
    ensure_runnable(load(write(tmp_path, yaml.safe_dump(as_sft))))


def test_the_table_of_methods_is_there() -> None:
    assert set(METHODS) == {"Dr. GRPO", "DAPO", "GSPO", "CISPO", "RLOO", "GDPO"}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_a_few_keys(tmp_path: Path, method: str) -> None:
    job = yaml.safe_load(GRPO)
    for section, keys in yaml.safe_load(METHODS[method]).items():
        job[section] = {**job.get(section, {}), **keys}
    ensure_runnable(load(write(tmp_path, yaml.safe_dump(job))))


@pytest.mark.parametrize("package", ["actors", "orchestrator"])
def test_a_package_names_all_its_modules(package: str) -> None:
    folder = README.parent / package
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    assert [path.name for path in folder.glob("[!_]*.py") if path.name not in text] == []


def test_what_it_links_to_is_there() -> None:
    text = README.read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in target}
    assert len(targets) > 10 and any(target.endswith((".png", ".svg")) for target in targets)
    assert [target for target in sorted(targets) if not (README.parent / target).exists()] == []
