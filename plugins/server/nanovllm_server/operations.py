"""The routes for those who run the server: /livez, /readyz and /metrics. Knows no API of answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastapi import Request, Response
from pydantic import BaseModel

from .openapi import Operation
from .routing import as_json, get

if TYPE_CHECKING:
    from starlette.routing import BaseRoute

    from .state import State


class Status(BaseModel):
    status: Literal["ready", "loading", "draining", "stalled", "dead"]


OPEN_PATHS = ("/livez", "/readyz")  # they say whether, in one word, never what
OPERATIONS = (
    Operation(
        method="get",
        path="/livez",
        summary="Does the engine live? Only a restart helps where the answer is 503",
        answer=Status,
        statuses={503: "`dead`"},
        is_open=True,
    ),
    Operation(
        method="get",
        path="/readyz",
        summary="May work be sent here?",
        answer=Status,
        statuses={503: "`loading`, `draining`, `stalled` or `dead`"},
        is_open=True,
    ),
    Operation(method="get", path="/metrics", summary="Metrics for Prometheus", content_type="text/plain"),
)


def routes(state: State) -> list[BaseRoute]:
    async def livez(request: Request) -> Response:
        """Only a restart helps where this is not 200."""
        status = state.status
        return as_json({"status": status}, 503 if status == "dead" else 200)

    async def readyz(request: Request) -> Response:
        """May work be sent here?"""
        status = state.status
        return as_json({"status": status}, 200 if status == "ready" else 503)

    async def metrics(request: Request) -> Response:
        return Response(state.metrics.text(), media_type=state.metrics.content_type)

    return [get("/livez", livez), get("/readyz", readyz), get("/metrics", metrics)]
