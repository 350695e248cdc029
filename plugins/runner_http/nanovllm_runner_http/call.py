"""Call: one HTTP exchange in flight, which another thread can end; and the connections that know theirs.

A thread that is blocked in a read cannot be woken by closing the socket, only by shutting it down; so the
connection tells the call which socket it is on, from the moment there is one. Knows no message.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool


class Call:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None  # while this call may shut it down
        self._aborted = threading.Event()
        self.why: str | None = None  # what the first abort said
        self.has_shut_down = False  # a socket, which is of no use to anybody any more

    @property
    def is_aborted(self) -> bool:
        return self._aborted.is_set()

    def abort(self, why: str = "aborted") -> None:
        """Have the thread that is in this call return: from waiting, reading or sleeping at once, from connecting
        when that ends. From any thread, at any time."""
        with self._lock:
            self.why = self.why or why
            self._aborted.set()
            self._shut_down()

    def sleep(self, seconds: float) -> None:
        """Wait, but not after an abort."""
        self._aborted.wait(seconds)

    def attach(self, sock: socket.socket) -> None:
        with self._lock:
            self._socket = sock
            if self.is_aborted:
                self._shut_down()

    def detach(self) -> None:
        """The connection may serve another call now."""
        with self._lock:
            self._socket = None

    def _shut_down(self) -> None:
        if self._socket is not None:
            self.has_shut_down = True
            with suppress(OSError):  # not connected any more
                # Not SSLSocket's own, which takes the TLS state away from under the reader.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class Adapter(HTTPAdapter):
    """A requests adapter whose connections attach themselves to the thread's current call."""

    def __init__(self, current: threading.local, *, num_connections: int, is_verifying: bool) -> None:
        self._pools = _pool_classes(current, is_verifying)
        super().__init__(pool_connections=1, pool_maxsize=num_connections)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(*args, **options)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def close(self) -> None:
        """Close idle connections now. urllib3 leaves that to the garbage collector, for which a traceback may be in
        the way."""
        for manager in (self.poolmanager, *self.proxy_manager.values()):
            for key in manager.pools.keys():  # noqa: SIM118 (it has no iterator)
                manager.pools[key].close()
        super().close()


def _pool_classes(current: threading.local, is_verifying: bool) -> dict[str, type[HTTPConnectionPool]]:
    """urllib3's pools with connections that look up `current.call`."""

    class Attached:
        call: Call | None = None  # whose socket this is, or was until the connection went back to its pool
        sock: socket.socket | None

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            if not is_verifying:
                self.is_verified = True  # the user chose this and was told once; urllib3 would warn every time
            self._take()

        def request(self, *args: Any, **options: Any) -> None:
            if self.call is not None and self.call is not current.call:
                self.call.detach()
                if self.call.has_shut_down:  # between the connection's return to the pool and here
                    self.close()  # type: ignore[attr-defined]  # the next line opens it again
            self._take()
            super().request(*args, **options)  # type: ignore[misc]

        def _take(self) -> None:
            self.call = current.call
            if self.sock is not None:
                self.call.attach(self.sock)

    class Plain(Attached, HTTPConnection):
        pass

    class Secure(Attached, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}
