"""`nanovllm serve` as a process: signals, TLS and its exit. Knows no route.

The first SIGTERM or SIGINT drains; the second ends the process at once, with 128 + its number.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from nanovllm.errors import ConfigError

from .lifecycle import FLUSH
from .serving import uvicorn_config

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from .lifecycle import Lifecycle
    from .options import ServerOptions


class Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, lifecycle: Lifecycle, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self.lifecycle = lifecycle
        self._on_listening = on_listening

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.lifecycle.is_stopping:
            os._exit(128 + sig)
        self.lifecycle.stop()

    def end(self) -> None:
        self.should_exit = True


def server(app: ASGIApp, options: ServerOptions, lifecycle: Lifecycle, on_listening: Callable[[], None]) -> Server:
    """Raises ConfigError for TLS files that will not do."""
    config = uvicorn_config(
        app,
        options,
        ssl_certfile=options.tls_certificate,
        ssl_keyfile=options.tls_key,
        timeout_graceful_shutdown=int(FLUSH),
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as e:
        raise ConfigError(
            f"server.tls_certificate {options.tls_certificate} cannot be used: {e}",
            hint="it must hold a PEM certificate, and it or server.tls_key its key",
        ) from None
    return Server(config, lifecycle, on_listening)


def run(server: Server, sock: socket.socket) -> None:
    """Until it has ended. Raises what ended it, if that was not a signal."""
    lifecycle = server.lifecycle
    server.run(sockets=[sock])
    if lifecycle.is_loading:  # its thread may be deep in a library that no exit of Python's interrupts
        os._exit(0)
    if lifecycle.error is not None:
        raise lifecycle.error
