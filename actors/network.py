"""Which of a machine's network interfaces the ranks of a job meet on, where their collectives are gloo's.

By itself gloo takes the interface of the address that the host name stands for. On many machines that is the loopback
interface, where ranks on other nodes are not to be found.
"""

import os
from typing import Any

import psutil
import ray


def use_node_interface() -> None:
    """Lets gloo in this process use the interface of its node's address in the cluster, unless GLOO_SOCKET_IFNAME is set."""
    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def torch_config(timeout_s: int) -> Any:
    """Ray Train's, of workers that do so before they meet. timeout_s: of their collectives."""
    from ray.train.torch import TorchConfig

    class Backend(TorchConfig().backend_cls):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(use_node_interface)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type:
            return Backend

    return Config(timeout_s=timeout_s)
