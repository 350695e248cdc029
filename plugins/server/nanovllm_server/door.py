"""Door: which requests are let in at all, by their head alone. An ASGI app before all others; knows no key.

Without API keys the only protection is that nobody but this machine can connect, and a web page in its browser can
let its own name point here (DNS rebinding). So the name that a browser was given must be one of ours.
"""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

from .errors import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from .options import ServerOptions

_ONCE = (b"authorization", b"host", b"content-type", b"content-length", b"x-request-id")


class Door:
    def __init__(self, app: ASGIApp, options: ServerOptions, *, has_keys: bool) -> None:
        self.app = app
        self.options = options
        self._names = frozenset(name.lower() for name in options.allowed_hosts)
        self.has_keys = has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as e:
                await e.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        # As on the wire: `METHOD target HTTP/1.1` and `name: value`, each with its line end.
        size = len(scope["method"]) + len(scope["raw_path"]) + len(scope["query_string"]) + 13
        size += sum(len(name) + len(value) + 4 for name, value in headers)
        if size > self.options.max_header_bytes:
            raise head_too_large(self.options)
        names = [name for name, _ in headers]
        if twice := next((name for name in _ONCE if names.count(name) > 1), None):
            # Somebody in between may have looked at the other one.
            raise ApiError(400, f"the header {twice.decode()} is there twice")
        if b"transfer-encoding" in names and (b"content-length" in names or scope["http_version"] == "1.0"):
            # Nor may it have seen another end of the body: RFC 9112, section 6.1.
            raise ApiError(400, "the body's end is said twice, or in a way that HTTP/1.0 has not")
        if not self.has_keys and not self._is_ours(dict(headers).get(b"host", b"localhost").decode("latin-1")):
            raise ApiError(403, "this name is not served without API keys (server.allowed_hosts)", code="unknown_host")

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        name = name.lower().rstrip(".")
        if name == "localhost" or name in self._names:
            return True
        try:
            return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
        except ValueError:
            return False


def head_too_large(options: ServerOptions) -> ApiError:
    return ApiError(431, f"a request's head may have {options.max_header_bytes} bytes")
