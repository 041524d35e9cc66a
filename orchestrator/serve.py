"""`eagleray serve`: what runs left, behind an OpenAI-compatible endpoint of Ray Serve.

An adapter alone on its base is merged into the weights when the engine starts, and decodes at the base's speed. Several on one
base share an engine, each in a LoRA slot of vLLM, which decodes more slowly, and the base is served beside them. A whole model
has an engine of its own.
"""

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors import hub, model
from actors.errors import ActorError, ConfigError, EaglerayError
from actors.specs import ModelSpec, ServedEngineSpec, ServedModelSpec
from orchestrator import cluster
from orchestrator.answering import KV_CACHE_GIB, endings, sampling_plan, tokenizer_of
from orchestrator.display import Display
from orchestrator.environment import served_environment
from orchestrator.jobs import lora_spec, quantization
from orchestrator.plan import Bundle, Node, Plan, amount, first_fit
from orchestrator.results import Result, Weights, find, loadable

APP = "eagleray"
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has slots for


@dataclass(frozen=True)
class Engine:
    """One engine: a model, and adapters on it."""

    name: str  # in requests, of what it answers with when no adapter is asked for
    result: Result  # whose configuration says how it computes
    model: str  # a folder or a name of the hub
    fused: Result | None = None  # the adapter that is merged into its weights
    slots: tuple[Result, ...] = ()


def serve(folders: Sequence[Path], *, host: str, port: int, replicas: int, base: bool, api_key_env: str | None) -> None:
    """Serves until it is stopped. replicas: of each engine. base: serves the base models too.

    api_key_env: the variable with the key that requests must carry. Raises EaglerayError for anything a person can act on,
    cluster.Interrupted on Ctrl-C or SIGTERM.
    """
    display = Display()
    key = _key(api_key_env, host)
    if replicas < 1:
        raise ConfigError(f"--replicas is {replicas}; it must be 1 or more")
    results = [find(folder, display) for folder in folders]
    with cluster.interruptible(), ExitStack() as stack:
        weights = [stack.enter_context(loadable(result, display)) for result in results]
        engines = engines_of(results, weights, base=base)
        models = [served for engine in engines for served in models_of(engine)]
        _ensure_told_apart([served.name for served in models])
        local = not os.environ.get("RAY_ADDRESS")
        if local:
            _ensure_free(host, port)
        with display.phase("starting Ray"):
            stack.enter_context(cluster.connected())
        nodes = cluster.nodes()
        _ensure_room(engines, replicas, nodes)
        with display.phase("starting engines"):
            stack.enter_context(_Serving(engines, models, nodes, host, port, replicas, key))
        display.header(f"serving at http://{host}:{port}/v1", [f"model    {_described(served, engines)}" for served in models])
        display.note("Ctrl-C ends it")
        while True:
            cluster.pause(cluster.POLL_S)


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
    template = tokenizer.chat_template if result.tokenizer else None
    return ServedModelSpec(name, engine, template, result.config.trl.chat_template_kwargs or {}, tuple(stops))


class _Serving:
    """Ray Serve's application, from when it answers until it is removed."""

    def __init__(
        self,
        engines: Sequence[Engine],
        models: Sequence[ServedModelSpec],
        nodes: Sequence[Node],
        host: str,
        port: int,
        replicas: int,
        key: str | None,
    ) -> None:
        self.engines = engines
        self.models = models
        self.nodes = nodes
        self.http = {"host": host, "port": port}
        self.replicas = replicas
        self.key = key
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        from ray import serve

        for name in ("ray", "ray.serve", "httpx"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if serve.status().applications:
            raise ActorError("Ray Serve has applications on this cluster, and none is replaced; end them with `serve shutdown`")
        serve.start(http_options=self.http)
        thread = threading.Thread(target=self._run, name="serve", daemon=True)  # so that Ctrl-C is heard meanwhile
        thread.start()
        try:
            while thread.is_alive():
                cluster.pause(cluster.POLL_S)
            if self.error is not None:
                raise ActorError(f"the engines did not start: {cluster.told(self.error)}") from self.error
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        from ray import serve

        serve.shutdown()

    def _run(self) -> None:
        from ray import serve

        try:
            serve.run(self._application(), name=APP, route_prefix="/")
        except BaseException as error:  # carried to the main thread, which tells the person
            self.error = error

    def _application(self) -> Any:
        from ray import serve
        from ray.serve.llm import build_llm_deployment

        from actors.serving import EngineServer, front

        configs = {engine.name: self._llm_config(engine) for engine in self.engines}
        deployments = {
            engine.name: build_llm_deployment(
                configs[engine.name], deployment_cls=EngineServer, bind_kwargs={"spec": _engine_spec(engine)}
            )
            for engine in self.engines
        }
        deployment = serve.deployment(front(self.key), ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10**6)
        return deployment.bind(llm_deployments=deployments, llm_configs=configs, models=self.models)

    def _llm_config(self, engine: Engine) -> Any:
        from ray.serve.llm import LLMConfig

        plan = sampling_plan(engine.result.config, self.nodes, engines=1)
        cpus = plan.bundles[0].resources["CPU"]
        gpus = plan.bundles[0].resources.get("GPU", 0) / plan.tensor_parallel
        bundle = {"CPU": cpus / plan.tensor_parallel, "GPU": gpus} if plan.gpu else {"CPU": cpus}
        sharing = len(self.engines) * self.replicas
        return LLMConfig(
            model_loading_config={"model_id": engine.name, "model_source": hub.resolve(engine.model)},
            engine_kwargs=engine_arguments(engine, plan),
            placement_group_config={"bundle_per_worker": bundle},
            runtime_env={"env_vars": served_environment(plan, sharing, engine.result.config.ray.kv_cache_gib or KV_CACHE_GIB)},
            deployment_config={
                "num_replicas": self.replicas,
                "ray_actor_options": {"num_cpus": 0},  # its bundle is the engine's
                "max_constructor_retry_count": 1,
            },
            log_engine_metrics=False,
        )


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


def _engine_spec(engine: Engine) -> ServedEngineSpec:
    config = engine.result.config
    spec = ModelSpec(engine.model, "float32", config.trust_remote_code)
    if engine.fused is None:
        return ServedEngineSpec(spec)
    _, scaling = model.rank_and_scaling(lora_spec(config))
    return ServedEngineSpec(replace(spec, quantization=quantization(config)), str(engine.fused.folder), scaling)


def _key(api_key_env: str | None, host: str) -> str | None:
    if api_key_env is None:
        if not _is_loopback(host):
            raise ConfigError(f"--host {host} is open to others, so requests need a key; name its variable by --api-key-env")
        return None
    key = os.environ.get(api_key_env)
    if not key:
        raise ConfigError(f"--api-key-env: {api_key_env} is not set where this command runs; export it with a key")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _ensure_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--port {port} of {host} cannot be used ({error}); choose another") from error


def _ensure_told_apart(names: Sequence[str]) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two of the models would be called {twice[0]}; rename one of the folders")


def _ensure_room(engines: Sequence[Engine], replicas: int, nodes: list[Node]) -> None:
    """Raises ConfigError where Ray Serve would wait for ever."""
    wanted = [engine for engine in engines for _ in range(replicas)]
    bundles = [
        Bundle("engine", i, sampling_plan(engine.result.config, nodes, engines=1).bundles[0].resources)
        for i, engine in enumerate(wanted)
    ]
    placed = first_fit(bundles, nodes)
    if None in placed:
        room = sum(node is not None for node in placed)
        needs = amount(bundles[placed.index(None)].resources)
        raise EaglerayError(
            f"{len(bundles)} engines are wanted and {room} fit into the cluster; one that does not needs {needs}. "
            "Give fewer folders or --replicas, or add a node"
        )


def _described(served: ServedModelSpec, engines: Sequence[Engine]) -> str:
    engine = next(e for e in engines if e.name == served.engine)
    if engine.fused:
        return f"{served.name}, merged into {engine.result.config.base_model}"
    return f"{served.name}, a LoRA slot of {engine.name}" if served.name != engine.name else served.name
