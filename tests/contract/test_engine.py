"""What every way to install a policy into vLLM must keep, with the real engine and model.

The references are transformers and PEFT: the adapter merged into the weights for `fused`, left beside them for `adapter`, and
for `weights` the saved model. A new way to install is a name in SYNCS and its reference in `reference`.
"""

import asyncio
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForCausalLM

from actors import decoder, device, hub, install, model, snapshot
from actors.conversation import Conversation, RolloutFunction
from actors.engine import RolloutEngine
from actors.errors import SyncError
from actors.packing import Sample, pack_row
from actors.specs import OWN, EngineSpec, LoraSpec, LossSpec, OptimizerSpec, RolloutFunctionSpec, SamplingSpec, TrainerSpec
from actors.trainer import Trainer
from actors.types import InstallReceipt, RolloutGroup, RolloutHeader, SnapshotHeader
from tests.tiny import SMOLLM2, fill_adapter, published

SYNCS = ("fused", "adapter", "weights")
LORA = LoraSpec(8, 16)
OTHERS_LORA = LoraSpec(4, 4)
ADAPTER_SIZE = 0.015  # of B's elements: enough to change answers, too little to break the model
WEIGHTS_SIZE = 0.05  # share of itself that every weight is moved by
BUCKET_BYTES = 2**26  # a ninth of the model
PROBE = [1, 504, 338, 260, 3575, 282, 4649, 47, 378, 3575, 314, 7042, 30, 198, 788, 1]
NEW_TOKENS = 12
TEMPERATURE = 0.7  # not 1: trainer and engine must both apply it
# fp32 on both sides, in other orders of summation through 30 layers.
LOGPROB_TOLERANCE = 2e-3
PROMPTS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write one sentence about the sea."}],
    "Once upon a time there was",
]
LONG_PROMPT = "The cat sat on the mat and looked at the moon. " * 14  # longer than a block of the prefix cache

Snapshot = tuple[Any, ...]  # header, buckets


@dataclass(frozen=True)
class Policies:
    """A trainer, and three versions that it published: 0 is the base, 1 and 2 are moved at random."""

    trainer: Trainer
    snapshots: tuple[Snapshot, ...]
    folder: Path  # adapters as PEFT reads them, or models, one folder a version

    def base(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(hub.resolve(SMOLLM2.name), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return made(LORA, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    return made(None, tmp_path_factory.mktemp("models"))


def made(lora: LoraSpec | None, folder: Path) -> Policies:
    optimizer = OptimizerSpec(1e-4, "constant", 0, 10)
    spec = TrainerSpec(
        SMOLLM2, lora, optimizer, LossSpec(), micro_batch_size=8, temperature=TEMPERATURE, bucket_bytes=BUCKET_BYTES
    )
    trainer = Trainer(spec)
    trainer.set_probe(PROBE)
    snapshots = []
    for version in range(3):
        if version and lora:
            fill_adapter(trainer.policy, seed=version, size=ADAPTER_SIZE)
        elif version:
            move_weights(trainer.policy, seed=version)
        trainer.version = version
        snapshots.append(published(trainer))
        trainer.save_policy(str(folder / str(version)))
    return Policies(trainer, tuple(snapshots), folder)


def move_weights(policy: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1 + WEIGHTS_SIZE * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module", params=SYNCS)
def engine(request: pytest.FixtureRequest) -> Iterator[RolloutEngine]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    lora = None if request.param == "weights" else LORA
    jobs = 2 if request.param == "adapter" else 1
    spec = EngineSpec(SMOLLM2, lora, request.param, max_model_len=256, max_num_seqs=16, policies=jobs)
    engine = RolloutEngine(spec, PROBE)
    yield engine
    engine.llm.llm_engine.engine_core.shutdown()
    del engine.llm
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def policies(engine: RolloutEngine, request: pytest.FixtureRequest) -> Policies:
    """What this engine can install."""
    found: Policies = request.getfixturevalue("adapters" if engine.spec.lora else "models")
    return found


@pytest.fixture(scope="module")
def untouched(engine: RolloutEngine) -> tuple[list[float], list[list[int]]]:
    """Probe and greedy answers of an engine that has installed nothing. Asked for by the first test."""
    assert version_of(engine) is None
    return probed(engine), greedy(engine)


def sampled(
    engine: RolloutEngine, prompts: Sequence[Any], sampling: SamplingSpec, seed: int
) -> list[tuple[RolloutHeader, RolloutGroup]]:
    """Groups that are decoded side by side."""

    async def together() -> list[tuple[RolloutHeader, RolloutGroup]]:
        return await asyncio.gather(*(engine.sample(p, sampling, seed + 1000 * i) for i, p in enumerate(prompts)))

    return asyncio.run(together())


def installed(engine: RolloutEngine, header: SnapshotHeader, *buckets: Any) -> InstallReceipt:
    return asyncio.run(engine.install(header, *buckets))


def version_of(engine: RolloutEngine) -> int | None:
    return engine.policies[OWN].version


def probed(engine: RolloutEngine) -> list[float]:
    return asyncio.run(engine.probe_logprobs())


def greedy(engine: RolloutEngine) -> list[list[int]]:
    answers = sampled(engine, PROMPTS, SamplingSpec(1, NEW_TOKENS, temperature=0.0), seed=0)
    return [group.completion_ids[0].tolist() for _, group in answers]


def transformers_greedy(reference: Any, engine: RolloutEngine) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([engine.token_ids(prompt)])
        out = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


def reference(policies: Policies, version: int, sync: str) -> Any:
    """What PEFT makes of the adapter's files: merged into the base, or beside it. Or the saved model."""
    if sync == "weights":
        return AutoModelForCausalLM.from_pretrained(policies.folder / str(version), dtype=torch.float32).eval()
    loaded = PeftModel.from_pretrained(policies.base(), policies.folder / str(version)).eval()
    return loaded.merge_and_unload() if sync == "fused" else loaded


def slots(engine: RolloutEngine) -> set[int]:
    (found,) = engine.llm.collective_rpc(lambda worker: worker.model_runner.lora_manager.list_adapters())
    return set(found)


def fails_once(function: Callable[..., Any], after: int) -> Callable[..., Any]:
    """`function`, but its call number `after` raises, and no other."""
    calls = 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            raise MemoryError("no room")
        return function(*args, **kwargs)

    return wrapper


def break_install(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Makes the next install fail: before it changed anything, or with half of the layers changed."""
    if engine.spec.sync != "adapter":
        after = {"first": 1, "half way": 150}[where]  # of 272 weights
        load = install.PolicyInstaller._load
        count = itertools.count(1)

        def breaking(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
            def until_it_breaks() -> Iterator[tuple[str, torch.Tensor]]:
                for item in weights:
                    if next(count) == after:
                        raise MemoryError("no room")
                    yield item

            load(worker, until_it_breaks())

        monkeypatch.setattr(install.PolicyInstaller, "_load", breaking)
    elif where == "first":
        from vllm.lora.lora_model import LoRAModel

        monkeypatch.setattr(LoRAModel, "from_lora_tensors", fails_once(LoRAModel.from_lora_tensors, 1))
    else:
        from vllm.lora.layers import MergedQKVParallelLinearWithLoRA as Layer

        monkeypatch.setattr(Layer, "set_lora", fails_once(Layer.set_lora, 15))  # of 30 layers


def test_before_any_install_the_base_answers(
    engine: RolloutEngine, policies: Policies, untouched: tuple[list[float], list[list[int]]]
) -> None:
    probe, answers = untouched
    assert answers == transformers_greedy(policies.base(), engine)
    assert probe == pytest.approx(model.sequence_logprobs(policies.base(), PROBE), abs=LOGPROB_TOLERANCE)


def test_groups_that_are_asked_for_at_once_are_decoded_at_once(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "COMING_S", 1.0)
    own = engine.llm.llm_engine
    step = own.step
    decoded = []

    def counting() -> Any:
        decoded.append(own.get_num_unfinished_requests())
        return step()

    monkeypatch.setattr(own, "step", counting)

    async def asked(after: float) -> None:
        await asyncio.sleep(after)
        await engine.sample(PROMPTS[0], SamplingSpec(2, 4), 7)

    async def together() -> None:
        await asyncio.gather(*(asked(0.1 * index) for index in range(3)))

    asyncio.run(together())
    assert decoded[0] == 6
    monkeypatch.setattr(decoder, "COMING_S", 3600.0)
    full = engine.sample(PROMPTS[0], SamplingSpec(engine.spec.max_num_seqs, 4), 7)
    asyncio.run(asyncio.wait_for(full, timeout=60))


def test_weights_are_written_over_others_only_where_every_layer_computes_with_what_it_loads(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where vLLM packs nothing."""
    if engine.spec.sync == "adapter":
        pytest.skip("its weights are loaded once")
    served = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    assert not install.serves_as_loaded(served)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    assert install.serves_as_loaded(served)
    layer = served.model.layers[3]
    with monkeypatch.context() as other:
        method = layer.mlp.down_proj.quant_method
        other.setattr(layer.mlp.down_proj, "quant_method", type("Packing", (type(method),), {})())
        assert not install.serves_as_loaded(served), "a method that this one only builds on"
    with monkeypatch.context() as other:
        kind = type(layer.self_attn.attn.impl)
        packing = type("Packing", (kind,), {"process_weights_after_loading": print})
        other.setattr(layer.self_attn.attn, "impl", packing.__new__(packing))
        assert not install.serves_as_loaded(served), "attention that makes something of its own"
    with monkeypatch.context() as other:
        other.setattr(layer.input_layernorm, "process_weights_after_loading", print, raising=False)
        assert not install.serves_as_loaded(served), "a layer that makes something of its own"
    assert install.serves_as_loaded(served)


@pytest.mark.parametrize("where", ["first", "half way"])
def test_a_first_install_that_fails_leaves_the_base(
    engine: RolloutEngine,
    policies: Policies,
    untouched: tuple[list[float], list[list[int]]],
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    break_install(engine, monkeypatch, where)
    with pytest.raises(SyncError, match=r"version 1 could not be installed \(MemoryError: no room\)"):
        installed(engine, *policies.snapshots[1])
    assert version_of(engine) is None
    assert (probed(engine), greedy(engine)) == untouched


def test_version_0_is_the_base(
    engine: RolloutEngine, policies: Policies, untouched: tuple[list[float], list[list[int]]]
) -> None:
    header, *buckets = policies.snapshots[0]
    receipt = installed(engine, header, *buckets)
    assert (receipt.version, receipt.digest, version_of(engine)) == (0, header.digest, 0)
    assert receipt.probe_logprobs == pytest.approx(untouched[0], abs=1e-6)
    assert greedy(engine) == untouched[1]


@pytest.mark.parametrize("version", [1, 2])
def test_an_installed_policy_answers_as_peft_does(
    engine: RolloutEngine, policies: Policies, untouched: tuple[list[float], list[list[int]]], version: int
) -> None:
    header, *buckets = policies.snapshots[version]
    receipt = installed(engine, header, *buckets)
    expected = reference(policies, version, engine.spec.sync)
    answers = greedy(engine)
    assert answers == transformers_greedy(expected, engine)
    assert answers != untouched[1], "the adapter changes no answer, so the test proves nothing"
    assert (receipt.version, receipt.digest, version_of(engine)) == (version, header.digest, version)
    probe = model.sequence_logprobs(expected, PROBE)
    assert receipt.probe_logprobs == pytest.approx(probe, abs=LOGPROB_TOLERANCE)
    assert receipt.probe_logprobs == pytest.approx(header.probe_logprobs, abs=LOGPROB_TOLERANCE)
    assert np.abs(np.array(probe) - untouched[0]).max() > 100 * LOGPROB_TOLERANCE


def test_the_snapshot_is_not_written_to(engine: RolloutEngine, policies: Policies) -> None:
    header, *buckets = policies.snapshots[1]
    views = [bucket.view() for bucket in buckets]
    for view in views:
        view.flags.writeable = False  # as it comes from the object store
    first, second = installed(engine, header, *views), installed(engine, header, *views)
    assert snapshot.joined([snapshot.digest(bucket) for bucket in buckets]) == header.digest == first.digest
    assert first.probe_logprobs == second.probe_logprobs


def test_an_older_version_comes_back_exactly(engine: RolloutEngine, policies: Policies) -> None:
    first = [installed(engine, *policies.snapshots[version]).probe_logprobs for version in (0, 1, 2)]
    answers = greedy(engine)
    again = {version: installed(engine, *policies.snapshots[version]) for version in (1, 0, 2)}
    for version, receipt in again.items():
        assert (receipt.version, receipt.probe_logprobs) == (version, first[version])
    assert version_of(engine) == 2 and greedy(engine) == answers


def test_a_version_with_other_contents_replaces_its_namesake(engine: RolloutEngine, policies: Policies) -> None:
    """As when a trainer goes back to a checkpoint and trains the same versions anew."""
    second, *buckets = policies.snapshots[2]
    expected = installed(engine, second, *buckets).probe_logprobs
    answers = greedy(engine)
    installed(engine, *policies.snapshots[1])
    assert greedy(engine) != answers
    receipt = installed(engine, replace(second, version=1), *buckets)
    assert (receipt.version, receipt.probe_logprobs, greedy(engine)) == (1, expected, answers)


def with_nan(header: SnapshotHeader, *buckets: NDArray[np.uint8]) -> Snapshot:
    changed = [bucket.copy() for bucket in buckets]
    snapshot.unpack(header.entries, *changed)[header.entries[-1].name].view(-1)[0] = float("nan")
    digest = snapshot.joined([snapshot.digest(bucket) for bucket in changed])
    return replace(header, digest=digest), *changed


def test_a_refused_snapshot_leaves_the_old_policy_exactly(engine: RolloutEngine, policies: Policies) -> None:
    before, answers = installed(engine, *policies.snapshots[1]), greedy(engine)
    with pytest.raises(SyncError, match="holds NaN or infinity"):
        installed(engine, *with_nan(*policies.snapshots[2]))
    with pytest.raises(SyncError, match="bytes arrived of"):
        installed(engine, *policies.snapshots[2][:-1], policies.snapshots[2][-1][:-1])
    assert version_of(engine) == 1
    assert (tuple(probed(engine)), greedy(engine)) == (before.probe_logprobs, answers)


@pytest.mark.parametrize(("where", "next_version"), [("first", 1), ("half way", 2)], ids=["same version", "next version"])
def test_an_install_that_fails_leaves_the_old_policy_exactly(
    engine: RolloutEngine, policies: Policies, monkeypatch: pytest.MonkeyPatch, where: str, next_version: int
) -> None:
    before, answers = installed(engine, *policies.snapshots[1]), greedy(engine)
    break_install(engine, monkeypatch, where)
    header, *buckets = policies.snapshots[2]
    with pytest.raises(SyncError, match="no room.*serves version 1 as before"):
        installed(engine, replace(header, version=next_version), *buckets)
    assert version_of(engine) == 1
    assert (tuple(probed(engine)), greedy(engine)) == (before.probe_logprobs, answers)
    after = installed(engine, header, *buckets)  # and the next one goes in as if nothing had been
    assert after.probe_logprobs == pytest.approx(header.probe_logprobs, abs=LOGPROB_TOLERANCE)


def test_old_slots_are_removed(engine: RolloutEngine, policies: Policies) -> None:
    for version in (0, 1, 2, 2, 1):
        installed(engine, *policies.snapshots[version])
        served = engine.policies[OWN].installed
        assert served is not None and served.header.version == version
        if engine.spec.sync == "adapter":
            assert slots(engine) == {served.slot}


def completions(groups: list[RolloutGroup]) -> list[list[list[int]]]:
    return [[ids.tolist() for ids in group.completion_ids] for group in groups]


def test_the_seed_decides_every_draw(engine: RolloutEngine, policies: Policies) -> None:
    """Whatever is sampled beside it, and whoever was first."""
    installed(engine, *policies.snapshots[1])
    sampling = SamplingSpec(4, NEW_TOKENS)
    found = []
    for seed in (7, 8, 7):
        answers = sampled(engine, PROMPTS, sampling, seed)
        found.append(completions([group for _, group in answers]))
        for header, group in answers:
            assert header.policy_version == group.policy_version == 1
            assert (header.prompt_tokens, header.truncated) == (len(group.prompt_ids), group.truncated)
            assert header.completion_tokens == tuple(map(len, group.completion_ids))
    assert found[0] == found[2] != found[1]
    assert len({tuple(ids) for ids in found[0][2]}) > 1, "the completions of a prompt do not differ"
    alone = sampled(engine, PROMPTS[2:], sampling, 7 + 1000 * 2)
    assert completions([alone[0][1]]) == found[0][2:]


def test_a_version_that_is_not_served_is_refused(engine: RolloutEngine, policies: Policies) -> None:
    installed(engine, *policies.snapshots[1])
    with pytest.raises(SyncError, match="version 2 was asked for, served is 1"):
        asyncio.run(engine.sample(PROMPTS[0], SamplingSpec(1, NEW_TOKENS), 0, 2))


@pytest.mark.parametrize("engine", ["adapter"], indirect=True)
def test_two_jobs_share_an_engine(engine: RolloutEngine, policies: Policies, tmp_path: Path) -> None:
    """Each with an adapter of its own shape and probe; the answers of each are those that it gets by itself."""
    others = made(OTHERS_LORA, tmp_path)
    installed(engine, *policies.snapshots[1])
    sampling = SamplingSpec(4, NEW_TOKENS)
    own = completions([group for _, group in sampled(engine, PROMPTS, sampling, seed=7)])
    slot = slots(engine)

    async def share() -> None:
        await engine.open("other", OTHERS_LORA, PROBE[:9])
        with pytest.raises(SyncError, match="its LoRA rank is 8, this job's is 4"):
            await engine.install(*policies.snapshots[2], policy="other")
        receipt = await engine.install(*others.snapshots[2], policy="other")
        expected = others.snapshots[2][0].probe_logprobs[:8]
        assert receipt.probe_logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)

        def of(name: str) -> list[Any]:
            return [engine.sample(p, sampling, 7 + 1000 * i, policy=name) for i, p in enumerate(PROMPTS)]

        both = await asyncio.gather(*of(OWN), *of("other"))
        assert completions([group for _, group in both[:3]]) == own
        alone = await asyncio.gather(*of("other"))
        assert completions([group for _, group in both[3:]]) == completions([group for _, group in alone]) != own

        # What one job installs disturbs nothing that another samples, and is proven beside it.
        sampling_ours = [asyncio.create_task(call) for call in of(OWN)]
        await asyncio.sleep(0.1)
        again = await engine.install(*others.snapshots[2], policy="other")
        assert again.probe_logprobs == pytest.approx(expected, abs=LOGPROB_TOLERANCE)
        assert completions([group for _, group in await asyncio.gather(*sampling_ours)]) == own

        third = asyncio.create_task(engine.open("third", LORA, PROBE))
        sampling_on = asyncio.create_task(engine.sample(PROMPTS[0], SamplingSpec(4, 200), 0, policy="other"))
        ours = asyncio.create_task(engine.sample(PROMPTS[0], sampling, 7, policy=OWN))
        await asyncio.sleep(0.1)
        assert not third.done() and not sampling_on.done(), "there is a place for two"
        await engine.close("other")
        with pytest.raises(SyncError, match="the policy was closed"):
            await sampling_on
        await third
        assert completions([(await ours)[1]]) == own[:1]
        with pytest.raises(SyncError, match="no policy of the name 'other'"):
            await engine.sample(PROMPTS[0], sampling, 0, policy="other")
        fourth = asyncio.create_task(engine.open("fourth", LORA, PROBE))
        await asyncio.sleep(0)
        await engine.close("fourth")  # as of a job that died while it waited
        waiting = [asyncio.create_task(engine.open("fifth", LORA, PROBE)) for _ in range(2)]  # as of one that starts again
        await asyncio.sleep(0.5)
        await engine.close("third")
        await waiting[1]
        await engine.close("fifth")
        await asyncio.gather(fourth, *waiting, return_exceptions=True)
        assert waiting[0].cancelled() and not engine.places.locked()
        assert fourth.cancelled() and list(engine.policies) == [OWN]

    asyncio.run(share())
    assert slots(engine) == slot and not engine.llm.llm_engine.has_unfinished_requests()


def test_nothing_is_installed_under_a_completion(engine: RolloutEngine, policies: Policies) -> None:
    header, *buckets = policies.snapshots[1]
    installed(engine, header, *buckets)
    answers = greedy(engine)

    async def both() -> list[Any]:
        spec = SamplingSpec(1, NEW_TOKENS, temperature=0.0)
        calls = [engine.sample(prompt, spec, 0) for prompt in PROMPTS]
        return await asyncio.gather(*calls, engine.install(*policies.snapshots[2]), return_exceptions=True)

    *found, receipt = asyncio.run(both())
    assert [group.completion_ids[0].tolist() for _, group in found] == answers
    assert version_of(engine) == 1 and "policy version 2 came while 3 groups are sampled" in str(receipt)


def test_a_step_that_fails_fails_all_that_wait(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the next ones their engine."""
    step = engine.decoder.engine.step
    monkeypatch.setattr(engine.decoder.engine, "step", fails_once(step, 2))
    with pytest.raises(MemoryError):
        sampled(engine, PROMPTS, SamplingSpec(1, NEW_TOKENS), seed=0)
    assert not engine.decoder.waiting
    while engine.decoder.engine.has_unfinished_requests():
        step()


def test_sampled_logprobs_are_the_trainers(engine: RolloutEngine, policies: Policies) -> None:
    prompts = [*PROMPTS, LONG_PROMPT]
    sampling = SamplingSpec(3, NEW_TOKENS, temperature=TEMPERATURE)
    installed(engine, *policies.snapshots[1])
    sampled(engine, prompts, sampling, seed=3)  # leaves another policy's keys and values in the prefix cache
    installed(engine, *policies.snapshots[2])  # which the trainer still holds
    groups = [group for _, group in sampled(engine, prompts, sampling, seed=3)]
    assert len(groups[-1].prompt_ids) > engine.llm.llm_engine.vllm_config.cache_config.block_size
    row = pack_row(groups, [Sample(g, i, 1.0) for g in range(len(groups)) for i in range(3)])
    with torch.no_grad():
        logprobs_BT, _ = model.completion_logprobs(policies.trainer.policy, row)
    gap_BT = (logprobs_BT - row.rollout_logprobs_BT) * row.mask_BT
    assert gap_BT.abs().max() < LOGPROB_TOLERANCE
    assert row.mask_BT.sum() > 50 and row.rollout_logprobs_BT.min() < -1.0


async def talks(conversation: Conversation, pause_s: float = 0.0) -> dict[str, Any]:
    """Three turns: the first is cut, the others may end by themselves."""
    await conversation.answer(max_tokens=4)
    await asyncio.sleep(pause_s)
    conversation.say("user", "And in one word?")
    await conversation.answer(max_tokens=6)
    conversation.say("user", "Are you sure? Say yes or no.")
    return {"left": conversation.left, "last": await conversation.answer(max_tokens=6)}


async def asks_once(conversation: Conversation) -> None:
    await conversation.answer()


async def fails_early(conversation: Conversation) -> None:
    if conversation.left < 64:  # at its second turn
        raise ZeroDivisionError("no such luck")
    await conversation.answer(max_tokens=4)
    await fails_early(conversation)


def play(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    spec = RolloutFunctionSpec(f"{__name__}.{function.__name__}", (), timeout_s=60.0)
    monkeypatch.setattr(engine, "rollout_function", RolloutFunction(spec))


def test_a_conversation_is_the_trainers_and_its_seeds(
    engine: RolloutEngine, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log-probabilities are those that the trainer computes of the whole, its draws the same whatever goes on beside."""
    installed(engine, *policies.snapshots[2])
    play(engine, monkeypatch, talks)
    sampling = SamplingSpec(2, 80, temperature=TEMPERATURE)
    prompts = PROMPTS[:2]

    async def side_by_side(*pauses_s: float) -> list[RolloutGroup]:
        calls = [engine.sample(prompts[i], sampling, 5 + 99 * i, None, {"pause_s": s}) for i, s in enumerate(pauses_s)]
        return [group for _, group in await asyncio.gather(*calls)]

    groups = asyncio.run(side_by_side(0.0, 0.1))
    assert completions(groups[:1]) == completions(asyncio.run(side_by_side(0.05)))
    row = pack_row(groups, [Sample(g, i, 1.0) for g in range(2) for i in range(2)])
    with torch.no_grad():
        logprobs_BT, _ = model.completion_logprobs(policies.trainer.policy, row)
    gap_BT = (logprobs_BT - row.rollout_logprobs_BT) * row.mask_BT
    assert gap_BT.abs().max() < LOGPROB_TOLERANCE
    assert row.mask_BT.sum() > 30 and row.rollout_logprobs_BT.min() < -1.0
    for prompt, group in zip(prompts, groups, strict=True):
        assert group.messages is not None and group.written is not None
        for i, messages in enumerate(group.messages):
            whole = engine.tokenizer.apply_chat_template([*prompt, *messages], tokenize=False)
            ids = [*group.prompt_ids.tolist(), *group.completion_ids[i].tolist()]
            assert whole.startswith(engine.tokenizer.decode(ids)), "a reader of the messages would see another text"
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            written = engine.tokenizer.decode(group.completion_ids[i][group.written[i]], skip_special_tokens=True)
            assert written == "".join(answers) and group.columns["last"][i] == answers[-1]
            last_turn = len(group.completion_ids[i]) - (sampling.max_tokens - group.columns["left"][i])
            assert group.written[i].tolist()[-last_turn - 1 :] == [False] + [True] * last_turn
        assert len({tuple(ids) for ids in completions([group])[0]}) == 2


@pytest.mark.parametrize("engine", ["fused"], indirect=True)
def test_one_turn_of_a_conversation_is_a_completion(
    engine: RolloutEngine, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(engine, *policies.snapshots[1])
    sampling = SamplingSpec(3, NEW_TOKENS)
    ((_, plain),) = sampled(engine, PROMPTS[:1], sampling, seed=7)
    play(engine, monkeypatch, asks_once)
    ((header, played),) = sampled(engine, PROMPTS[:1], sampling, seed=7)
    assert completions([played]) == completions([plain])
    assert (played.texts, played.truncated) == (plain.texts, plain.truncated)
    assert played.prompt_ids.tolist() == plain.prompt_ids.tolist()
    np.testing.assert_allclose(np.concatenate(played.logprobs), np.concatenate(plain.logprobs), atol=LOGPROB_TOLERANCE)
    assert header.written_tokens == header.completion_tokens


@pytest.mark.parametrize("engine", ["fused"], indirect=True)
def test_a_conversation_that_fails_leaves_the_engine_free(
    engine: RolloutEngine, policies: Policies, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(engine, *policies.snapshots[1])
    play(engine, monkeypatch, fails_early)
    ((header, group),) = sampled(engine, PROMPTS[:1], SamplingSpec(2, 64), seed=7)
    assert header.failure == "ZeroDivisionError: no such luck" and group.written is not None
    assert not engine.decoder.waiting and not engine.llm.llm_engine.has_unfinished_requests()
    monkeypatch.undo()
    installed(engine, *policies.snapshots[2])
    assert greedy(engine)


@pytest.mark.parametrize("engine", ["fused"], indirect=True)  # what becomes of an answer is the same however the policy came
def test_groups_hold_what_was_sampled(engine: RolloutEngine, policies: Policies) -> None:
    installed(engine, *policies.snapshots[0])
    groups, by_vllm = (
        [group for _, group in sampled(engine, PROMPTS, SamplingSpec(8, 24, extra=extra), seed=1)]
        for extra in ({}, {"stop": ["nobody writes this"]})  # for which vLLM makes the texts
    )
    ended = 0
    for prompt, group, same in zip(PROMPTS, groups, by_vllm, strict=True):
        assert group.prompt_ids.tolist() == engine.token_ids(prompt)
        assert group.texts == same.texts and all(group.texts)
        for ids, truncated in zip(group.completion_ids, group.truncated, strict=True):
            assert truncated == (len(ids) == 24 and ids[-1] != engine.tokenizer.eos_token_id)
            ended += not truncated
    assert ended > 0, "no completion ended by itself, so the end token was not put to the test"


@pytest.mark.parametrize("engine", ["fused"], indirect=True)
def test_a_stop_string_ends_a_completion_and_its_text(engine: RolloutEngine, policies: Policies) -> None:
    installed(engine, *policies.snapshots[0])
    ((_, whole),) = sampled(engine, PROMPTS[:1], SamplingSpec(4, 24), seed=1)
    stop = whole.texts[0][8:11]
    ((_, group),) = sampled(engine, PROMPTS[:1], SamplingSpec(4, 24, extra={"stop": [stop]}), seed=1)
    assert [text.partition(stop)[0] for text in whole.texts] == list(group.texts)
    assert len(group.completion_ids[0]) < len(whole.completion_ids[0]) and not group.truncated[0]


def test_chat_prompts_go_through_the_template(engine: RolloutEngine) -> None:
    text = engine.tokenizer.decode(engine.token_ids(PROMPTS[0]))
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert engine.tokenizer.decode(engine.token_ids(PROMPTS[2])) == PROMPTS[2]
