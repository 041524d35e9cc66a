"""A driver that has called ray.init() itself, as a notebook or a script does."""

import ray

from orchestrator.cluster import connected


def test_a_ray_that_is_there_is_joined_and_stays(cluster: None) -> None:
    job_id = ray.get_runtime_context().get_job_id()
    address = ray.init(ignore_reinit_error=True).address_info["gcs_address"]
    for _ in range(2):  # one job after another
        with connected() as here:
            assert here.job_id == job_id
            assert here.address == address
            assert here.logs.is_dir()
    assert ray.is_initialized() and ray.get_runtime_context().get_job_id() == job_id
