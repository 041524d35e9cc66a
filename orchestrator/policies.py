"""Published policy versions: which are kept, which one the engines serve, and the proof that they serve it.

An install is queued at each engine behind what it samples now and before what is sampled next. Its proof is checked
before the first rollout of that version is used, so a staleness above 0 never waits for a receipt.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from actors.errors import SyncError
from actors.types import InstallReceipt, SnapshotHeader
from orchestrator import cluster
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
        self.quantized = quantized
        self.tolerance = PROBE_TOLERANCE[dtype]
        self.timeout_s = timeout_s
        self.published: dict[int, tuple[Any, ...]] = {}  # by version: header, and refs of its buckets
        self.buckets = 1
        self.bases: dict[str, Sequence[float]] = {}  # the probe under the base models: what a dead sync serves
        self.installed: int | None = None
        self.receipts: dict[int, list[Any]] = {}  # refs not checked yet

    def learn_base(self) -> None:
        """Asks what the base model says of the probe, and how a policy comes; before the first install."""
        self.buckets = cluster.ask_ranks(
            self.actors.trainers, "bucket_count", doing="loading its model", timeout_s=self.timeout_s
        )
        self.bases["the base model"] = cluster.ask_ranks(
            self.actors.trainers, "base_logprobs", doing="computing the probe", timeout_s=self.timeout_s
        )
        if self.quantized:
            ref = self.actors.engines[0].probe_logprobs.remote()
            who = "engine 0, computing the probe"
            self.bases["the base model before it was quantized"] = cluster.fetch(ref, who, self.timeout_s)

    def publish(self) -> tuple[SnapshotHeader, float]:
        """The trainer's current policy becomes a version; returns its header and the seconds it took."""
        started = time.perf_counter()
        refs = [trainer.publish.options(num_returns=self.buckets + 1).remote() for trainer in self.actors.trainers]
        header: SnapshotHeader = cluster.fetch_ranks([of_rank[-1] for of_rank in refs], "publishing the policy", self.timeout_s)
        self.add(header, *refs[0][:-1])
        return header, time.perf_counter() - started

    def add(self, header: SnapshotHeader, *bucket_refs: Any) -> None:
        """Keeps a version under its number."""
        self.published[header.version] = (header, *bucket_refs)

    def install(self, version: int) -> None:
        """Queues the install of a version at every engine, unless it is what they serve."""
        if version == self.installed:
            return
        self.receipts[version] = [engine.install.remote(*self.published[version]) for engine in self.actors.engines]
        self.installed = version

    def confirm(self, version: int) -> tuple[float, float]:
        """Waits for the receipts of a version and checks them. Raises SyncError when a proof fails.

        Returns the worst probe gap in nats a token and the slowest install in seconds; 0, 0 when it was confirmed
        before.
        """
        gaps, seconds = [0.0], [0.0]
        for index, ref in enumerate(self.receipts.pop(version, [])):
            who = f"engine {index}, installing policy version {version}"
            receipt: InstallReceipt = cluster.fetch(ref, who, self.timeout_s)
            header = self.published[version][0]
            others: dict[str, Sequence[float]] = {
                f"version {v}": other[0].probe_logprobs
                for v, other in self.published.items()
                if other[0].digest != header.digest
            }
            others |= self.bases
            gaps.append(check_proof(header, receipt, others, self.tolerance, who))
            seconds.append(receipt.seconds)
        return max(gaps), max(seconds)

    def forget(self, needed: Sequence[int]) -> None:
        """Drops versions that nothing will install again; their buckets leave the object store."""
        self.published = {v: p for v, p in self.published.items() if v in needed or v == self.installed}


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
