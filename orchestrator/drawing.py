"""A plan drawn for a terminal: its nodes, their GPUs, who is on them, and what fills their memory.

A GPU is a line with a bar of letters, one a term of memory.py, which a terminal colours and a file still tells apart. GPUs that
look alike share a line, and so do nodes.
"""

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from orchestrator.fit import Place, Share, gb
from orchestrator.hardware import GIB
from orchestrator.memory import TERMS
from orchestrator.plan import Node, amount
from orchestrator.planning import Planned

BAR = 32  # letters for all of a GPU's memory
LETTERS = dict(zip(TERMS, "WGOALBKX", strict=True))
COLOURS = dict(zip(TERMS, ("blue", "cyan", "magenta", "green", "yellow", "bright_black", "bright_blue", "white"), strict=True))
FREE = "."


def drawing(job: Planned) -> RenderableType:
    """Nodes as panels, with the legend below them."""
    nodes = job.plan.nodes
    of_node = [[place for place in job.fit.places if place.node == number] for number in range(len(nodes))]
    looks = [(_looks(node), tuple(map(_looks_of_place, places))) for node, places in zip(nodes, of_node, strict=True)]
    panels = []
    for _, alike in groupby(range(len(nodes)), key=lambda number: looks[number]):
        numbers = list(alike)
        first, last = numbers[0], numbers[-1]
        name = nodes[first].name + (f" to {nodes[last].name}, {len(numbers)} alike" if last > first else "")
        title = f"{name}: {_described(nodes[first])}"
        panels.append(Panel(_lines(nodes[first], of_node[first]), title=title, title_align="left"))
    used = {term for place in job.fit.places for share in place.shares for term, nbytes in share.memory.terms.items() if nbytes}
    return Group(*panels, _legend(used))


def _lines(node: Node, places: Sequence[Place]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    for _, alike in groupby(places, key=_looks_of_place):
        same = list(alike)
        first, last = same[0], same[-1]
        numbers = "" if first.gpu is None else f"{first.gpu}" if first is last else f"{first.gpu}-{last.gpu}"
        where = f"GPU {numbers}" if numbers else "memory"
        style = "" if first.fits else "bold red"
        table.add_row(where, _who(same), _bar(first), Text(_filled(first), style))
    free = int(node.resources.get("GPU", 0)) - len({place.gpu for place in places if place.gpu is not None})
    if free > 0:
        table.add_row(f"{free} GPU", "free")
    elif not places:
        table.add_row("nothing of this job")
    return table


def _bar(place: Place) -> Text:
    """What is needed, in shares of what there is; what is too much runs over the end."""
    text = Text()
    scale = BAR / (place.capacity or place.total or 1)
    needed: dict[str, int] = {}
    for share in place.shares:
        for term, nbytes in share.memory.terms.items():
            needed[term] = needed.get(term, 0) + nbytes
    so_far = 0
    for term in TERMS:
        begins, so_far = so_far, so_far + needed.get(term, 0)
        text.append(LETTERS[term] * (min(round(so_far * scale), 2 * BAR) - min(round(begins * scale), 2 * BAR)), COLOURS[term])
    text.append(FREE * (BAR - len(text)), "dim")
    return text


def _filled(place: Place) -> str:
    of = "" if place.capacity is None else f" of {gb(place.capacity)}"
    return f"{place.total / GIB:.1f}{of}" + ("" if place.fits else ", too much")


def _who(places: Sequence[Place]) -> str:
    """The actors of places that look alike, such as trainer 0-7."""
    parts = []
    for position, share in enumerate(places[0].shares):
        role, number = share.actor.rsplit(" ", 1)
        last = places[-1].shares[position].actor.rsplit(" ", 1)[1]
        parts.append(f"{role} {number}" if last == number else f"{role} {number}-{last}")
    return " + ".join(parts)


def _looks(node: Node) -> tuple[object, ...]:
    return _described(node), node.gpu_bytes, node.memory


def _described(node: Node) -> str:
    size = f" of {gb(node.gpu_bytes)}" if node.gpu_bytes else f", {gb(node.memory)}" if node.memory else ""
    return f"{amount({name: n for name, n in node.resources.items() if name in ('CPU', 'GPU')})}{size}"


def _looks_of_place(place: Place) -> tuple[object, ...]:
    def role(share: Share) -> str:
        return share.actor.rsplit(" ", 1)[0]

    return (place.capacity, *((role(share), tuple(share.memory.terms.items())) for share in place.shares))


def _legend(used: set[str]) -> Text:
    parts = [Text.assemble((LETTERS[term], COLOURS[term]), f" {term}") for term in TERMS if term in used]
    return Text("  ").join(parts)
