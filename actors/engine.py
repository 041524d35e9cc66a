"""The actor that samples: one vLLM engine in this process, the policy versions it serves, and their proofs.

Groups are sampled side by side, each with the version that its call names. The driver installs a version before it asks for
it, and when nothing is sampled. A new way to install a snapshot goes into install.py and into `_place` here.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from actors import device, hub, model, snapshot
from actors.chat import prompt_token_ids
from actors.conversation import RolloutFunction, Speaker
from actors.decoder import Decoder, sampling_params
from actors.errors import SyncError
from actors.install import BaseWeights
from actors.snapshot import Bucket
from actors.specs import EngineSpec, SamplingSpec
from actors.types import InstallReceipt, RolloutGroup, RolloutHeader, SnapshotHeader, TensorEntry

CPU_BLOCK_TOKENS = 32  # vLLM takes 128 on a CPU: most prompts fill no such block, and only full ones are cached


@dataclass(frozen=True)
class Installed:
    """A policy that this engine holds."""

    header: SnapshotHeader
    buckets: tuple[Bucket, ...]
    slot: int  # vLLM's LoRA id when sync is adapter


class RolloutEngine:
    """One engine. Made into a Ray actor by the driver; usable as it is in a test."""

    def __init__(self, spec: EngineSpec, probe: Sequence[int]) -> None:
        from vllm import LLM

        device.seed_everything(spec.seed)
        self.spec = spec
        self.rollout_function = RolloutFunction(spec.rollout_function) if spec.rollout_function else None
        self.probe = list(probe)
        folder = hub.resolve(spec.model.name)
        self.base = BaseWeights(folder, model.quantized_weights(spec.model), spec.model.quantization)
        self.expected = model.expected_shapes(spec.model, spec.lora)
        self.rank, self.scaling = model.rank_and_scaling(spec.lora)
        self.installed: dict[int, Installed] = {}  # by version, latest install last; that one is served
        # No slot is used twice: vLLM keys adapters and prefix cache on it, and would serve what it had there.
        self.slots = itertools.count(1)
        lora: dict[str, Any] = {}
        if spec.sync == "adapter" and spec.lora:
            # One slot more than versions: the new one is proven before the oldest leaves.
            slots = spec.policies + 1
            lora = {"enable_lora": True, "max_lora_rank": max(spec.lora.r, 8), "max_loras": slots}
            lora["max_cpu_loras"] = slots
        self.llm = LLM(
            folder,
            tokenizer=spec.tokenizer,
            dtype=spec.model.dtype,
            trust_remote_code=spec.model.trust_remote_code,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.max_num_seqs,
            gpu_memory_utilization=spec.gpu_memory_utilization,
            enforce_eager=spec.enforce_eager or not device.has_gpu(),
            enable_prefix_caching=spec.enable_prefix_caching,
            block_size=None if device.has_gpu() else CPU_BLOCK_TOKENS,
            logprobs_mode="processed_logprobs",
            worker_extension_cls="actors.install.PolicyInstaller",
            tensor_parallel_size=spec.tensor_parallel,
            # vLLM would take Ray's own executor, whose bundles this actor has already.
            distributed_executor_backend="mp" if spec.tensor_parallel > 1 else None,
            enable_sleep_mode=spec.sleeps and device.has_gpu(),
            seed=spec.seed,
            disable_log_stats=True,
            **lora,
        )
        self.decoder = Decoder(self.llm.llm_engine)
        self.tokenizer = self.llm.get_tokenizer()
        self.sampling = 0  # groups, now
        self.asleep = False

    def __repr__(self) -> str:  # what the dashboard and Ray's logs call it
        return f"engine of {self.spec.model.name}, sync {self.spec.sync}"

    def ready(self) -> None:
        """Returns once the engine can take calls."""

    def sleep(self) -> float:
        """Leaves the GPU to the trainer until `wake`; the weights wait in host memory. Returns the GPU's free GiB.

        On a CPU there is nothing to leave.
        """
        if device.has_gpu() and not self.asleep:
            self.llm.sleep(level=1)  # level 2 would drop the weights
        self.asleep = True
        return device.free_gib()

    def wake(self) -> float:
        """Takes the GPU again. Returns its free GiB."""
        if device.has_gpu() and self.asleep:
            self.llm.wake_up()
        self.asleep = False
        return device.free_gib()

    async def install(self, header: SnapshotHeader, *buckets: Bucket) -> InstallReceipt:
        """Serves a published policy from now on, and says what its probe gives.

        Raises SyncError when the snapshot is not whole or does not fit, and while groups are sampled: weights would change
        under them, and vLLM's LoRA layers cannot compute a probe beside them. What was served before is then served still,
        exactly.
        """
        started = time.perf_counter()
        if self.sampling:
            raise SyncError(f"policy version {header.version} came while {self.sampling} groups are sampled")
        digest = snapshot.validate(
            header,
            buckets,
            self.expected,
            base_model=self.spec.model.name,
            rank=self.rank,
            scaling=self.scaling,
        )
        new = Installed(header, buckets, next(self.slots))
        try:
            self._place(new)
        except Exception as error:  # vLLM raises many kinds; whichever it is, the old policy must be served again
            try:
                self._put_back(new.slot)
            except Exception as second:
                raise SyncError(
                    f"policy version {header.version} could not be installed ({type(error).__name__}: {error}), and what "
                    f"was served before could not be put back ({type(second).__name__}: {second}); start the job anew"
                ) from error
            raise SyncError(
                f"policy version {header.version} could not be installed ({type(error).__name__}: {error}); "
                f"the engine serves version {self.version} as before"
            ) from error
        # A version may come again: an older one, or one trained anew from a checkpoint.
        replaced = self.installed.pop(header.version, None)
        self.installed[header.version] = new
        gone = [replaced] if replaced else []
        while len(self.installed) > self.spec.policies:
            gone.append(self.installed.pop(next(iter(self.installed))))
        if self.spec.sync == "adapter":
            for old in gone:
                self._worker("eagleray_remove_adapter", old.slot)
        probe = tuple(await self.probe_logprobs())
        return InstallReceipt(header.version, digest, probe, time.perf_counter() - started)

    @property
    def version(self) -> int | None:
        """The version installed last; None = the base model, before the first install."""
        return next(reversed(self.installed), None)

    def _place(self, policy: Installed) -> None:
        if self.spec.lora is None:
            self._load(policy.header.entries, policy.buckets)
        elif self.spec.sync == "fused":
            self._fuse(policy.header.entries, policy.buckets, policy.header.scaling)
        else:
            config = model.peft_config(self.spec.lora).to_dict()
            config["target_modules"] = sorted({n.split(".")[-3] for n in self.expected})
            self._worker("eagleray_add_adapter", policy.slot, policy.header.entries, policy.buckets, config)

    def _put_back(self, failed_slot: int) -> None:
        if self.spec.sync == "adapter":
            self._worker("eagleray_remove_adapter", failed_slot)
        elif self.version is not None:
            self._place(self.installed[self.version])
        else:
            self._fuse((), (), 0.0)
            if self.spec.lora is None:
                self._worker("eagleray_pack_heads")

    def _load(self, entries: Sequence[TensorEntry], buckets: Sequence[Bucket]) -> None:
        """Bucket by bucket, so that what goes to the workers of a tensor parallel engine is never all of it at once."""
        self._worker("eagleray_begin")
        try:
            for number, bucket in enumerate(buckets):
                self._worker("eagleray_load", snapshot.entries_of(entries, number), bucket)
        finally:
            self._worker("eagleray_finish")  # on all workers, also when one of them failed
        self._worker("eagleray_pack_heads")
        self.llm.reset_prefix_cache()

    def _fuse(self, entries: Sequence[TensorEntry], buckets: Sequence[Bucket], scaling: float) -> None:
        self._worker("eagleray_fuse", self.base, entries, buckets, scaling)
        self.llm.reset_prefix_cache()  # its blocks hold the old policy's keys and values

    def _worker(self, method: str, *args: Any) -> None:
        self.llm.collective_rpc(method, args=args)

    def _lora_request(self, version: int | None) -> Any:
        if self.spec.sync != "adapter" or version is None:
            return None
        from vllm.lora.request import LoRARequest

        # vLLM keys its prefix cache on name and path; the path is never read, since the slot is loaded already.
        slot = self.installed[version].slot
        return LoRARequest(f"policy-{version}", slot, f"object-store/{slot}")

    async def probe_logprobs(self) -> list[float]:
        """log p(token | tokens before it) of the probe under the version installed last, at temperature 1."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        output = await self.decoder.output(self.probe, params, self._lora_request(self.version))
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], self.probe[1:], strict=True)]

    async def sample(
        self,
        prompt: Any,
        sampling: SamplingSpec,
        seed: int,
        version: int | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> tuple[RolloutHeader, RolloutGroup]:
        """Samples `num_generations` completions of one prompt, to be called with two returns.

        prompt: chat messages (a list) or plain text (a str). seed decides the draws, whatever else is sampled beside them:
        the same seed, prompt and policy give the same completions. version: None = that installed last. columns: the row's,
        for the rollout function. Raises SyncError for a version that this engine does not serve.
        """
        version = self.version if version is None else version
        # Weights in the model itself are one version's, of slots there are several.
        served = self.installed if self.spec.sync == "adapter" else [self.version]
        if version is not None and version not in served:
            raise SyncError(f"policy version {version} was asked for, served is {self.version}")
        started = time.perf_counter()
        self.sampling += 1
        try:
            group, failure = await self._completions(prompt, sampling, seed, version, columns or {})
        finally:
            self.sampling -= 1
        header = RolloutHeader(
            policy_version=group.policy_version,
            prompt_tokens=len(group.prompt_ids),
            completion_tokens=tuple(len(ids) for ids in group.completion_ids),
            written_tokens=tuple(int(group.written_by_model(i).sum()) for i in range(len(group.texts))),
            truncated=group.truncated,
            seconds=time.perf_counter() - started,
            failure=failure,
        )
        return header, group

    async def _completions(
        self, prompt: Any, sampling: SamplingSpec, seed: int, version: int | None, columns: Mapping[str, Any]
    ) -> tuple[RolloutGroup, str | None]:
        """A group, and why the rollout function failed on it."""
        lora = self._lora_request(version)
        if self.rollout_function is None:
            output = await self.decoder.output(self.token_ids(prompt), sampling_params(sampling, seed), lora)
            return _group(output, version or 0), None
        output = partial(self.decoder.output, lora_request=lora)
        speaker = Speaker(self.tokenizer, self.spec.chat_template_kwargs, sampling, sampling_params, output)
        return await self.rollout_function.group(speaker, prompt, columns, seed, version or 0)

    def token_ids(self, prompt: Any) -> list[int]:
        """A prompt's tokens, with the chat template where it is a conversation."""
        return prompt_token_ids(self.tokenizer, prompt, self.spec.chat_template_kwargs)


def _group(output: Any, version: int) -> RolloutGroup:
    """Of vLLM's RequestOutput."""
    ids, logprobs = [], []
    for completion in output.outputs:
        tokens = list(completion.token_ids)
        ids.append(np.array(tokens, dtype=np.int32))
        chosen = [at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)]
        logprobs.append(np.array(chosen, dtype=np.float32))
    return RolloutGroup(
        policy_version=version,
        prompt_ids=np.array(output.prompt_token_ids, dtype=np.int32),
        completion_ids=tuple(ids),
        logprobs=tuple(logprobs),
        truncated=tuple(completion.finish_reason == "length" for completion in output.outputs),
        texts=tuple(completion.text for completion in output.outputs),
    )
