"""Machines that a person says, and what Ray tells of those that are there."""

from typing import Any

import pytest

from actors.errors import ConfigError
from orchestrator.hardware import assumed, ensure_known, gpu_bytes, gpu_type, said
from orchestrator.plan import Node

GIB = 2**30


def test_machines_that_are_said() -> None:
    (one,) = said("8x80GB")
    assert (one.resources["GPU"], one.gpu_bytes) == (8.0, 80 * GIB)
    two = said("2x4x24gb")
    assert [node.name for node in two] == ["node 0", "node 1"]
    assert all((node.resources["GPU"], node.gpu_bytes) == (4.0, 24 * GIB) for node in two)


@pytest.mark.parametrize("text", ["", "8", "8x80", "eight", "1x2x3x4GB", "-1x80GB", "0x80GB", "2x0x80GB", "8x0GB"])
def test_what_is_no_machine_is_told_what_would_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--cluster .*8x80GB .* or 2x8x80GB"):
        said(text)


@pytest.mark.parametrize(
    ("described", "kind", "gib"),
    [
        ({"Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0}, "Labels": {}}, "H100", 80),
        ({"Resources": {"GPU": 1.0}, "Labels": {"ray.io/accelerator-type": "L4"}}, "L4", 24),
        ({"Resources": {"GPU": 1.0}, "Labels": {"ray.io/accelerator-type": "RTX-9"}}, "RTX-9", None),
        ({"Resources": {"GPU": 2.0}}, None, None),
    ],
)
def test_ray_tells_the_type_and_not_the_size(described: dict[str, Any], kind: str | None, gib: int | None) -> None:
    assert (gpu_type(described), gpu_bytes(described)) == (kind, gib and gib * GIB)


def test_a_size_that_nobody_knows_is_asked_for() -> None:
    ensure_known([Node("a", {"CPU": 2.0}), Node("b", {"GPU": 1.0}, gpu_bytes=GIB)])
    with pytest.raises(ConfigError, match=r"the GPUs of b are of an unknown type; .* --cluster 8x80GB"):
        ensure_known([Node("a", {"CPU": 2.0}), Node("b", {"GPU": 1.0})])
    with pytest.raises(ConfigError, match="of the type RTX-9, whose memory is not known here"):
        ensure_known([Node("b", {"GPU": 1.0}, gpu_type="RTX-9")])


def test_what_was_assumed_is_told() -> None:
    nodes = [Node(name, {"GPU": 1.0}, gpu_bytes=40 * GIB, gpu_type=kind) for name, kind in (("a", "A100"), ("b", "H100"))]
    first, second = assumed([*nodes, *nodes, Node("c", {"CPU": 1.0})])
    assert first == "A100: 40 GB a GPU; it also comes with more, which --cluster can say"
    assert second == "H100: 80 GB a GPU"
