"""Every refusal and failure as OpenAI's clients expect it: a status and `{"error": {message, type, param, code}}`.

Knows no route.
"""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi import Response

from nanovllm.errors import EngineClosed, EngineDead, NanoVLLMError, PromptTooLong, RequestError, TokenizerError

from .notes import note

log = logging.getLogger("nanovllm.server")


class ApiError(Exception):
    """A call that is answered with this. `retry_after`: seconds after which it may work, for 429 and 503."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,  # the field of the request that is wrong
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """What the client gets, which is noted for the log and the metrics."""
        note(error=self.code or _type(self.status))
        return {"error": {"message": self.message, "type": _type(self.status), "param": self.param, "code": self.code}}

    def response(self) -> Response:
        # A body that was not read to its end cannot be followed by another request.
        headers = {"connection": "close"} if self.status in (408, 413) else {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        return Response(json.dumps(self.body()), self.status, headers, "application/json")


class ClientGone(Exception):
    """Nobody is there to take an answer."""


def as_api_error(error: Exception) -> ApiError:
    """What the client is told. What it need not know is logged instead."""
    match error:
        case ApiError():
            return error
        case PromptTooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case RequestError() | TokenizerError():  # the latter: there is no chat template
            return ApiError(400, str(error))
        case EngineClosed():
            return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        case EngineDead():
            return ApiError(503, "the engine is dead and must be restarted", code="engine_dead", retry_after=30)
        case NanoVLLMError():  # a failure of the runner; its sentence may name hosts and files
            log.error("a request failed: %s", error)
            return ApiError(500, "the model failed to answer this request", code="generation_failed")
        case _:
            log.error("a request failed", exc_info=error)
            return ApiError(500, "internal error")


def _type(status: int) -> str:
    match status:
        case 401:
            return "authentication_error"
        case 403:
            return "permission_error"
        case 429:
            return "rate_limit_error"
        case _:
            return "invalid_request_error" if status < 500 else "server_error"
