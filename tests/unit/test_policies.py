"""The proof of sync, attacked: each way in which an install can lie must be found."""

from dataclasses import replace

import pytest

from actors.errors import SyncError
from actors.types import InstallReceipt, SnapshotHeader
from orchestrator.policies import check_proof

PROBES = {0: (-1.0, -2.0, -3.0), 1: (-1.001, -2.002, -2.999), 2: (-1.5, -2.5, -2.0)}
TOLERANCE = 0.01
OTHERS = {"version 0": PROBES[0]}


def header(version: int) -> SnapshotHeader:
    return SnapshotHeader(version, "m", 8, 2.0, (), 0, f"digest-{version}", PROBES[version])


def receipt(version: int, probe: tuple[float, ...], digest: str | None = None) -> InstallReceipt:
    return InstallReceipt(version, digest or f"digest-{version}", probe, 0.1)


def noisy(probe: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(p + 1e-5 for p in probe)


def test_a_true_receipt_gives_the_gap() -> None:
    gap = check_proof(header(1), receipt(1, noisy(PROBES[1])), OTHERS, TOLERANCE, "engine 0")
    assert gap == pytest.approx(1e-5, rel=1e-3)


def test_another_version_or_other_bytes() -> None:
    with pytest.raises(SyncError, match="acknowledged version 0"):
        check_proof(header(1), receipt(0, PROBES[1]), {}, TOLERANCE, "engine 0")
    with pytest.raises(SyncError, match="with digest wrong"):
        check_proof(header(1), receipt(1, PROBES[1], "wrong"), {}, TOLERANCE, "engine 0")


def test_the_engine_serves_something_else() -> None:
    with pytest.raises(SyncError, match=r"engine 3: .* differ .* by 0.6667 nats a token \(limit 0.01\)"):
        check_proof(header(2), receipt(2, PROBES[0]), {}, TOLERANCE, "engine 3")


def test_an_install_that_changed_nothing_within_the_tolerance() -> None:
    # Versions 0 and 1 differ by 0.0013 nats a token, far below the tolerance; the engine claims 1 and answers as 0.
    with pytest.raises(SyncError, match="answers like version 0: the install changed nothing"):
        check_proof(header(1), receipt(1, noisy(PROBES[0])), OTHERS, TOLERANCE, "engine 0")


def test_an_unchanged_policy_is_no_lie() -> None:
    same = replace(header(1), probe_logprobs=PROBES[0], digest="digest-0")
    assert check_proof(same, receipt(1, noisy(PROBES[0]), "digest-0"), OTHERS, TOLERANCE, "engine 0") < 1e-4


def test_a_probe_of_nan_is_no_proof() -> None:
    with pytest.raises(SyncError, match="does not serve this policy"):
        check_proof(header(1), receipt(1, (float("nan"),) * 3), {}, TOLERANCE, "engine 0")
