"""What every route of `serve` shares: JSON out, and every refusal in OpenAI's shape. Knows no field."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from starlette.routing import Route

from .errors import ApiError, ClientGone, as_api_error
from .notes import note

if TYPE_CHECKING:
    from nanovllm.aio import AsyncLLM
    from nanovllm.tokenizer import Tokenizer

Endpoint = Callable[[Request], Awaitable[Response]]


def tokenizer_of(llm: AsyncLLM) -> Tokenizer:
    if llm.tokenizer is None:
        raise ApiError(501, "this server has no tokenizer")
    return llm.tokenizer


def get(path: str, endpoint: Endpoint) -> Route:
    return Route(path, _answering(path, endpoint), methods=["GET"])


def post(path: str, endpoint: Endpoint) -> Route:
    return Route(path, _answering(path, endpoint), methods=["POST"])


def as_json(data: Any, status: int = 200) -> Response:
    """`data`: what becomes JSON, or a text that is."""
    return Response(data if isinstance(data, str) else json.dumps(data), status, media_type="application/json")


def _answering(path: str, endpoint: Endpoint) -> Endpoint:
    @wraps(endpoint)
    async def answering(request: Request) -> Response:
        note(route=path)
        try:
            return await endpoint(request)
        except ClientGone:
            return Response(status_code=499)  # nobody reads it; nginx's number for the log
        except Exception as e:
            return as_api_error(e).response()

    return answering
