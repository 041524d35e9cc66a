"""The interface on which gloo's ranks meet. That ranks on several machines do so is for tests/e2e/test_nodes.py."""

import os

import pytest
import ray

from actors.network import use_node_interface


@pytest.mark.parametrize(
    ("address", "set_before", "chosen"),
    (("127.0.0.1", None, "lo"), ("127.0.0.1", "ib0", "ib0"), ("203.0.113.9", None, None)),
)
def test_gloo_uses_the_interface_of_the_nodes_address(
    monkeypatch: pytest.MonkeyPatch, address: str, set_before: str | None, chosen: str | None
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", set_before or "")
    if set_before is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_node_interface()
    assert os.environ.get("GLOO_SOCKET_IFNAME") == chosen
