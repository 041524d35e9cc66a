"""What `eagleray serve` starts: Ray Serve LLM's own engine and its own front, each with a little more.

    EngineServer   resolves its base model on the node where it is, and merges an adapter into its weights
    Front          gives every adapter its name, and writes its requests as its rows were written in training

Both run in replicas of Ray Serve, which restarts them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, Request
from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.ingress import OpenAiIngress, make_fastapi_ingress
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from starlette.responses import Response

from actors import adapter, hub, model
from actors.errors import ConfigError
from actors.requests import as_trained, guard
from actors.specs import ServedEngineSpec, ServedModelSpec


class EngineServer(LLMServer):  # type: ignore[misc]
    """One engine and vLLM's own OpenAI server around it."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, llm_config: LLMConfig, spec: ServedEngineSpec
    ) -> None:
        folder = hub.resolve(spec.model.name)
        file = Path(spec.adapter) / adapter.WEIGHTS_FILE if spec.adapter else None
        if file and not file.is_file():
            raise ConfigError(f"{file} is not on this node; use storage that all nodes mount")
        llm_config.get_engine_config().hf_model_id = folder
        await super().__init__(llm_config)
        if file:
            quantized = sorted(model.quantized_weights(spec.model))
            arguments = (folder, quantized, spec.model.quantization, str(file), spec.scaling)
            await self.engine.collective_rpc("eagleray_fuse_file", args=arguments)


class Front(OpenAiIngress):  # type: ignore[misc]
    """What clients talk to."""

    def __init__(
        self, llm_deployments: Mapping[str, Any], llm_configs: Mapping[str, LLMConfig], models: Sequence[ServedModelSpec]
    ) -> None:
        """llm_deployments, llm_configs: by name of the engine."""
        self.served = {served.name: served for served in models}
        super().__init__(
            {name: llm_deployments[served.engine] for name, served in self.served.items()},
            {name: to_model_metadata(name, llm_configs[served.engine]) for name, served in self.served.items()},
        )

    async def chat(self, body: ChatCompletionRequest, request: Request) -> Response:
        response: Response = await super().chat(as_trained(body, self.served.get(body.model or "")), request)
        return response

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        response: Response = await super().completions(as_trained(body, self.served.get(body.model or "")), request)
        return response


def front(key: str | None) -> Any:
    """The class of the front, for Ray Serve. key: that requests must carry; None = none."""
    guards = [Depends(guard(key))] if key else []
    return make_fastapi_ingress(
        Front,
        endpoint_map={
            "models": lambda app: app.get("/v1/models", dependencies=guards),
            "model_data": lambda app: app.get("/v1/models/{model:path}", dependencies=guards),
            "chat": lambda app: app.post("/v1/chat/completions", dependencies=guards),
            "completions": lambda app: app.post("/v1/completions", dependencies=guards),
        },
    )
