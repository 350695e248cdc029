"""Running an app until it is told to end. Knows no route and no engine."""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import uvicorn
    from starlette.types import ASGIApp

    from .options import ServerOptions

GRACE = 10  # seconds that calls get to end in


def serve(app: ASGIApp, sock: socket.socket, on_ready: Callable[[], None]) -> None:
    """Blocks; `on_ready` is called when connections are taken.

    SIGINT and SIGTERM let calls end and shut the app down; SIGTERM then ends the process with status 0.
    """
    import uvicorn

    from .options import ServerOptions

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready()

    # uvicorn raises the signal again when it is done, for whoever handled it before.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        Server(uvicorn_config(app, ServerOptions(), timeout_graceful_shutdown=GRACE)).run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)


def uvicorn_config(app: ASGIApp, options: ServerOptions, **more: Any) -> uvicorn.Config:
    """What all of our servers have in common; `options` for the bounds of their connections."""
    import uvicorn

    from .connections import connections

    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        interface="asgi3",
        http=connections(options),
        h11_max_incomplete_event_size=options.max_header_bytes,
        ws="none",
        server_header=False,
        date_header=False,
        timeout_keep_alive=options.idle_seconds,
        **more,
    )
