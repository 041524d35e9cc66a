"""Requests to `eagleray serve`: who may ask, and how they are written for a model. Ray Serve LLM is not loaded here."""

import hmac
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from fastapi import HTTPException, Request

from actors.specs import ServedModelSpec


def as_trained(body: Any, served: ServedModelSpec | None) -> Any:
    """A request with the model's own chat template, which a client cannot change, and its own endings.

    body: of vLLM's protocol, a chat or a text to go on with.
    """
    if served is None:  # an unknown model, which the front refuses
        return body
    changes: dict[str, Any] = {"stop_token_ids": [*(body.stop_token_ids or []), *served.stop_token_ids]}
    if "chat_template" in type(body).model_fields:
        changes["chat_template"] = served.chat_template
        kwargs = {**served.chat_template_kwargs, **(body.chat_template_kwargs or {})}
        changes["chat_template_kwargs"] = {name: value for name, value in kwargs.items() if name != "chat_template"}
    return body.model_copy(update=changes)


def guard(key: str) -> Callable[[Request], None]:
    """Refuses requests without the key, of which it holds a digest alone: Ray Serve keeps what it deploys."""
    expected = sha256(f"Bearer {key}".encode()).digest()

    def check(request: Request) -> None:
        given = sha256(request.headers.get("Authorization", "").encode()).digest()
        if not hmac.compare_digest(given, expected):
            raise HTTPException(401, "this server wants its key, as `Authorization: Bearer KEY`")

    return check
