"""create_app: `nanovllm serve` as an ASGI app.

    uvicorn --factory nanovllm_server.app:create_app

Puts the modules of routes together and the layers around them; knows no route's work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware

from nanovllm import __version__
from nanovllm.config import Loaded, load

from . import chat, completions, models, operations, page, seeds, tokens
from .door import Door
from .environment import load_arguments
from .errors import ApiError, as_api_error
from .keys import Gate, Keys, load_keys
from .logs import Calls
from .openapi import document
from .options import ServerOptions, server_options
from .ratelimit import RateLimit
from .routing import as_json, get
from .state import State

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from nanovllm.aio import AsyncLLM

    from .lifecycle import Lifecycle

ROUTES = (
    models,
    completions,
    chat,
    tokens,
    operations,
    page,
    seeds,
)  # each has routes(state) and OPERATIONS, the document's part on them
OPEN_PATHS = (*operations.OPEN_PATHS, *page.OPEN_PATHS)  # those that ask for no key


def create_app(
    config: str | Path | Loaded | None = None,
    *,
    llm: AsyncLLM | None = None,
    keys: Keys | None = None,
    options: ServerOptions | None = None,
    lifecycle: Lifecycle | None = None,
) -> ASGIApp:
    """The app for a configuration, or for an engine that is there already; it closes the engine when it shuts down.

    `options` and `keys`: those of the configuration, unless given. With a `lifecycle` the model loads while /livez and
    /readyz answer; else the server starts when it is there. Raises ConfigError.
    """
    if llm is None or options is None or keys is None:
        environment = load_arguments()
        loaded = config if isinstance(config, Loaded) else load(config, **environment)
        options = options or server_options(loaded, {})
        keys = load_keys(options.api_key_file, environment["environ"]) if keys is None else keys
    state = State(options, keys, llm)

    def create() -> AsyncLLM:
        from nanovllm.aio import AsyncLLM

        return AsyncLLM.from_config(loaded)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(state.close)
            if lifecycle is not None:
                await stack.enter_async_context(lifecycle.running(state, create))
            elif llm is None:
                state.load(await asyncio.to_thread(create))
            yield

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for module in ROUTES:
        app.router.routes += module.routes(state)

    async def openapi(request: Request) -> Response:
        return as_json(document(__version__, [operation for module in ROUTES for operation in module.OPERATIONS]))

    app.router.routes.append(get("/openapi.json", openapi))
    app.add_exception_handler(StarletteHTTPException, _no_route)
    app.add_exception_handler(Exception, _failed)
    app.state.nanovllm = state
    # Outermost last: what a call meets first.
    layers: ASGIApp = Gate(RateLimit(app, state.rates), keys, OPEN_PATHS)
    if options.cors_origins:  # before the gate: a browser asks whether it may send a key without sending it
        layers = CORSMiddleware(
            layers,
            allow_origins=options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id"),
            expose_headers=("x-request-id", "retry-after"),
        )
    layers = Door(layers, options, has_keys=len(keys) > 0)
    return Calls(layers, state.metrics)


async def _no_route(request: Request, e: Exception) -> Response:
    """404 and 405, which the router raises."""
    assert isinstance(e, StarletteHTTPException), "registered for nothing else"
    headers = e.headers or {}
    if e.status_code == 405:
        message = f"this path takes {headers['Allow']}"
    else:
        message = "there is no such path here; GET /openapi.json lists those that are"
    response = ApiError(e.status_code, message).response()
    response.headers.update(headers)
    return response


async def _failed(request: Request, e: Exception) -> Response:
    return as_api_error(e).response()
