"""What `--cluster` means: machines that are only said, or those that are there."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray

from orchestrator import cluster, hardware, waits
from orchestrator.hardware import AUTO
from orchestrator.plan import Node


@contextmanager
def machines(where: str, *, started: bool = False) -> Iterator[list[Node]]:
    """Those that are said, such as 8x80GB; of auto the cluster that this driver has joined, or that of RAY_ADDRESS, joined
    while the block runs, else this machine.

    started: whether Ray runs in the block in any case. Raises ConfigError for what cannot be meant, and for GPUs of a size that
    nobody knows; Interrupted on Ctrl-C or SIGTERM while a cluster is joined or started.
    """
    joins = where == AUTO and (ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS")))
    with ExitStack() as stack:
        if joins or started:
            stack.enter_context(waits.interruptible())
            stack.enter_context(cluster.connected())
            waits.pause(0)
        nodes = hardware.said(where) if where != AUTO else cluster.nodes() if joins else cluster.local_nodes()
        hardware.ensure_known(nodes)
        yield nodes
