"""Engines that answer with what a run left: where they lie, what they load, and questions to them.

`Engines.ask` is the one place outside the loop that knows how an engine is asked.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import adapter, device, merge
from actors.model import expected_shapes, rank_and_scaling
from actors.specs import EngineSpec, SamplingSpec
from orchestrator import cluster, waits
from orchestrator.data import Row
from orchestrator.display import Display
from orchestrator.jobs import lora_spec
from orchestrator.online_specs import engine_spec
from orchestrator.plan import TRAINER, Node, Plan, ensure_placeable, first_fit, make_plan
from orchestrator.results import Result, Weights, base_of
from orchestrator.schema import JobConfig

KV_CACHE_GIB = 2  # of an engine on CPUs, unless the job says: vLLM would take most of the machine
PROBE = range(2)  # the shortest there is, for the smallest window: an adapter from a file has no trainer to be compared with
ADAPTER_VERSION = 1


def sampling_plan(config: JobConfig, nodes: Sequence[Node], engines: int, reward_models: Sequence[str] = ()) -> Plan:
    """Up to so many of the job's engines, as many as the nodes hold, and its reward models; no trainer.

    Raises ConfigError when not even one engine fits.
    """
    job = replace(
        config,
        rl="grpo",
        ray_num_workers=1,
        micro_batch_size=config.trl.num_generations,
        gradient_accumulation_steps=1,
        trl=replace(config.trl, vllm_mode="server"),
        ray=replace(config.ray, engines=engines, max_staleness=0),
    )
    plan = make_plan(job, nodes, 1, device.fastest_dtype(gpu=False), reward_models)
    wanted = [bundle for bundle in plan.bundles if bundle.role != TRAINER]
    fits = first_fit(wanted, nodes)
    fitting = zip(wanted, fits, strict=True)
    kept = tuple(bundle for bundle, node in fitting if node is not None or bundle.role == "reward" or bundle.index == 0)
    plan = replace(plan, bundles=kept, placement=first_fit(kept, nodes))
    ensure_placeable(plan.problems)
    return plan


class Engines:
    """The engines of a plan, on a connected cluster. They have no model before `load`."""

    def __init__(self, result: Result, plan: Plan, group: Any, display: Display, *, window: int, completions: int) -> None:
        """window: tokens of prompt and completion, -1 for as many as fit. completions: decoded side by side at most."""
        self.result = result
        self.plan = plan
        self.group = group
        self.display = display
        self.window = window
        self.completions = completions
        self.actors: tuple[Any, ...] = ()
        self.model: str | None = None

    def load(self, weights: Weights) -> None:
        """What is asked next is answered by these weights. Engines that have the base already are given the adapter alone."""
        config = self.result.config
        if weights.model != self.model:
            for engine in self.actors:
                cluster.stop(engine)
            with self.display.phase("loading the model"):
                kv_cache_gib = config.ray.kv_cache_gib or KV_CACHE_GIB
                spec = self._spec(weights.model)
                self.actors = tuple(cluster.start_engines(self.plan, self.group, spec, PROBE, kv_cache_gib).values())
                for index, engine in enumerate(self.actors):
                    waits.fetch(engine.ready.remote(), f"engine {index}, loading its model", cluster.START_TIMEOUT_S)
            self.model = weights.model
        if weights.adapter:
            with self.display.phase("loading the adapter"):
                self._install(weights.adapter)

    def ask(self, rows: Sequence[Row], sampling: SamplingSpec, seed: int) -> list[tuple[Any, Any]]:
        """A ref of the header and one of the group for each row's prompt; engines take turns.

        seed: the same one gives the same completions of the same weights.
        """
        calls = []
        for number, row in enumerate(rows):
            engine = self.actors[number % len(self.actors)]
            call = engine.sample.options(num_returns=2)
            own = seed + number * sampling.num_generations
            calls.append(tuple(call.remote(row.prompt, sampling, own, columns=row.columns)))
        return calls

    def _spec(self, name: str) -> EngineSpec:
        spec = engine_spec(self.result.config, self.plan)
        lora = lora_spec(self.result.config) if name == self.result.config.base_model and self.result.adapted else None
        model = replace(
            spec.model,
            name=name,
            quantization=spec.model.quantization if lora else None,  # what was quantized was the base of the adapter
        )
        return replace(
            spec,
            model=model,
            lora=lora,
            sync="fused" if lora else "weights",
            sleeps=False,
            tokenizer=self.result.tokenizer,
            max_model_len=self.window,
            max_num_seqs=self.completions,
        )

    def _install(self, folder: Path) -> None:
        config = self.result.config
        lora = lora_spec(config)
        base = base_of(config, self.plan.dtype)
        rank, scaling = rank_and_scaling(lora)
        tensors = adapter.load(folder, expected_shapes(base, lora))
        header, bucket = adapter.as_snapshot(
            tensors, base_model=base.name, rank=rank, scaling=scaling, version=ADAPTER_VERSION
        )
        ref = cluster.keep(bucket)
        for index, receipt in enumerate([engine.install.remote(header, ref) for engine in self.actors]):
            waits.fetch(receipt, f"engine {index}, loading the adapter", config.ray.rollout_timeout_s)


def tokenizer_of(result: Result) -> Any:
    """The tokenizer that engines of this result have."""
    return merge.tokenizer_of(base_of(result.config, "float32"), result.folder)


def endings(config: JobConfig, tokenizer: Any) -> dict[str, object]:
    """Fields of vLLM's SamplingParams that end an answer where those in training ended."""
    kwargs = dict(config.trl.generation_kwargs or {})
    turns = [tokenizer.convert_tokens_to_ids(token) for token in config.eot_tokens or []]
    if turns:
        kwargs["stop_token_ids"] = [*kwargs.get("stop_token_ids", []), *turns]
    return kwargs
