"""`eagleray serve`: what runs left, behind an OpenAI-compatible endpoint of Ray Serve, until it is stopped."""

import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from actors import hub
from actors.errors import ActorError, ConfigError, EaglerayError
from actors.specs import ServedModelSpec
from orchestrator import cluster, waits
from orchestrator.answering import KV_CACHE_GIB, sampling_plan
from orchestrator.display import Display
from orchestrator.environment import served_environment
from orchestrator.plan import Bundle, Node, amount, first_fit
from orchestrator.results import find, loadable
from orchestrator.served import Engine, described, engine_arguments, engine_spec_of, engines_of, models_of

APP = "eagleray"


def serve(folders: Sequence[Path], *, host: str, port: int, replicas: int, base: bool, api_key_env: str | None) -> None:
    """Serves until it is stopped. replicas: of each engine. base: serves the base models too.

    api_key_env: the variable with the key that requests must carry. Raises EaglerayError for anything a person can act on,
    waits.Interrupted on Ctrl-C or SIGTERM.
    """
    display = Display()
    key = _key(api_key_env, host)
    if replicas < 1:
        raise ConfigError(f"--replicas is {replicas}; it must be 1 or more")
    results = [find(folder, display) for folder in folders]
    with waits.interruptible(), ExitStack() as stack:
        weights = [stack.enter_context(loadable(result, display)) for result in results]
        engines = engines_of(results, weights, base=base)
        models = [served for engine in engines for served in models_of(engine)]
        _ensure_told_apart([served.name for served in models])
        if not os.environ.get("RAY_ADDRESS"):  # else Ray Serve listens on another machine
            _ensure_free(host, port)
        with display.phase("starting Ray"):
            stack.enter_context(cluster.connected())
        nodes = cluster.nodes()
        _ensure_room(engines, replicas, nodes)
        with display.phase("starting engines"):
            stack.enter_context(_Serving(engines, models, nodes, host, port, replicas, key))
        lines = [f"model    {described(served, engines)}" for served in models]
        display.header(f"serving at http://{_in_url(host)}:{port}/v1", lines)
        display.note("Ctrl-C ends it")
        while True:
            waits.pause(waits.POLL_S)


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

        for name in ("ray", "ray.serve", "vllm"):
            logging.getLogger(name).setLevel(logging.ERROR)
        status = serve.status()
        if status.applications or status.proxies:  # it would go on listening where it was told to
            raise ActorError("Ray Serve runs on this cluster already, and is not replaced; end it with `serve shutdown`")
        serve.start(http_options=self.http)
        thread = threading.Thread(target=self._run, name="serve", daemon=True)  # so that Ctrl-C is heard meanwhile
        thread.start()
        try:
            while thread.is_alive():
                waits.pause(waits.POLL_S)
            if self.error is not None:
                raise ActorError(f"the engines did not start: {waits.told(self.error)}") from self.error
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        from ray import serve

        serve.delete(APP)
        if os.environ.get("RAY_ADDRESS"):  # else all of it ends with the cluster that this command started
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
                configs[engine.name], deployment_cls=EngineServer, bind_kwargs={"spec": engine_spec_of(engine)}
            )
            for engine in self.engines
        }
        deployment = serve.deployment(
            front(self.key), num_replicas=self.replicas, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10**6
        )
        return deployment.bind(llm_deployments=deployments, llm_configs=configs, models=self.models)

    def _llm_config(self, engine: Engine) -> Any:
        from ray.serve.llm import LLMConfig

        plan = sampling_plan(engine.result.config, self.nodes, engines=1)
        bundle = {name: amount / plan.tensor_parallel for name, amount in plan.bundles[0].resources.items()}
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


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _ensure_free(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
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
