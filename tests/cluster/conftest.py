"""A Ray cluster of each module's own, with more CPUs than the machine has: its actors mostly wait.

It ends with its module: a second cluster on a machine, such as a whole job's, has no agent that reads logs for its dashboard.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with TemporaryDirectory(prefix="er", dir="/tmp") as folder:  # Ray's sockets need a short path
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=folder,
            runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}},
        )
        yield
        ray.shutdown()
