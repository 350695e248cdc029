"""Rate limits: so many requests and tokens a minute for each API key. Knows no route and no engine.

A key has two token buckets that hold one minute's worth. A request takes one from the first when it comes; what it
cost in tokens is known when it is over, so that the second may go below zero, and then the key waits until it is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import ApiError
from .keys import OWNER

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from .keys import Keys
    from .options import ServerOptions


class Bucket:
    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._rate = per_minute / 60  # a second
        self._size = max(per_minute, 1.0)
        self._level = self._size
        self._clock = clock
        self._filled = clock()  # when `_level` was right

    def seconds_until(self, level: float) -> float:
        """0 = it holds that much now."""
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._filled) * self._rate)
        self._filled = now
        return max(0.0, (level - self._level) / self._rate)

    def take(self, amount: float) -> None:
        """It may go below zero."""
        self._level -= amount


class RateLimits:
    """All on one event loop."""

    def __init__(self, options: ServerOptions, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._keys = keys
        self._clock = clock
        self._buckets: dict[tuple[str, str], Bucket | None] = {}  # (owner, limit); as many as there are keys

    def enter(self, owner: str) -> None:
        """A request comes. Raises ApiError (429)."""
        requests = self._bucket(owner, "requests_per_minute")
        tokens = self._bucket(owner, "tokens_per_minute")
        for bucket, level, what in ((requests, 1.0, "requests"), (tokens, 0.0, "tokens")):
            if bucket is not None and (wait := bucket.seconds_until(level)) > 0:
                raise ApiError(
                    429,
                    f"this API key's limit of {what} a minute is reached; it works again in {wait:.1f} s",
                    code="rate_limit_exceeded",
                    retry_after=wait,
                )
        if requests is not None:
            requests.take(1)

    def charge(self, owner: str, num_tokens: int) -> None:
        """A call is over that cost this many tokens."""
        bucket = self._bucket(owner, "tokens_per_minute")
        if bucket is not None:
            bucket.seconds_until(0)  # what has come in since
            bucket.take(num_tokens)

    def limit(self, owner: str, name: str) -> float | None:
        """One of keys.LIMITS: this key's own, or else everybody's. None = there is none."""
        own: float | None = self._keys.limits(owner).get(name, getattr(self._options, name))
        return own

    def _bucket(self, owner: str, limit: str) -> Bucket | None:
        if (owner, limit) not in self._buckets:
            own = self.limit(owner, limit)
            self._buckets[owner, limit] = None if own is None else Bucket(own, self._clock)
        return self._buckets[owner, limit]


class RateLimit:
    """An ASGI app behind the gate: calls that cost something are counted before their body is read."""

    def __init__(self, app: ASGIApp, limits: RateLimits) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self.limits.enter(scope[OWNER])
            except ApiError as e:
                await e.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)
