"""What went wrong, in words: a refusal, or an exception of requests, urllib3 or the socket, as an UpstreamError.

Knows no connection.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any

import requests.exceptions as failures
import urllib3.exceptions as low_failures

from .errors import UpstreamError, one_line

_CHECK = "check the address, and that the server runs"
_RETRIED = frozenset([408, 425, 429, 500, 502, 503, 504])


def refusal(status: int, headers: Mapping[str, str], body: Callable[[], bytes], url: str, path: str) -> UpstreamError:
    """What a status other than 200 means; `body` reads the answer, bounded."""
    if 300 <= status < 400:
        return UpstreamError(
            f"{url} answered {path} with a redirect ({status}), which is not followed",
            status=status,
            hint="configure the address that it leads to",
        )
    try:
        said = _said(body())
    except UpstreamError:
        said = ""
    return UpstreamError(
        f"{url} answered {path} with status {status}" + (f": {said}" if said else ""),
        can_retry=status in _RETRIED,
        status=status,
        retry_after=_retry_after(headers.get("Retry-After")),
        hint="set api_key_env or api_key_file to a key that it takes" if status == 401 else None,
    )


def _said(body: bytes) -> str:
    """The server's own words: of {"error": {"message": ...}} and its kin the text, else the body."""
    text: Any = body.decode("utf-8", "replace")
    with suppress(ValueError, RecursionError):
        text = json.loads(text)
    while isinstance(text, dict):
        text = next((text[key] for key in ("error", "message", "detail", "content") if text.get(key)), "")
    return one_line(text)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from either form of the header: a number or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if value.strip().isdigit() else _seconds_until(value)
    except (ValueError, TypeError, OverflowError):
        return None


def _seconds_until(date: str) -> float:
    return max(0.0, parsedate_to_datetime(date).timestamp() - time.time())


def in_words(e: Exception, url: str, path: str, connect: float, timeout: float | None) -> UpstreamError:
    """A failure of requests, urllib3 or the socket as a sentence, and whether the call may go out again."""
    causes = list(_causes(e))

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if has(low_failures.NameResolutionError, socket.gaierror):
        return UpstreamError(f"{url} cannot be reached: its name is not known", can_retry=True, hint=_CHECK)
    if has(low_failures.ProxyError, failures.ProxyError):
        return UpstreamError(f"{url} cannot be reached through the proxy: {_deepest(causes)}", can_retry=True)
    if has(ssl.SSLCertVerificationError):
        return UpstreamError(
            f"{url}: its certificate is not trusted: {_deepest(causes)}",
            hint="set ca_file to the authority's certificate",
        )
    if has(low_failures.ConnectTimeoutError, failures.ConnectTimeout) and not has(low_failures.NewConnectionError):
        return UpstreamError(f"{url} took no connection within {connect:g} s", can_retry=True, hint=_CHECK)
    if has(low_failures.NewConnectionError):
        return UpstreamError(f"{url} cannot be reached: {_deepest(causes)}", can_retry=True, hint=_CHECK)
    if has(low_failures.ReadTimeoutError, failures.ReadTimeout, TimeoutError):
        return UpstreamError(f"{url} sent nothing for {timeout or connect:g} s in answer to {path}")
    if has(ssl.SSLError):
        return UpstreamError(f"{url}: TLS failed: {_deepest(causes)}")
    if has(ConnectionError, low_failures.IncompleteRead, low_failures.ProtocolError):
        return UpstreamError(f"{url} broke off its answer to {path}: {_deepest(causes)}", can_retry=True)
    return UpstreamError(f"{url}: the call of {path} failed: {_deepest(causes)}")


def _causes(e: BaseException) -> Iterator[BaseException]:
    """The exception and what it wraps: requests wraps urllib3 wraps the standard library, each in its own way."""
    seen: list[BaseException] = []
    queue: list[object] = [e]
    while queue:
        cause = queue.pop(0)
        if isinstance(cause, BaseException) and cause not in seen:
            seen.append(cause)
            queue += [*cause.args, getattr(cause, "reason", None), cause.__cause__]
    return iter(seen)


def _deepest(causes: list[BaseException]) -> str:
    last = causes[-1]
    said = getattr(last, "verify_message", None) or getattr(last, "strerror", None) or str(last)
    return one_line(said or type(last).__name__)
