"""The address to serve at. Without keys that is this machine alone. Knows no app."""

from __future__ import annotations

import ipaddress
import socket

from nanovllm.errors import ConfigError

from .keys import VARIABLE, Keys


def bind(host: str, port: int, keys: Keys) -> socket.socket:
    """A socket that is bound and does not listen yet. Raises ConfigError for an address that will not do."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as e:
        raise ConfigError(f"--host {host!r} is no address of this machine: {e}") from None
    # What it resolved to counts, not how it is spelt.
    if not len(keys) and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigError(
            f"--host {host} lets other machines in, and no API keys are set",
            hint=f"give --api-key-file or set {VARIABLE}, or serve at 127.0.0.1",
        )
    # With the protocol's number: asyncio turns Nagle's algorithm off only where it sees it, and without that an answer
    # in two writes waits 40 ms for an acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as e:
        sock.close()
        raise ConfigError(f"cannot serve at {host}, port {port}: {e.strerror}", hint="choose another --port") from None
    return sock
