"""The actor that samples: one vLLM engine in this process, the policies it serves, and their proofs.

An engine is one job's, or it is shared: jobs then come and go, each with a policy of its own name in a LoRA slot, and take
turns (turns.py). Groups are sampled side by side. A job's driver installs a version before it asks for it, and when nothing of
its own is sampled. A new way to install a snapshot goes into install.py and into `_place` here.
"""

import asyncio
import itertools
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from actors import device, hub, model, snapshot
from actors.chat import prompt_token_ids
from actors.conversation import RolloutFunction, Speaker
from actors.decoder import Decoder, group_of, sampling_params
from actors.errors import SyncError
from actors.install import BaseWeights
from actors.policy import Installed, Policy, current_task
from actors.snapshot import Bucket
from actors.specs import OWN, EngineSpec, LoraSpec, SamplingSpec
from actors.turns import Turns
from actors.types import InstallReceipt, RolloutGroup, RolloutHeader, SnapshotHeader, TensorEntry

CPU_BLOCK_TOKENS = 32  # vLLM takes 128 on a CPU: most prompts fill no such block, and only full ones are cached


class RolloutEngine:
    """One engine. Made into a Ray actor by the driver; usable as it is in a test."""

    def __init__(self, spec: EngineSpec, probe: Sequence[int] | None) -> None:
        """probe: of the job whose engine this is; None = it is shared by jobs, which `open` and `close` their policies."""
        from vllm import LLM

        device.seed_everything(spec.seed)
        self.spec = spec
        self.rollout_function = RolloutFunction(spec.rollout_function) if spec.rollout_function else None
        folder = hub.resolve(spec.model.name)
        self.base = BaseWeights(folder, model.quantized_weights(spec.model), spec.model.quantization)
        self.policies = {} if probe is None else {OWN: Policy(spec.model, spec.lora, probe)}
        self.places = asyncio.Semaphore(spec.policies - len(self.policies))
        self.opening: dict[str, asyncio.Task[Any]] = {}  # policies that wait for a place
        self.turns = Turns(2 * spec.max_num_seqs)  # as many wait in vLLM's queue as it decodes
        # No slot is used twice: vLLM keys adapters and prefix cache on it, and would serve what it had there.
        self.slots = itertools.count(1)
        lora: dict[str, Any] = {}
        if spec.sync == "adapter" and spec.lora:
            # One slot more than policies: a new version is proven before the one that it replaces leaves.
            slots = spec.policies + 1
            lora = {"enable_lora": True, "max_lora_rank": max(spec.lora.r, 8), "max_loras": slots, "max_cpu_loras": slots}
            # Nowhere else, above all not at the head: with LoRA there vLLM can compute no probe beside groups.
            lora["lora_target_modules"] = Policy(spec.model, spec.lora, ()).modules
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
            # Of a prompt that is cut in two vLLM turns a seeded generator back, which torch's for CPUs cannot do.
            enable_chunked_prefill=None if device.has_gpu() else False,
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
        self.decoder = Decoder(self.llm.llm_engine, spec.max_num_seqs)
        self.tokenizer = self.llm.get_tokenizer()
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

    async def open(self, policy: str, lora: LoraSpec, probe: Sequence[int]) -> None:
        """Takes a job's policy in, once one of the places is free; what had its name before is closed."""
        await self.close(policy)
        opened = Policy(self.spec.model, lora, probe)
        task = self.opening[policy] = current_task()
        try:
            await self.places.acquire()
            self.policies[policy] = opened
        finally:
            if self.opening.get(policy) is task:  # else it was opened anew while it waited
                del self.opening[policy]

    async def close(self, policy: str) -> None:
        """Ends what is sampled for a job, and frees its place; of a name that is not there, does nothing."""
        if policy in self.opening:
            self.opening[policy].cancel()
        closed = self.policies.pop(policy, None)
        if closed is None:
            return
        closed.open = False
        under_way = [*closed.groups, *closed.installs]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        if closed.installed:
            self._worker("eagleray_remove_adapter", closed.installed.slot)
        self.places.release()

    async def install(self, header: SnapshotHeader, *buckets: Bucket, policy: str = OWN) -> InstallReceipt:
        """Serves a published version from now on, and says what its probe gives.

        Raises SyncError when the snapshot is not whole or does not fit, and while groups of this policy are sampled. What was
        served before is then served still, exactly.
        """
        started = time.perf_counter()
        served = self._policy(policy)
        if served.groups:
            raise SyncError(f"policy version {header.version} came while {len(served.groups)} groups are sampled")
        digest = snapshot.validate(
            header,
            buckets,
            served.expected,
            base_model=self.spec.model.name,
            rank=served.rank,
            scaling=served.scaling,
        )
        self._replace(served, Installed(header, buckets, next(self.slots)))
        with served.busy(served.installs):
            probe = tuple(await self.probe_logprobs(policy))
        return InstallReceipt(header.version, digest, probe, time.perf_counter() - started)

    def _replace(self, policy: Policy, new: Installed) -> None:
        version, old = new.header.version, policy.installed
        try:
            self._place(policy, new)
        except Exception as error:  # vLLM raises many kinds; whichever it is, the old version must be served again
            try:
                self._put_back(policy, new.slot)
            except Exception as second:
                raise SyncError(
                    f"policy version {version} could not be installed ({type(error).__name__}: {error}), and what "
                    f"was served before could not be put back ({type(second).__name__}: {second}); start the job anew"
                ) from error
            raise SyncError(
                f"policy version {version} could not be installed ({type(error).__name__}: {error}); "
                f"the engine serves version {policy.version} as before"
            ) from error
        policy.installed = new
        if old and self.spec.sync == "adapter":
            self._worker("eagleray_remove_adapter", old.slot)

    def _place(self, policy: Policy, new: Installed) -> None:
        if policy.lora is None:
            self._load(new.header.entries, new.buckets)
        elif self.spec.sync == "fused":
            self._fuse(new.header.entries, new.buckets, new.header.scaling)
        else:
            config = model.peft_config(policy.lora).to_dict()
            config["target_modules"] = policy.modules
            self._worker("eagleray_add_adapter", new.slot, new.header.entries, new.buckets, config)

    def _put_back(self, policy: Policy, failed_slot: int) -> None:
        if self.spec.sync == "adapter":
            self._worker("eagleray_remove_adapter", failed_slot)
        elif policy.installed:
            self._place(policy, policy.installed)
        else:
            self._fuse((), (), 0.0)
            if policy.lora is None:
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

    def _policy(self, name: str) -> Policy:
        if name not in self.policies:
            raise SyncError(f"this engine serves no policy of the name {name!r}: it was closed, or never opened")
        return self.policies[name]

    def _lora_request(self, policy: Policy) -> Any:
        if self.spec.sync != "adapter" or policy.installed is None:
            return None
        from vllm.lora.request import LoRARequest

        # vLLM keys its prefix cache on name and path; the path is never read, since the slot is loaded already.
        slot = policy.installed.slot
        return LoRARequest(f"slot-{slot}", slot, f"object-store/{slot}")

    async def probe_logprobs(self, policy: str = OWN) -> list[float]:
        """log p(token | tokens before it) of the policy's probe under the version that is served, at temperature 1."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        served = self._policy(policy)
        output = await self.decoder.output(served.probe, params, self._lora_request(served))
        return [at[token].logprob for at, token in zip(output.prompt_logprobs[1:], served.probe[1:], strict=True)]

    async def sample(
        self,
        prompt: Any,
        sampling: SamplingSpec,
        seed: int,
        version: int | None = None,
        columns: Mapping[str, Any] | None = None,
        policy: str = OWN,
    ) -> tuple[RolloutHeader, RolloutGroup]:
        """Samples `num_generations` completions of one prompt, to be called with two returns.

        prompt: chat messages (a list) or plain text (a str). seed decides the draws, whatever else is sampled beside them:
        the same seed, prompt and policy give the same completions. version: None = the one that is served. columns: the row's,
        for the rollout function. Raises SyncError for a version that this engine does not serve.
        """
        served = self._policy(policy)
        if version not in (None, served.version):
            raise SyncError(f"policy version {version} was asked for, served is {served.version}")
        self.decoder.expect_more()
        started = time.perf_counter()
        with served.busy(served.groups):
            async with self.turns.group(policy, sampling.num_generations):
                group, failure = await self._completions(prompt, sampling, seed, served, columns or {})
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
        self, prompt: Any, sampling: SamplingSpec, seed: int, policy: Policy, columns: Mapping[str, Any]
    ) -> tuple[RolloutGroup, str | None]:
        """A group, and why the rollout function failed on it."""
        version, lora = policy.version or 0, self._lora_request(policy)
        if self.rollout_function is None:
            params = sampling_params(sampling, seed)
            output = await self.decoder.output(self.token_ids(prompt), params, lora)
            return group_of(output, version, self.tokenizer, params), None
        output = partial(self.decoder.output, lora_request=lora)
        speaker = Speaker(self.tokenizer, self.spec.chat_template_kwargs, sampling, sampling_params, output)
        return await self.rollout_function.group(speaker, prompt, columns, seed, version)

    def token_ids(self, prompt: Any) -> list[int]:
        """A prompt's tokens, with the chat template where it is a conversation."""
        return prompt_token_ids(self.tokenizer, prompt, self.spec.chat_template_kwargs)
