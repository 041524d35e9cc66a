"""What was sampled, on its way to OUTPUT_DIR/rollouts: `step-000012.jsonl` and `held-out-000012.jsonl`, a line a completion."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.errors import ActorError
from actors.samples import SampleWriter
from actors.types import Scores
from orchestrator import cluster, waits
from orchestrator.rollouts import Group

WRITE_TIMEOUT_S = 60
Numbers = Sequence[Sequence[float | None]]  # [groups][G]


class Samples:
    """The loop hands batches over and does not wait: a disk that fails costs a warning, and no training."""

    def __init__(self, output_dir: Path, warn: Callable[[str], None]) -> None:
        self.folder = output_dir / "rollouts"
        self.warn = warn
        self.writer = cluster.start_free(SampleWriter, "samples")
        self.pending: list[Any] = []

    def save(
        self,
        name: str,
        groups: Sequence[Group],
        scores: Sequence[Sequence[Scores]],
        rewards: Numbers,
        advantages: Numbers,
    ) -> None:
        """Queues a file; tells of the ones before it that could not be written."""
        self._look(0.0)
        prompts = [group.row.prompt for group in groups]
        group_refs = [group.group_ref for group in groups]
        path = str(self.folder / f"{name}.jsonl")
        self.pending.append(self.writer.write.remote(path, prompts, scores, rewards, advantages, *group_refs))

    def finish(self) -> None:
        """Waits until all are written."""
        self._look(WRITE_TIMEOUT_S)

    def _look(self, timeout_s: float) -> None:
        waiting, self.pending = self.pending, []
        for ref in waiting:
            if timeout_s == 0.0 and not waits.wait(ref, 0.0):
                self.pending.append(ref)
                continue
            try:
                waits.fetch(ref, f"the writer of {self.folder}", timeout_s)
            except ActorError as error:
                self.warn(str(error))
