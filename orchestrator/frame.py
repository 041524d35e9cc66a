"""One frame of `eagleray top`: a sighting as text for a terminal. It computes and draws, and asks nobody.

A curve is a line in CURVES, a part of a step's time one in PARTS; each shows where the run's records have its metric.
"""

import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from rich.box import ROUNDED
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from orchestrator.dashboard import Actor, Machine
from orchestrator.display import RECENT_STEPS, duration, gib, written
from orchestrator.sightings import Sighting

BLOCKS = "▁▂▃▄▅▆▇█"
BAR = "━"
MAX_CURVES = 7
BESIDE_SPARKS, BESIDE_BARS = 30, 26  # columns of a panel that words, numbers and its frame take
STATE_STYLES = {"ALIVE": "green", "DEAD": "bold red", "RESTARTING": "bold yellow"}  # others wait to be started

CURVES = {  # words -> metric
    "reward": "reward",
    "accuracy": "accuracy",
    "loss": "loss",
    "tokens right": "token_accuracy",
    "margin": "reward_margin",
    "pairs right": "pair_accuracy",
    "length": "completion_length",
    "KL": "kl",
    "staleness": "staleness",
    "gradient": "grad_norm",
    "rate": "learning_rate",
}
HELD_OUT = ("accuracy", "reward", "loss")  # the first of these metrics that the run has is shown
PARTS = {"sample": "sample_s", "score": "score_s", "train": "train_s", "sync": "sync_s", "whole step": "step_s"}


def frame(seen: Sighting, width: int, height: int) -> RenderableType:
    """Everything, in a terminal of so many columns and lines if it has 80 and 24."""
    left = width // 2
    top = Table.grid(expand=True)
    top.add_column(width=left)
    top.add_column(ratio=1)
    curves, times = _curves(seen, max(5, left - BESIDE_SPARKS)), _times(seen, min(30, max(5, width - left - BESIDE_BARS)))
    curves.height = times.height = MAX_CURVES + 2
    top.add_row(curves, times)
    few = 2 if height < 30 else 4
    warnings = _warnings(seen, few)
    machines = list(seen.machines.values())[:few]
    taken = 2 + (MAX_CURVES + 2) + (4 + len(machines)) + (len(warnings) + 2 if warnings else 0)
    parts: list[RenderableType] = [*_head(seen), top, _actors(seen, max(1, height - taken - 1), machines)]
    if warnings:
        parts.append(Panel(Group(*warnings), title="warnings", title_align="left", box=ROUNDED, border_style="yellow"))
    return Group(*parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve in one line, the means of equal parts where there are more values than columns; a gap where none is finite."""
    columns = min(width, len(values))
    means = []
    for i in range(columns):
        part = [v for v in values[i * len(values) // columns : (i + 1) * len(values) // columns] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    finite = [mean for mean in means if math.isfinite(mean)]
    low, span = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    top = len(BLOCKS) - 1
    marks = [round((mean - low) / span * top) if span and math.isfinite(mean) else 0 for mean in means]
    return "".join(BLOCKS[mark] if math.isfinite(mean) else " " for mark, mean in zip(marks, means, strict=True))


def state_of(seen: Sighting) -> tuple[str, str]:
    """How the run is, and the style to say it in."""
    if seen.end:
        text = str(seen.end["how"])
        return text, {"done": "bold green", "failed": "bold red"}.get(text, "bold yellow")
    if seen.unseen and seen.start:
        return "out of sight", "bold red"
    return "running", "bold green"


def _head(seen: Sighting) -> list[Text]:
    start, (state, style) = seen.start, state_of(seen)
    model = str(start.get("model", "")).rstrip("/").rsplit("/", 1)[-1]
    title = Text.assemble(
        ("eagleray top  ", "dim"), (str(start.get("run", "?")), "bold"), f"  {start.get('method', '')} of {model}  "
    )
    title.append(f"● {state}", style)
    phases = seen.told("phase")
    if seen.end:
        title.append(f"  {seen.end['text']}")
    elif phases:
        title.append(f"  {phases[-1]['text']}  {duration(seen.at - phases[-1]['time'])}")
    place = f"job {start.get('job_id', '-')}   {start.get('dashboard') or 'no dashboard'}   {start.get('output_dir', '')}"
    return [one_line(title), one_line(Text(place, "dim"))]


def one_line(text: Text) -> Text:
    """Cut where the terminal ends."""
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _known(seen: Sighting, metric: str) -> bool:
    return any(math.isfinite(_value(record, metric)) for record in seen.train)


def _value(record: dict[str, Any], metric: str) -> float:
    value = record.get(metric)
    return math.nan if value is None else float(value)  # JSON has null where a value was not finite


def _curves(seen: Sighting, columns: int) -> Panel:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    shown = [(words, metric) for words, metric in CURVES.items() if _known(seen, metric)][:MAX_CURVES]
    for words, metric in shown:
        values = [_value(record, metric) for record in seen.train]
        last = next(value for value in reversed(values) if math.isfinite(value))
        table.add_row(words, written(metric, last), sparkline(values, columns))
    step = int(seen.train[-1]["step"]) if seen.train else 0
    steps = seen.told("plan")[-1]["steps"] if seen.told("plan") else None
    title = f"step {step} of {steps}" if steps else f"step {step}"
    body: RenderableType = table if shown else Text("no step is done yet", "dim")
    return Panel(body, title=title, title_align="left", box=ROUNDED, border_style="cyan", subtitle=_left(seen, step, steps))


def _left(seen: Sighting, step: int, steps: int | None) -> str:
    """What is left, from the last steps' time."""
    times = [_value(record, "step_s") for record in seen.train[-RECENT_STEPS:]]
    times = [value for value in times if math.isfinite(value)]
    if not times or not steps or step >= steps or seen.end:
        return ""
    return f"{duration((steps - step) * sum(times) / len(times))} left"


def _times(seen: Sighting, columns: int) -> Panel:
    last = seen.train[-1] if seen.train else {}
    whole = _value(last, "step_s")
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="dim", no_wrap=True, min_width=10)
    table.add_column(justify="right", no_wrap=True, min_width=7)
    table.add_column(no_wrap=True)
    for words, metric in PARTS.items():
        value = _value(last, metric)
        if math.isfinite(value):
            longest = max(whole, value) if math.isfinite(whole) else value
            length = max(1, round(columns * value / longest)) if longest else 0
            table.add_row(words, f"{value:.2f} s" if value < 10 else f"{value:.1f} s", Text(BAR * length, "magenta"))
    if math.isfinite(rate := _value(last, "tokens_per_s")):
        table.add_row("sampled", f"{rate:,.0f}", "tokens/s")
    since = f"{duration(seen.at - last['time'])} ago" if last else ""
    held_out = [record for record in seen.records if record["kind"] == "eval"]
    for name in HELD_OUT:
        values = [_value(record, f"eval/{name}") for record in held_out if f"eval/{name}" in record]
        if values:
            table.add_row("held out", written(name, values[-1]), Text(f"{name}, first {written(name, values[0])}", "dim"))
            break
    return Panel(table, title="the last step", subtitle=since, title_align="left", box=ROUNDED, border_style="magenta")


def _actors(seen: Sighting, rows: int, machines: Sequence[Machine]) -> Panel:
    """Actors that are not alive come first where not all fit."""
    table = Table.grid(padding=(0, 3, 0, 0))
    for heading in ("actor", "state", "node", "pid", "memory", "GPU", "restarts"):
        right = heading in ("pid", "memory", "GPU", "restarts")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    table.add_row(*(Text(str(column.header), "dim") for column in table.columns))
    shown = sorted(seen.actors, key=lambda actor: actor.state == "ALIVE")[:rows] if len(seen.actors) > rows else seen.actors
    for actor in shown:
        table.add_row(*_actor(actor, seen.machines))
    more: list[RenderableType] = []
    if len(shown) < len(seen.actors):
        more.append(Text(f"and {len(seen.actors) - len(shown)} more", "dim"))
    if not seen.actors:
        gone = f"the run is over ({seen.end['how']})" if seen.end else seen.unseen or "none yet"
        more.append(Text(gone, "dim" if seen.end or not seen.unseen else "red"))
    more += [_machine(machine) for machine in machines]
    return Panel(Group(table, *more), title="actors", title_align="left", box=ROUNDED, border_style="green")


def _actor(actor: Actor, machines: dict[str, Machine]) -> list[Text]:
    machine = machines.get(actor.node_id)
    state = Text(actor.state.lower().replace("_", " "), STATE_STYLES.get(actor.state, "yellow"))
    return [
        Text(actor.name),
        state if actor.state != "DEAD" or actor.killed else Text("ended", "dim"),
        Text(machine.name if machine else "-"),
        Text(str(actor.pid or "-")),
        Text(gib(actor.memory) if actor.memory else "-"),
        Text(gib(actor.gpu_memory * 2**20) if actor.gpu_memory else "-"),
        Text(str(actor.restarts), "bold yellow" if actor.restarts else "dim"),
    ]


def _machine(machine: Machine) -> Text:
    share = machine.memory_used / machine.memory_total if machine.memory_total else 0.0
    style = "bold red" if share > 0.95 else "yellow" if share > 0.85 else "dim"
    text = Text(f"{machine.name}  {gib(machine.memory_used)} of {gib(machine.memory_total)}", style)
    for index, (used, total) in enumerate(machine.gpu_memory):
        text.append(f"   GPU {index} {used / 1024:.0f}/{total / 1024:.0f} GiB", "dim")
    return one_line(text)


def _warnings(seen: Sighting, count: int) -> list[Text]:
    return [
        one_line(Text(f"{datetime.fromtimestamp(event['time']):%H:%M:%S}  {event['text'].partition(chr(10))[0]}"))
        for event in seen.told("warning")[-count:]
    ]
