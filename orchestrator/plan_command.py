"""`eagleray plan`: what a job would start where, whether it fits, what would make it fit. Only `--check` starts anything."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from actors.errors import ConfigError
from orchestrator import hardware
from orchestrator.config import load
from orchestrator.dataset_plan import packs
from orchestrator.drawing import drawing
from orchestrator.fit import gb
from orchestrator.hardware import AUTO
from orchestrator.machines import machines
from orchestrator.memory import Memory
from orchestrator.memory_check import TOLERANCE, Measured, check
from orchestrator.plan import Plan
from orchestrator.planning import Planned, Read, Suggestion, describe, planned, read, suggestions
from orchestrator.runnable import ensure_runnable

WIDTH = 100  # where there is no terminal


def run(path: str, overrides: Sequence[str], where: str, *, as_json: bool, measure: bool) -> None:
    """Prints the plan. where: auto, or what is said, such as 2x8x80GB. Raises ConfigError when the job does not fit."""
    config = load(path, overrides)
    ensure_runnable(config)
    if measure and where != AUTO:
        raise ConfigError("--check measures on the machines that are there; leave --cluster out")
    with machines(where, started=measure) as nodes:
        found = read(config)
        job = planned(found.config, nodes, found)
        # Where there are too few CPUs, the plan itself says what would fit.
        changes = suggestions(found.config, nodes, found) if job.fit.problems or (job.problems and job.plan.gpu) else []
        console = Console(width=None if os.isatty(1) else WIDTH, quiet=as_json)
        for line in [*describe(job), *_more(job, found)]:
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        console.print(drawing(job))
        measured: list[Measured] = []
        if measure and not job.problems:
            for one in check(job, lambda text: console.print(text, markup=False, highlight=False)):
                console.print(_beside(one), markup=False, highlight=False)
                measured.append(one)
    if as_json:
        print(json.dumps(_record(job, found, changes, measured), indent=1))
    _raise_unless_it_fits(job, changes)
    _raise_unless_measured(measured)


def _more(job: Planned, found: Read) -> list[str]:
    """Lines beside the plan's own."""
    lines = [f"expected    {_tokens_told(job, found)}"]
    if isinstance(job.plan, Plan) and job.fit.engine is not None:
        tokens = job.fit.engine.kv_tokens
        at_once = tokens // job.plan.max_model_len
        lines.append(f"kv cache    {tokens:,} tokens an engine: {at_once:,} sequences of {job.plan.max_model_len} at once")
    lines += [f"assumed     {text}" for text in hardware.assumed(job.plan.nodes)]
    return [*lines, *(f"note        {note}" for note in job.fit.notes)]


def expected_tokens(job: Planned, found: Read) -> int | None:
    """Of a step, prompts included; an online job's completions are as long as they may be. None = not known."""
    config, plan = job.config, job.plan
    if isinstance(plan, Plan):
        prompts = None if found.tokens is None else plan.prompts_per_step * found.tokens
        return None if prompts is None else round(prompts) + plan.completions_per_step * config.trl.max_completion_length
    if packs(config):
        return plan.rows_per_step * config.sequence_len
    return None if found.tokens is None else round(plan.rows_per_step * found.tokens)


def _tokens_told(job: Planned, found: Read) -> str:
    total = expected_tokens(job, found)
    if total is None:
        return "the lengths of the rows are not known before they are read"
    if isinstance(job.plan, Plan):
        return f"up to {total:,} tokens a step, prompts of {found.tokens:.0f} tokens on average"
    length = job.config.sequence_len if packs(job.config) else found.tokens
    return f"about {total:,} tokens a step, rows of {length:.0f} tokens on average"


def _beside(one: Measured) -> str:
    what = f"{one.actor}: planned {gb(one.planned.tensors)} ({one.planned.moment}), measured {gb(one.measured)}"
    return f"{what}; the plan is {abs(one.off):.1%} {'above' if one.off > 0 else 'below'}"


def _raise_unless_it_fits(job: Planned, changes: Sequence[Suggestion]) -> None:
    if not job.problems:
        return
    lines = ["the cluster cannot hold this job:", *job.problems]
    if changes:
        lines += ["with one of these it would:", *(f"{told(s.changes)}  (the fullest at {s.fullest:.0%})" for s in changes)]
    elif job.fit.problems:
        more = "more or larger GPUs" if job.plan.gpu else "machines with more memory"
        lines.append(f"no change of batch, checkpointing, adapter, shards or placement makes it fit; use {more}")
    raise ConfigError("\n  ".join(lines))


def _raise_unless_measured(measured: Sequence[Measured]) -> None:
    if wrong := [one for one in measured if not one.agrees]:
        names = ", ".join(one.actor for one in wrong)
        raise ConfigError(f"the plan is more than {TOLERANCE:.0%} off what was measured for {names}")


def told(changes: Mapping[str, Any]) -> str:
    """Changes as overrides of the command line."""
    return " ".join(f"{key}={_value(value)}" for key, value in changes.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_value(one)}" for key, one in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _record(job: Planned, found: Read, changes: Sequence[Suggestion], measured: Sequence[Measured]) -> dict[str, Any]:
    """The plan as JSON; memory in bytes."""
    plan = job.plan
    return {
        "fits": not job.problems,
        "problems": job.problems,
        "suggestions": [{"changes": dict(s.changes), "fullest": s.fullest} for s in changes],
        "nodes": [asdict(node) | {"resources": dict(node.resources)} for node in plan.nodes],
        "bundles": [
            {"actor": str(bundle), "resources": dict(bundle.resources), "node": place}
            for bundle, place in zip(plan.bundles, plan.placement, strict=True)
        ],
        "memory": [
            {
                "node": place.node,
                "gpu": place.gpu,
                "capacity": place.capacity,
                "needed": place.total,
                "actors": {share.actor: _memory(share.memory) for share in place.shares},
            }
            for place in job.fit.places
        ],
        "kv_tokens": job.fit.engine.kv_tokens if job.fit.engine else None,
        "tokens_per_step": expected_tokens(job, found),
        "assumed": hardware.assumed(plan.nodes),
        "notes": list(job.fit.notes),
        "measured": [{"actor": one.actor, "planned": one.planned.tensors, "measured": one.measured} for one in measured],
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return {"moment": memory.moment, "terms": dict(memory.terms)}
