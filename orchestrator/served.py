"""Which engines `eagleray serve` needs, what each has to answer with, and what each is built from.

An adapter alone on its base is merged into the weights when the engine starts, and decodes at the base's speed. Several on one
base share an engine, each in a LoRA slot of vLLM, which decodes more slowly, and the base is served beside them. A whole model
has an engine of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors import model
from actors.specs import ModelSpec, ServedEngineSpec, ServedModelSpec
from orchestrator.answering import endings, tokenizer_of
from orchestrator.jobs import lora_spec, quantization
from orchestrator.plan import Plan
from orchestrator.results import Result, Weights

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has slots for


@dataclass(frozen=True)
class Engine:
    """One engine: a model, and adapters on it."""

    name: str  # in requests, of what it answers with when no adapter is asked for
    result: Result  # whose configuration says how it computes
    model: str  # a folder or a name of the hub
    fused: Result | None = None  # the adapter that is merged into its weights
    slots: tuple[Result, ...] = ()


def engines_of(results: Sequence[Result], weights: Sequence[Weights], *, base: bool) -> list[Engine]:
    """How models share engines, in the order of the first of each."""
    by_base: dict[str, list[tuple[Result, Weights]]] = {}
    for result, loads in zip(results, weights, strict=True):
        by_base.setdefault(result.config.base_model, []).append((result, loads))
    engines = []
    for name, of_base in by_base.items():
        adapters = [result for result, loads in of_base if loads.adapter]
        first = of_base[0][0]
        if base or len(adapters) > 1:
            shown = Path(name).name if Path(name).is_dir() else name
            engines.append(Engine(shown.replace(":", "-"), adapters[0] if adapters else first, name, slots=tuple(adapters)))
        elif adapters:
            engines.append(Engine(adapters[0].name, adapters[0], name, fused=adapters[0]))
        engines += [Engine(result.name, result, loads.model) for result, loads in of_base if not loads.adapter]
    return engines


def models_of(engine: Engine) -> list[ServedModelSpec]:
    """What an engine has to answer with: its own weights, and each of its slots."""
    of_base = engine.slots or engine.model == engine.result.config.base_model and not engine.fused
    own = ServedModelSpec(engine.name, engine.name) if of_base else _written_as(engine.name, engine.name, engine.result)
    return [own, *(_written_as(result.name, engine.name, result) for result in engine.slots)]


def _written_as(name: str, engine: str, result: Result) -> ServedModelSpec:
    tokenizer = tokenizer_of(result)
    stops: Any = endings(result.config, tokenizer).get("stop_token_ids", [])
    if result.tokenizer and tokenizer.eos_token_id is not None:
        stops = [*stops, tokenizer.eos_token_id]  # the job may have named another than the base model's
    template = tokenizer.chat_template if result.tokenizer or result.config.chat_template else None
    return ServedModelSpec(name, engine, template, result.config.trl.chat_template_kwargs or {}, tuple(stops))


def engine_arguments(engine: Engine, plan: Plan) -> dict[str, Any]:
    """vLLM's own, by its names."""
    config = engine.result.config
    arguments: dict[str, Any] = {
        "dtype": plan.dtype,
        "trust_remote_code": config.trust_remote_code,
        "max_model_len": config.vllm.max_model_len or -1,  # -1: as many tokens as the model and the memory allow
        "gpu_memory_utilization": plan.gpu_memory_utilization,
        "tensor_parallel_size": plan.tensor_parallel,
        "enforce_eager": bool(config.vllm.enforce_eager) or not plan.gpu,
        "trust_request_chat_template": True,  # requests come through Front, which writes it
        "disable_log_stats": True,
    }
    if engine.fused:
        arguments["worker_extension_cls"] = "actors.install.PolicyInstaller"
    if engine.slots:
        ranks = [lora_spec(result.config).r for result in engine.slots]
        modules = [{"name": r.name, "path": str(r.folder), "base_model_name": engine.name} for r in engine.slots]
        arguments |= {
            "enable_lora": True,
            "max_loras": len(engine.slots),
            "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= max(ranks)),
            "lora_modules": modules,
        }
    return arguments


def engine_spec_of(engine: Engine) -> ServedEngineSpec:
    """What its replicas are built from."""
    config = engine.result.config
    spec = ModelSpec(engine.model, "float32", config.trust_remote_code)
    if engine.fused is None:
        return ServedEngineSpec(spec)
    _, scaling = model.rank_and_scaling(lora_spec(config))
    return ServedEngineSpec(replace(spec, quantization=quantization(config)), str(engine.fused.folder), scaling)


def described(served: ServedModelSpec, engines: Sequence[Engine]) -> str:
    """A model for a person."""
    engine = next(e for e in engines if e.name == served.engine)
    if engine.fused:
        return f"{served.name}, merged into {engine.result.config.base_model}"
    return f"{served.name}, a LoRA slot of {engine.name}" if served.name != engine.name else served.name
