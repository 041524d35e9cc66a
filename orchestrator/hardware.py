"""The machines that a job is planned for: those that are there, or those that a person says (`--cluster 2x8x80GB`).

Ray counts GPUs and does not say how large they are; a node's accelerator type does, where GPU_GIB knows it. A new kind of GPU
is a line there.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import ConfigError
from orchestrator.plan import Node

GIB = 2**30
AUTO = "auto"  # the machines that are there
CPUS_PER_GPU = 16  # of machines that are only said
EXAMPLES = "8x80GB (a machine with eight GPUs of 80 GB) or 2x8x80GB (two of them)"
TYPE_LABEL = "ray.io/accelerator-type"
TYPE_RESOURCE = "accelerator_type:"  # Ray gives a node with GPUs a resource of this name and their type

# By Ray's name of the type (ray.util.accelerators); of several sizes the smallest.
GPU_GIB = {
    "K80": 12, "P4": 8, "P100": 16, "V100": 16, "T4": 16, "A10G": 24, "L4": 24, "L40S": 48, "RTX-PRO-6000": 96,
    "A100": 40, "A100-40G": 40, "A100-80G": 80, "H20": 96, "H100": 80, "H200": 141,
    "B200": 180, "GB200": 185, "B300": 270, "GB300": 278,
}  # fmt: skip
SEVERAL_SIZES = ("V100", "A100")


def said(text: str) -> list[Node]:
    """`[NODES x] GPUS x SIZE GB` as nodes. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(?:(\d+)x)?(\d+)x(\d+(?:\.\d+)?)GB", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(f"--cluster {text}: say {AUTO}, {EXAMPLES}")
    count, gpus, size = int(found[1] or 1), int(found[2]), float(found[3])
    if not count or not gpus or not size:
        raise ConfigError(f"--cluster {text}: there is nothing in it; say {EXAMPLES}")
    resources = {"CPU": float(CPUS_PER_GPU * gpus), "GPU": float(gpus)}
    return [Node(f"node {i}", resources, gpu_bytes=round(size * GIB)) for i in range(count)]


def gpu_type(described: Mapping[str, Any]) -> str | None:
    """Of a node as ray.nodes() describes it; None = it has no GPU, or does not say."""
    named = (name.removeprefix(TYPE_RESOURCE) for name in described["Resources"] if name.startswith(TYPE_RESOURCE))
    label: str | None = (described.get("Labels") or {}).get(TYPE_LABEL)
    return label or next(named, None)


def gpu_bytes(described: Mapping[str, Any]) -> int | None:
    """Of each GPU of a node as ray.nodes() describes it; None = not known."""
    return GIB * GPU_GIB[name] if (name := gpu_type(described)) in GPU_GIB else None


def ensure_known(nodes: Sequence[Node]) -> None:
    """Raises ConfigError where GPUs are of a size that nobody knows."""
    for node in nodes:
        if node.resources.get("GPU", 0) and node.gpu_bytes is None:
            what = f"of the type {node.gpu_type}, whose memory is not known here" if node.gpu_type else "of an unknown type"
            raise ConfigError(f"the GPUs of {node.name} are {what}; say how large they are, such as --cluster {EXAMPLES}")


def assumed(nodes: Sequence[Node]) -> list[str]:
    """What was taken for granted about these nodes, a line each."""
    types = sorted({node.gpu_type for node in nodes if node.gpu_type})
    several = "; it also comes with more, which --cluster can say"
    return [f"{name}: {GPU_GIB[name]} GB a GPU{several if name in SEVERAL_SIZES else ''}" for name in types if name in GPU_GIB]
