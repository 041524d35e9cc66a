"""Engines and reward functions that do what a test asks for, in real Ray actors. Trainers in these tests are real."""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from actors import snapshot
from actors.specs import RankSpec, SamplingSpec, TrainerSpec
from actors.trainer import Trainer
from actors.types import InstallReceipt, RolloutGroup, RolloutHeader, SnapshotHeader


class ReusedTrainer(Trainer):
    """A real one, whose process serves a test after the other: to import torch takes most of a test's time."""

    def again(self, spec: TrainerSpec, rank: RankSpec) -> None:
        """As if made anew."""
        vars(self).clear()
        Trainer.__init__(self, spec, rank)


class FakeEngine:
    """Samples random tokens, and answers the probe with what the trainer said of the version it holds."""

    def __init__(
        self, lie: str = "", takes_s: float = 0.0, held: str = "", until: str = "", fails: Sequence[str] = ()
    ) -> None:
        """takes_s: for each group, one after the other. held: a prompt that takes until there is a file `until`. fails: prompts
        that are not played to their end.
        """
        self.lie = lie
        self.fails = fails
        self.takes_s = takes_s
        self.held, self.until = held, until
        self.headers: list[SnapshotHeader] = []
        self.sampled: list[tuple[Any, int]] = []

    def again(self, *args: Any, **kwargs: Any) -> None:
        """As if made anew."""
        FakeEngine.__init__(self, *args, **kwargs)

    def install(self, header: SnapshotHeader, *buckets: Any, policy: str) -> InstallReceipt:
        """Takes what carries the digest of the bytes that came, as a real one."""
        first = not self.headers
        self.headers.append(header)
        digest = snapshot.joined([snapshot.digest(bucket) for bucket in buckets])
        before = self.lie == "before" and not first
        served = self.headers[0] if self.lie == "nothing" else self.headers[-2 if before else -1]
        return InstallReceipt(header.version, digest, served.probe_logprobs, 0.0)

    def versions(self) -> list[int]:
        return [header.version for header in self.headers]

    def sample(
        self, prompt: Any, sampling: SamplingSpec, seed: int, version: int, columns: Mapping[str, Any], policy: str
    ) -> tuple[RolloutHeader, RolloutGroup]:
        self.sampled.append((prompt, self.headers[-1].version))
        time.sleep(self.takes_s)
        while prompt == self.held and not os.path.exists(self.until):
            time.sleep(0.05)
        rng = np.random.default_rng(seed)
        ids = tuple(rng.integers(3, 48, rng.integers(1, 6), dtype=np.int32) for _ in range(sampling.num_generations))
        group = RolloutGroup(
            self.headers[-1].version,
            np.arange(3, 8, dtype=np.int32),
            ids,
            tuple(np.full(len(i), -3.0, np.float32) for i in ids),
            (False,) * len(ids),
            tuple(f"{prompt} {i.sum()}" for i in ids),
        )
        said = -1 if self.lie == "version" else group.policy_version
        seconds = self.takes_s * max(map(len, ids))
        lengths = tuple(map(len, ids))
        failure = "TimeoutError: it took too long" if prompt in self.fails else None
        header = RolloutHeader(said, len(group.prompt_ids), lengths, lengths, group.truncated, seconds, failure)
        return header, group if failure is None else replace(group, texts=("",) * len(ids))  # which parity fails on

    def done(self) -> list[tuple[Any, int]]:
        """Prompts and versions, in the order in which they were sampled."""
        return self.sampled


def parity(completions: list[str], **_: Any) -> list[float]:
    """1 for an even sum of tokens."""
    return [float(int(text.split()[-1]) % 2 == 0) for text in completions]


def by_alarm(completions: list[str], name: list[str]) -> list[float | None]:
    """Whether a signal ends what takes too long, as math-verify does it; and what a variable of the environment says."""

    def ring(signum: int, frame: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        while True:
            pass
    except TimeoutError:
        return [1.0, None if os.environ.get(name[0]) is None else 0.0]


def hangs_on_bad(completions: list[str], kind: list[str]) -> list[float]:
    if kind[0] == "hang":
        time.sleep(600)
    if kind[0] == "exit":
        os._exit(1)
    if kind[0] == "raise":
        raise RuntimeError("no idea")
    if kind[0] == "short":
        return [1.0]
    return [1.0] * len(completions)
