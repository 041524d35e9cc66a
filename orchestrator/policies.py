"""Published policy versions: which are kept, how they come to the engines, and the proof that an engine serves one.

An engine gets no prompt for a version before its proof has been checked.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import SyncError
from actors.types import InstallReceipt, SnapshotHeader
from orchestrator import waits
from orchestrator.cluster import Actors

# Mean difference between the trainer's and an engine's log-probability of the probe, nats a token, above which the engine
# serves something else altogether. Rounding stays below a hundredth of the first, and was seen up to a third of the second:
# bfloat16 has 8 bits, and the two sides multiply in different orders.
PROBE_TOLERANCE = {"float32": 0.01, "bfloat16": 0.5}


class Policies:
    """The published versions of one job and their way to the engines."""

    def __init__(self, actors: Actors, dtype: str, timeout_s: float, *, quantized: bool = False) -> None:
        """quantized: the trainer's base; the engines' own is not, and is what they serve before the first install."""
        self.actors = actors
        self.name = actors.policy  # on the engines
        self.quantized = quantized
        self.tolerance = PROBE_TOLERANCE[dtype]
        self.timeout_s = timeout_s
        self.published: dict[int, tuple[Any, ...]] = {}  # by version: header, and refs of its buckets
        self.buckets = 1
        self.bases: dict[str, Sequence[float]] = {}  # the probe under the base models: what a dead sync serves
        self.asked: dict[int, int] = {}  # by engine, the version that it was asked to install last
        self.served: dict[int, int] = {}  # by engine, the version that it proved last
        self.costs: dict[int, tuple[float, float]] = {}  # by version, of all engines: probe gap and seconds, the largest

    def learn_base(self) -> None:
        """Asks what the base model says of the probe, and how a policy comes; before the first install."""
        self.buckets = waits.ask_ranks(
            self.actors.trainers, "bucket_count", doing="loading its model", timeout_s=self.timeout_s
        )
        self.bases["the base model"] = waits.ask_ranks(
            self.actors.trainers, "base_logprobs", doing="computing the probe", timeout_s=self.timeout_s
        )
        if self.quantized:
            ref = self.actors.engines[0].probe_logprobs.remote(self.name)
            who = "engine 0, computing the probe"
            self.bases["the base model before it was quantized"] = waits.fetch(ref, who, self.timeout_s)

    def publish(self, meanwhile: waits.Meanwhile | None = None) -> tuple[SnapshotHeader, float]:
        """The trainer's current policy becomes a version; returns its header and the seconds it took."""
        started = time.perf_counter()
        refs = [trainer.publish.options(num_returns=self.buckets + 1).remote() for trainer in self.actors.trainers]
        headers = [of_rank[-1] for of_rank in refs]
        header: SnapshotHeader = waits.fetch_ranks(headers, "publishing the policy", self.timeout_s, meanwhile)
        self.add(header, *refs[0][:-1])
        return header, time.perf_counter() - started

    def add(self, header: SnapshotHeader, *bucket_refs: Any) -> None:
        """Keeps a version under its number."""
        self.published[header.version] = (header, *bucket_refs)

    def install(self, index: int, version: int) -> Any:
        """Asks an engine to serve a version; returns the ref of its receipt."""
        self.asked[index] = version
        return self.actors.engines[index].install.remote(*self.published[version], policy=self.name)

    def confirm(self, index: int, ref: Any) -> int:
        """Checks the receipt of an engine's last install; returns its version. Raises SyncError when the proof fails."""
        version = self.asked[index]
        who = f"engine {index}, installing policy version {version}"
        receipt: InstallReceipt = waits.fetch(ref, who, self.timeout_s)
        header = self.published[version][0]
        others: dict[str, Sequence[float]] = {
            f"version {v}": other[0].probe_logprobs
            for v, other in self.published.items()
            if other[0].digest != header.digest
        }
        others |= self.bases
        gap = check_proof(header, receipt, others, self.tolerance, who)
        worst, slowest = self.costs.get(version, (0.0, 0.0))
        self.costs[version] = max(gap, worst), max(receipt.seconds, slowest)
        self.served[index] = version
        return version

    def cost(self, version: int) -> tuple[float, float]:
        """The worst probe gap of a version in nats a token, and its slowest install in seconds; 0, 0 when told before."""
        return self.costs.pop(version, (0.0, 0.0))

    def forget(self, needed: Sequence[int]) -> None:
        """Drops versions that nothing will install again; their buckets leave the object store.

        What engines were asked for last stays, and what they served before: a proof that is under way compares with both.
        """
        kept = {*needed, *self.asked.values(), *self.served.values()}
        self.published = {v: p for v, p in self.published.items() if v in kept}


def check_proof(
    header: SnapshotHeader,
    receipt: InstallReceipt,
    others: Mapping[str, Sequence[float]],
    tolerance: float,
    who: str,
) -> float:
    """The probe gap, nats a token. Raises SyncError unless the receipt proves that the engine serves `header`.

    Version and digest prove that the bytes arrived. The probe proves that they answer: the engine's own
    log-probabilities must agree with the trainer's within `tolerance`, and must not be nearer to those of `others`
    (name -> log-probabilities), since a sync that does nothing stays within any tolerance while the policy has hardly moved.
    """
    if (receipt.version, receipt.digest) != (header.version, header.digest):
        raise SyncError(
            f"{who}: it acknowledged version {receipt.version} with digest {receipt.digest}, "
            f"published was version {header.version} with digest {header.digest}"
        )
    gap = _distance(header.probe_logprobs, receipt.probe_logprobs)
    if not gap <= tolerance:
        raise SyncError(
            f"{who}: its log-probabilities of the probe differ from the trainer's by {gap:.4f} nats a token "
            f"(limit {tolerance}): it does not serve this policy"
        )
    for name, logprobs in others.items():
        if _distance(logprobs, receipt.probe_logprobs) < gap / 2:
            raise SyncError(f"{who}: it answers like {name}: the install changed nothing")
    return gap


def _distance(a_N: Sequence[float], b_N: Sequence[float]) -> float:
    """Mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(a_N, b_N, strict=True)) / len(a_N)
