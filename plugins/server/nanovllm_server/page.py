"""The page at `/`: its files, and GET /v1/engine/live, which tells it what the engine does.

The files are a fixed table in memory: no path of a request ever reaches a directory, and there are no ranges. They are
open, because a browser cannot send a key before there is a page that asks for one; they hold nothing of this server's.
Knows no engine: live.py does.
"""

from __future__ import annotations

import asyncio
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import Response

from .errors import ApiError
from .live import LiveStream, LiveView
from .openapi import Operation
from .routing import get

if TYPE_CHECKING:
    from fastapi import Request
    from starlette.routing import BaseRoute

    from .routing import Endpoint
    from .state import State

MAX_WATCHING = 64  # live streams at a time
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_PATHS = {
    "/": "index.html",
    **{f"/static/{name}": name for name in ("app.js", "chat.js", "engine.js", "server.js", "style.css", "icon.svg")},
}
OPEN_PATHS = tuple(_PATHS)
OPERATIONS: tuple[Operation, ...] = ()  # for browsers; and no generated client can read a stream that has no end

_HEADERS = {
    # Nothing but these files and this server's API: no inline script or style, no other host, no frame around it, and
    # no way from a text to markup.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",  # kept, and asked for again by its tag: a new version is seen at once
}


def routes(state: State) -> list[BaseRoute]:
    view: LiveView | None = None  # made for the first who looks, and kept: it belongs to the engine from then on

    async def live(http: Request) -> Response:
        nonlocal view
        view = view or LiveView(state.llm)
        if view.num_watching >= MAX_WATCHING:
            raise ApiError(503, f"{MAX_WATCHING} pages are watching already", code="too_many_watching", retry_after=30)
        # A tokenizer may be a server.
        model = await asyncio.to_thread(view.model, state.model_name, state.runner_name)
        return LiveStream(view, model, lambda: state.admission.is_draining, state.options.reader_seconds)

    return [get("/v1/engine/live", live), *(get(path, _file(name)) for path, name in _PATHS.items())]


def _file(name: str) -> Endpoint:
    body = (files(__package__) / "static" / name).read_bytes()
    kind = _TYPES[name[name.rindex(".") :]] + "; charset=utf-8"
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'

    async def file(http: Request) -> Response:
        headers = {**_HEADERS, "etag": tag}
        # Proxies that compress mark the tag as weak.
        asked = {one.strip().removeprefix("W/") for one in http.headers.get("if-none-match", "").split(",")}
        if tag in asked:
            return Response(None, 304, headers)
        return Response(body, 200, {**headers, "content-type": kind})

    return file
