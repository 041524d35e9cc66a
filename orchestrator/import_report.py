"""`eagleray import`: what Eagleray makes of an Axolotl file, key by key, and whether it would run.

It has no knowledge of its own: what each key means, and which are not supported, is asked of `config.py` and
`runnable.py`, as `eagleray run` asks them. Only the file is looked at, not its data, its model or a machine.
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator import dataset_keys
from orchestrator.config import Reading, interpret
from orchestrator.dataset_plan import METHOD_NAMES
from orchestrator.runnable import METHODS, refusals, remarks
from orchestrator.schema import JobConfig
from orchestrator.source import Problem, Translation, ancestors

USED, TRANSLATED, NOTED, REFUSED = "used", "translated", "noted", "refused"
STYLES = {USED: "green", TRANSLATED: "cyan", NOTED: "yellow", REFUSED: "bold red"}
VALUE_WIDTH = 48  # characters of a value that are shown
PIPE_WIDTH = 120  # columns where no terminal says how many it has


@dataclass(frozen=True)
class Line:
    """What became of one key."""

    key: str  # as written, e.g. trl.beta or datasets[0].type
    status: str  # used | translated | noted: known, and without effect here | refused
    text: str = ""  # what it was read as, why it has no effect, or why it is refused and what to do
    value: str = ""  # as written; "" for a key that is missing
    place: str = ""  # the line in the file, or "override"; "" for a key that is missing


@dataclass(frozen=True)
class ImportReport:
    """A whole file."""

    path: str
    config: JobConfig
    lines: tuple[Line, ...]  # in the file's order, then what is missing

    @property
    def would_run(self) -> bool:
        """As far as the file alone can tell."""
        return not any(line.status == REFUSED for line in self.lines)


def import_report(path: str | Path, overrides: Sequence[str] = ()) -> ImportReport:
    """Reads a file to its end, whatever is wrong with it. Raises ConfigError only where it is no mapping in YAML."""
    reading = interpret(path, overrides)
    config = reading.config
    wrong: list[Problem] = [*reading.misread, *reading.contradictions]
    keys = {problem.key for problem in wrong}
    wrong += [problem for problem in refusals(config) if keys.isdisjoint(ancestors(problem.key))]
    told = [*reading.notes, *(remarks(config) if config.rl in METHODS else [])]
    lines = [_line(key, value, reading, wrong, told) for key, value in reading.written.items()]
    missing = [p for p in wrong if not any(key in reading.written for key in ancestors(p.key))]
    lines += [Line(problem.key, REFUSED, problem.text) for problem in missing]
    return ImportReport(str(path), config, tuple(lines))


def _line(key: str, value: Any, reading: Reading, wrong: Sequence[Problem], told: Sequence[Problem]) -> Line:
    source = reading.config.source
    place = "override" if key in source.overrides else str(source.lines.get(key, ""))
    status, text = _judged(key, value, reading.config, wrong, told)
    return Line(key, status, text, _shown(value), place)


def _judged(
    key: str, value: Any, config: JobConfig, wrong: Sequence[Problem], told: Sequence[Problem]
) -> tuple[str, str]:
    """Status and text of a written key. What is said of a part of its value is said of it."""
    if problems := list(_of(key, wrong)):
        return REFUSED, "; ".join(problems)
    notes = [note for note in told if note.key == key and not isinstance(note, Translation)]
    if notes:
        return NOTED, "; ".join(note.text for note in notes)
    if translations := [note.text for note in told if note.key == key]:
        return TRANSLATED, "; ".join(translations)
    if value is None:
        return NOTED, "empty, so it asks for nothing"
    tables = METHODS.get(config.rl, dataset_keys)
    if key in tables.IDLE:
        return NOTED, tables.IDLE[key]
    if key in tables.NOT_YET:
        return NOTED, "dropped: it is so in Eagleray without it"
    return USED, "; ".join(_of(key, told))


def _of(key: str, said: Sequence[Problem]) -> Iterator[str]:
    """What is said of a key and of parts of its value; of these by their names, all together that it is said of."""
    parts: dict[str, list[str]] = {}
    for problem in said:
        if key in ancestors(problem.key):
            parts.setdefault(problem.text, []).append(problem.key.removeprefix(key).lstrip("."))
    for text, names in parts.items():
        yield f"{', '.join(names)}: {text}" if any(names) else text


def _shown(value: Any) -> str:
    if value is None or isinstance(value, float):
        return "" if value is None else f"{value:g}"
    dumped: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    text = dumped.removesuffix("\n...\n").strip()
    return text if len(text) <= VALUE_WIDTH else text[: VALUE_WIDTH - 1] + "…"


def show(report: ImportReport, console: Console | None = None) -> None:
    """Prints a report: a row a key, then whether it would run."""
    if console is None:
        terminal = sys.stdout.isatty()
        console = Console(force_terminal=terminal, width=None if terminal else PIPE_WIDTH)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("line", justify="right", style="dim", no_wrap=True)
    table.add_column("key", overflow="fold", ratio=5)
    table.add_column("", no_wrap=True)
    table.add_column("what becomes of it", overflow="fold", ratio=6)
    for line in report.lines:
        written = Text.assemble((f"{line.key}: ", "bold"), line.value) if line.place else Text(line.key, "bold")
        table.add_row(line.place, written, Text(line.status, STYLES[line.status]), Text(line.text))
    console.print(Text(report.path, "bold"))
    console.print(table)
    console.print()
    console.print(_counts(report))
    console.print(_verdict(report))


def _counts(report: ImportReport) -> Text:
    counts = [(sum(line.status == status for line in report.lines), status) for status in STYLES]
    words = [Text(f"{count} {status}", STYLES[status] if count else "dim") for count, status in counts]
    return Text(", ").join(words)


def _verdict(report: ImportReport) -> Text:
    config, source = report.config, report.config.source
    if not report.would_run:
        text = "It would not run: mend what is refused, or override it with key=value after the file's name."
        return Text(text, "bold red")
    kind = {None: "all weights", "lora": "LoRA", "qlora": "QLoRA"}[config.adapter]
    plan = shlex.join(["eagleray", "plan", report.path, *source.overrides.values()])
    lines = [f"It would run: {METHOD_NAMES[config.rl]}, {kind}. Whether its data, model and machines are there: {plan}"]
    if "ray_num_workers" not in {*source.lines, *source.overrides}:
        lines.append("Axolotl's launcher knows how many GPUs to use; here ray_num_workers says it, and it is 1 now.")
    return Text("\n".join(lines), "bold green")
