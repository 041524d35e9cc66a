"""Environment of every test process. vLLM, Ray and the hub's client read these when they are imported."""

import os
from collections.abc import Iterator

import pytest

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the test's own process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads stall each other when the cores are shared
    "TOKENIZERS_PARALLELISM": "false",
    # A machine that stands still for a while would lose its raylet, or a process its control service, which then exits.
    "RAY_health_check_failure_threshold": "30",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}

for name, value in ENVIRONMENT.items():
    os.environ.setdefault(name, value)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny models, which gain nothing from threads that wait for each other on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
