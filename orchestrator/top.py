"""`eagleray top`: a run in the terminal while it goes, from its folder or from a cluster's dashboard."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from actors.errors import ActorError
from orchestrator.frame import frame
from orchestrator.sightings import OfCluster, OfFolder, Sighting

EVERY_S = 2.0  # the dashboard itself hears from its nodes no oftener
PIPE_WIDTH, PIPE_HEIGHT = 100, 40  # of what is no terminal
MAX_SILENT = 5  # looks in a row that a dashboard may leave unanswered


def top(output_dir: str | None, address: str | None, once: bool) -> int:
    """Shows the run of a folder, or, without one or with an address, the newest run of a cluster, until it ends.

    Raises EaglerayError when there is no such run. Ctrl-C ends it.
    """
    source: OfFolder | OfCluster
    source = OfFolder(Path(output_dir)) if output_dir and not address else OfCluster(address, output_dir or "")
    console = Console(force_terminal=sys.stdout.isatty())
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH, height=PIPE_HEIGHT, force_terminal=False)
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    seen = source.look()
    if not once and console.is_terminal and not seen.end:
        seen = _follow(source, console, seen)
    console.print(frame(seen, console.width, console.height))
    return 0


def _follow(source: OfFolder | OfCluster, console: Console, seen: Sighting) -> Sighting:
    """Draws until the run has ended, or Ctrl-C; returns what was seen last."""
    silent = 0
    try:
        with Live(frame(seen, console.width, console.height), console=console, screen=True, auto_refresh=False) as live:
            while not seen.end:
                time.sleep(EVERY_S)
                try:
                    seen, silent = source.look(), 0
                except ActorError:
                    silent += 1
                    if silent == MAX_SILENT:
                        raise
                    continue
                live.update(frame(seen, console.width, console.height), refresh=True)
    except KeyboardInterrupt:
        pass
    return seen
