"""The actor that learns: holds the policy, takes one optimizer step a batch, publishes snapshots, saves and restores.

Rollout groups arrive straight from the object store; the driver sends advantages and gets statistics. Every random
draw comes from torch's generators, whose state is part of a checkpoint, so that a resumed run repeats the one that
was not interrupted.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors import adapter, device, model, ranks, snapshot, storage
from actors.loss import grpo_loss, token_weights
from actors.optimizers import load_schedule
from actors.packing import PackedRow, Sample, idle_row, pack_row, plan_rows
from actors.snapshot import Bucket
from actors.specs import OptimizerSpec, RankSpec, TrainerSpec
from actors.types import RolloutGroup, SnapshotHeader, TensorEntry, TrainStats

RNG_FILE = "rng-{rank}.safetensors"
OLDER_FILE = "policy-{version}-{bucket}.safetensors"
TRAINER_FILE = "trainer.json"
STEP_SUMS = ("kl_sum", "clipped_sum", "importance_sum", "mismatch_sum")


class Trainer:
    """One trainer rank. Made into a Ray actor by the driver; usable as it is in a test.

    Every rank of a group gets every call, in the same order, since most of them are collectives.
    """

    def __init__(self, spec: TrainerSpec, rank: RankSpec | None = None, after: Sequence[Any] = ()) -> None:
        """after: actors that must have loaded before this one takes memory of the GPU that it may share with them."""
        device.set_threads(spec.threads)
        model.import_libraries()
        device.take_turn(after)
        self.spec = spec
        self.rank = rank or RankSpec()
        self.version = 0
        reference = spec.loss.beta != 0.0
        sharding = ranks.join(self.rank, spec)
        device.seed_everything(spec.seed)  # a new adapter starts alike on all ranks
        with ranks.loading(self.rank, spec):
            policy = model.load_policy(
                spec.model,
                spec.lora,
                gradient_checkpointing=spec.gradient_checkpointing,
                reference=reference,
                temperature=spec.temperature,
            )
        # With LoRA it is the policy itself, in another state; all weights need a frozen copy.
        self.reference = model.load_base(spec.model, spec.temperature).eval() if reference and spec.lora is None else None
        self.shared = ranks.share(sharding, policy, lambda trained: _optimizer(trained, spec.optimizer), self.rank.world)
        self.policy = self.shared.policy
        self.scheduler = _schedule(self.shared.optimizer, spec.optimizer)
        device.seed_everything(spec.seed + self.rank.rank)  # and dropout differs
        self.probe: tuple[int, ...] = ()
        self.probe_of_base: tuple[float, ...] = ()
        self.buckets = snapshot.buckets(self.shared.nbytes(), spec.bucket_bytes)  # names of what is published
        self.buffer: Bucket | None = None  # of the last publish

    def __repr__(self) -> str:  # what the dashboard and Ray's logs call it
        return f"trainer {self.rank.rank} of {self.rank.world}: {self.spec.model.name}"

    def set_probe(self, token_ids: Sequence[int]) -> None:
        """The sequence whose log-probabilities prove a sync; at least two tokens. Before anything is trained or restored."""
        self.probe = tuple(token_ids)
        self.policy.eval()
        with nullcontext() if self.spec.lora is None else self.policy.disable_adapter():
            self.probe_of_base = tuple(self.shared.sequence_logprobs(self.probe))

    def base_logprobs(self) -> tuple[float, ...]:
        """The probe's log-probabilities under the base model: what an engine answers whose installs do nothing."""
        return self.probe_of_base

    def bucket_count(self) -> int:
        """How many buckets `publish` gives before the header."""
        return len(self.buckets)

    def ensure_shared(self, marker: str, content: str) -> None:
        """Raises CheckpointError unless the driver's file is seen here."""
        storage.ensure_shared(marker, content)

    def train(self, advantages: Sequence[Sequence[float | None]], *groups: RolloutGroup) -> TrainStats:
        """One batch: `num_iterations` optimizer steps over the completions that have an advantage.

        advantages: [groups][G], of this rank's share; None = the sample was dropped or is another rank's, and counts
        nowhere here. Ends in the next policy version. The answer is the same on every rank.
        """
        samples, lengths = self._samples(advantages, groups)
        rows = [pack_row(groups, r) for r in plan_rows(groups, samples, self.spec.micro_batch_size)]
        counts = self.shared.total({
            "sequences": len(lengths),
            "tokens": sum(lengths),
            "trained_completions": len(samples),
            "trained_tokens": sum(int(row.mask_BT.sum()) for row in rows),
            "computed_tokens": sum(row.input_ids.numel() for row in rows),
        })  # fmt: skip
        if self.shared.lockstep:
            rows += [idle_row()] * (self.shared.most(len(rows)) - len(rows))
        self.policy.train()
        several = self.spec.num_iterations > 1
        old = [self._logprobs_now(self.shared.model, row) if several else None for row in rows]
        totals: dict[str, float] = {}
        left_out = 0
        for _ in range(self.spec.num_iterations):
            totals = self._iteration(rows, old, counts)
            left_out += bool(totals["left_out"])
        if self.spec.shares_gpu:
            device.release_cache()
        self.version += 1
        trained_tokens = int(counts["trained_tokens"])
        share = 1.0 / trained_tokens if trained_tokens else math.nan  # nothing was trained, so nothing was measured
        return TrainStats(
            version=self.version,
            loss=totals["loss"],
            grad_norm=totals["grad_norm"],
            learning_rate=totals["learning_rate"],
            kl=totals["kl_sum"] * share if self.spec.loss.beta else math.nan,
            entropy=totals["entropy_sum"] * share,
            clip_fraction=totals["clipped_sum"] * share,
            importance_ratio=totals["importance_sum"] * share,
            engine_gap=totals["mismatch_sum"] * share,
            trained_completions=int(counts["trained_completions"]),
            trained_tokens=trained_tokens,
            computed_tokens=int(counts["computed_tokens"]),
            left_out=left_out,
        )

    def _samples(
        self, advantages: Sequence[Sequence[float | None]], groups: Sequence[RolloutGroup]
    ) -> tuple[list[Sample], list[int]]:
        """Samples to compute, and the lengths of all that count in the loss's mean.

        Without a KL term a completion of advantage 0 has no gradient, so it counts but is not computed.
        """
        samples, lengths = [], []
        for g, (group, advantages_G) in enumerate(zip(groups, advantages, strict=True)):
            for i, advantage in enumerate(advantages_G):
                if advantage is None:
                    continue
                length = int(group.written_by_model(i).sum())
                if self.spec.mask_truncated_completions and group.truncated[i]:
                    length = 0
                lengths.append(length)
                if length and (advantage != 0.0 or self.spec.loss.beta != 0.0):
                    samples.append(Sample(g, i, advantage))
        return samples, lengths

    @torch.no_grad()
    def _logprobs_now(self, policy: Any, row: PackedRow) -> Tensor:
        return model.completion_logprobs(policy, row.to(device.device()))[0]

    def _reference_logprobs(self, row: PackedRow) -> Tensor:
        if self.reference is not None:
            return self._logprobs_now(self.reference, row)
        with adapter.as_reference(self.policy):
            return self._logprobs_now(self.shared.model, row)

    def _iteration(self, rows: list[PackedRow], old: list[Tensor | None], counts: Mapping[str, float]) -> dict[str, float]:
        """Accumulates the gradient of the whole batch row by row, then steps once. counts: of all ranks."""
        # They are fetched once, at the end: for every number that is asked for earlier a GPU would run out of work, as it does
        # once a row already, where the head asks which positions predict.
        names = ("loss", "entropy_sum", *STEP_SUMS)
        found = {name: torch.zeros((), dtype=torch.float64, device=device.device()) for name in names}
        learning_rate = float(self.scheduler.get_last_lr()[0])
        for number, (row, old_BT) in enumerate(zip(rows, old, strict=True), start=1):
            row = row.to(device.device())
            ref_BT = self._reference_logprobs(row) if self.spec.loss.beta != 0.0 else None
            logprobs_BT, entropy_BT = model.completion_logprobs(self.shared.model, row)
            weights_B = token_weights(
                row.mask_BT.sum(-1), sequences=int(counts["sequences"]), tokens=int(counts["tokens"]), spec=self.spec.loss
            )
            out = grpo_loss(
                logprobs_BT,
                logprobs_BT.detach() if old_BT is None else old_BT,
                row.rollout_logprobs_BT,
                ref_BT,
                row.advantages_B,
                row.mask_BT,
                weights_B,
                self.spec.loss,
            )
            self.shared.backward(out.loss, last=number == len(rows))
            found["loss"] += out.loss.detach()
            found["entropy_sum"] += (entropy_BT * row.mask_BT).sum()
            for name in STEP_SUMS:
                found[name] += getattr(out, name)
        sums = self.shared.total(dict(zip(names, torch.stack([*found.values()]).tolist(), strict=True)))
        grad_norm = 0.0
        if counts["trained_completions"]:
            grad_norm = self.shared.step(self.spec.optimizer.max_grad_norm, sums["loss"])
        finite = math.isfinite(grad_norm) and math.isfinite(sums["loss"])
        self.scheduler.step()  # the schedule counts steps of the job, also those that had nothing to learn
        return {**sums, "grad_norm": grad_norm, "learning_rate": learning_rate, "left_out": not finite}

    def publish(self) -> Iterator[Bucket | SnapshotHeader]:
        """The current policy: its buckets, and then their header, each an object of the store of which the driver fetches the
        last. To be called with as many returns.

        Rank 0 alone has what was gathered; buckets of other ranks are empty. A bucket is returned rather than put, since what
        an actor puts dies with it. The next one is written over it: the store has a copy, and whoever calls without Ray takes
        one.
        """
        entries: list[TensorEntry] = []
        digests = []
        nbytes = 0
        for number, names in enumerate(self.buckets):
            tensors = self.shared.whole(names)
            found, bucket, digest = snapshot.pack(tensors if self.rank.rank == 0 else {}, self.buffer, number)
            if self.buffer is None or bucket.nbytes > self.buffer.nbytes:
                self.buffer = bucket
            entries += found
            digests.append(digest)
            nbytes += bucket.nbytes
            yield bucket
        self.policy.eval()
        probe_logprobs = tuple(self.shared.sequence_logprobs(self.probe))
        if self.spec.shares_gpu:
            device.release_cache()  # of what was gathered
        rank, scaling = model.rank_and_scaling(self.spec.lora)
        yield SnapshotHeader(
            version=self.version,
            base_model=self.spec.model.name,
            rank=rank,
            scaling=scaling,
            entries=tuple(entries),
            nbytes=nbytes,
            digest=snapshot.joined(digests),
            probe_logprobs=probe_logprobs,
        )

    def save_policy(self, folder: str) -> None:
        """The adapter as PEFT writes it, loadable by PeftModel.from_pretrained; without LoRA the model and its tokenizer, as
        transformers write them.
        """
        tensors: dict[str, Tensor] = {}
        for names in self.buckets:
            for name, tensor in self.shared.whole(names).items():
                if self.rank.rank == 0:
                    tensors[name] = tensor.cpu().contiguous()
        if self.spec.shares_gpu:
            device.release_cache()
        if self.rank.rank != 0:
            return
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        if self.spec.lora is None or self.spec.model.chat_template is not None:  # else the tokenizer is the base model's own
            model.load_tokenizer(self.spec.model).save_pretrained(folder)
        if self.spec.lora is None:
            self.policy.config.use_cache = True  # whoever loads it samples from it
            self.policy.save_pretrained(folder, state_dict=tensors)
            self.policy.config.use_cache = False
            return
        config = copy(self.policy.peft_config["default"])  # as PEFT resolved it: the modules by name
        config.base_model_name_or_path = self.spec.model.name
        config.inference_mode = True
        save_file(tensors, path / adapter.WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(folder)

    def save(self, folder: str, *older: Any) -> None:
        """Writes all that a resumed trainer needs; `older` are policies still sampling, each its header and its buckets."""
        path = Path(folder)
        self.save_policy(folder)
        path.mkdir(parents=True, exist_ok=True)  # another rank may be here first
        self.shared.save_state(path, self.rank.rank)
        save_file(device.rng_state(), path / RNG_FILE.format(rank=self.rank.rank))
        if self.rank.rank != 0:
            return
        state = {"version": self.version, "scheduler": self.scheduler.state_dict(), "older": []}
        for part in older:
            if isinstance(part, SnapshotHeader):
                header, number = part, 0
                state["older"].append(asdict(header))
            else:
                file = OLDER_FILE.format(version=header.version, bucket=number)
                save_file({"bucket": torch.tensor(part)}, path / file)
                number += 1
        (path / TRAINER_FILE).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, folder: str) -> list[tuple[Any, ...]]:
        """Goes back to a saved state; rank 0 returns the older policies that were sampling then, oldest first, each its header
        and its buckets.
        """
        path = Path(folder)
        files = [path / adapter.WEIGHTS_FILE] if self.spec.lora else sorted(path.glob("model*.safetensors"))
        self.shared.load(files)
        state = json.loads((path / TRAINER_FILE).read_text(encoding="utf-8"))
        self.shared.load_state(path, self.rank.rank)
        device.set_rng_state(load_file(path / RNG_FILE.format(rank=self.rank.rank)))
        load_schedule(self.scheduler, state["scheduler"])
        self.version = state["version"]
        older: list[tuple[Any, ...]] = []
        if self.rank.rank != 0:
            return older
        for saved_header in state["older"]:
            entries = tuple(TensorEntry(**{**e, "shape": tuple(e["shape"])}) for e in saved_header["entries"])
            probe = tuple(saved_header["probe_logprobs"])
            header = SnapshotHeader(**{**saved_header, "entries": entries, "probe_logprobs": probe})
            files = [path / OLDER_FILE.format(version=header.version, bucket=b) for b in {e.bucket: None for e in entries}]
            older.append((header, *(load_file(file)["bucket"].numpy() for file in files)))
        return older


def _optimizer(parameters: list[Any], spec: OptimizerSpec) -> torch.optim.Optimizer:
    """AdamW, which as in transformers lets no norm and no bias decay."""
    wide = [len(getattr(p, "ds_shape", p.shape)) > 1 for p in parameters]  # DeepSpeed's name for the shape before it is cut
    groups: list[dict[str, Any]] = [
        {"params": [p for p, decays in zip(parameters, wide, strict=True) if decays]},
        {"params": [p for p, decays in zip(parameters, wide, strict=True) if not decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=spec.learning_rate,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        fused=spec.fused,
    )


def _schedule(optimizer: Any, spec: OptimizerSpec) -> Any:
    from transformers import get_scheduler

    return get_scheduler(spec.scheduler, optimizer, spec.warmup_steps, spec.total_steps)
