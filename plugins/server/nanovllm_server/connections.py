"""Connections: h11's, with a bound on their number, on a request's head and on the time that it may take.

uvicorn's own never close a connection whose request line or headers do not come to an end. Knows no route.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .door import head_too_large
from .errors import ApiError

if TYPE_CHECKING:
    from .options import ServerOptions

log = logging.getLogger("nanovllm.server")


def connections(options: ServerOptions) -> type[asyncio.Protocol]:
    """The class that uvicorn makes one of for each connection."""

    class Connection(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _idle_since = 0.0  # where no request is there

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._idle_since = self.loop.time()
            self._arm()
            if len(self.connections) > options.max_connections:
                self._make_room()

        def _make_room(self) -> None:
            """Who holds connections and asks for nothing, which takes no key, keeps nobody else out."""
            idle = [c for c in self.connections if isinstance(c, Connection) and c._is_idle]
            oldest = min(idle, key=lambda c: c._idle_since)  # if all others are busy, this one
            if oldest is self:
                log.warning("a connection was closed: %d are busy", options.max_connections)
            self.connections.discard(oldest)
            oldest.transport.abort()

        @property
        def _is_idle(self) -> bool:
            """No request is there, and all answers are on their way."""
            return self.conn.their_state is h11.IDLE and not self.transport.get_write_buffer_size()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.IDLE:
                self._arm()
            else:  # a whole head is there
                self._disarm()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._idle_since = self.loop.time()
            if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:  # the next one has begun
                self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP, or a head that is too large before it has come as a whole. Called where h11 raised."""
            error = ApiError(400, "this is no HTTP request")
            is_head = self.cycle is None or self.cycle.response_complete
            if is_head and getattr(sys.exc_info()[1], "error_status_hint", 400) == 431:
                error = head_too_large(options)
            response = error.response()
            head: Any = h11.Response(
                status_code=error.status, headers=[*response.raw_headers, (b"connection", b"close")]
            )
            for event in (head, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        def _arm(self) -> None:
            if self._deadline is None:
                self._deadline = self.loop.call_later(options.head_seconds, self.transport.abort)

        def _disarm(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Connection
