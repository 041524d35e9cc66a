"""A trainer of two ranks with real engines, by the command line, on a cluster that says it has room for them."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Head, head_node, run
from tests.e2e.test_run import records

pytestmark = pytest.mark.slow
SAME = ("loss", "reward", "grad_norm", "completion_tokens")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with head_node(cpus=6) as head:
        yield head


def test_ranks_and_engines_in_every_placement_learn_alike(head: Head, job: Callable[..., Path], tmp_path: Path) -> None:
    def learn(name: str, *overrides: str) -> list[dict[str, float]]:
        command = [sys.executable, "-m", "orchestrator", "run", str(config), f"output_dir={tmp_path / name}", *overrides]
        code, output = run(command, {**head.environment, "RAY_ADDRESS": head.gcs})
        assert code == 0, output
        return records(tmp_path / name, "train")

    config = job(micro_batch_size=4, gradient_accumulation_steps=2)
    ranks = ("ray_num_workers=2", "gradient_accumulation_steps=1")
    one = learn("one")
    for name, overrides in {"whole": (), "fsdp2": ("fsdp_version=2",)}.items():
        two = learn(name, *ranks, *overrides)
        for ours, theirs in zip(two, one, strict=True):
            assert [ours[key] for key in SAME] == pytest.approx([theirs[key] for key in SAME], rel=1e-3, abs=1e-4)

    # Two engines draw otherwise than one, so only what must hold anyway is compared.
    together = learn("colocate", *ranks, "trl.vllm_mode=colocate", "trl.vllm_enable_sleep_mode=true")
    assert [record["step"] for record in together] == [1, 2, 3, 4]
    assert max(record["probe_gap"] for record in together) < 1e-3
