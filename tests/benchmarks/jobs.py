"""`python -m tests.benchmarks.jobs FOLDER`: a table of GRPO jobs from what they said, for the README.

A log is what a job printed, below two lines: `# ` and its command, `# ` and where it ran. Seconds are medians over the steps
after the second, since the first ones compile; a job that ran beside others has none.
"""

import argparse
import re
from pathlib import Path
from statistics import median

STEP = re.compile(r"^ *\d+/\d+ .* (?P<sample>[\d.]+)s +(?P<train>[\d.]+)s +(?P<sync>[\d.]+)s +\d+ +\S+$", re.MULTILINE)
RESULT = re.compile(
    r"^  held-out accuracy (?P<before>[\d.]+) % .* -> (?P<after>[\d.]+) % \(after step (?P<steps>\d+)\)$", re.MULTILINE
)
COMMON = ("vllm.enforce_eager=true", "vllm.gpu_memory_utilization=0.3")  # change no result


def row(log: Path) -> str:
    """One line of the table. Raises ValueError for a log without a result."""
    text = log.read_text(encoding="utf-8")
    command, where = (line.removeprefix("# ") for line in text.splitlines()[:2])
    found = RESULT.search(text)
    if not found:
        raise ValueError(f"{log} tells of no result")
    recipe, overrides = command.split(".yaml ")
    for common in COMMON:
        overrides = overrides.replace(common, "")
    steps = list(STEP.finditer(text))[2:]
    timed = [f"{median(float(step[name]) for step in steps):.2f}" for name in ("sample", "train", "sync")]
    if "beside others" in where:
        timed = ["", "", ""]
    shown = f"`{' '.join(overrides.split())}`" if overrides.split() else "(as it is)"
    accuracy = f"{found['before']} → {found['after']} % in {found['steps']} steps"
    return "| " + " | ".join([where.split()[0], recipe.rpartition("/")[2], shown, accuracy, *timed]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.jobs", description=__doc__)
    parser.add_argument("folder", type=Path)
    logs = sorted(parser.parse_args().folder.glob("*.log"))
    print("| GPUs | configs/grpo/ | overrides | held-out accuracy | sample s | train s | sync s |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(row(log) for log in logs))


if __name__ == "__main__":
    main()
