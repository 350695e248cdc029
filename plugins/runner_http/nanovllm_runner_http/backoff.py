"""Backoff: how long to wait before the next attempt, and when to give up. Knows no clock and no socket."""

from __future__ import annotations

import random
from collections.abc import Callable

from .errors import UpstreamError


class Backoff:
    """Exponential, with jitter; a server's Retry-After wins."""

    first = 0.25  # seconds
    longest = 8.0
    patience = 60.0  # a server that asks for more is given up on

    def __init__(self, retries: int, jitter: Callable[[], float] = random.random) -> None:
        self.retries = retries
        self._jitter = jitter  # uniform in [0, 1)

    def delay(self, num_failed: int, error: UpstreamError) -> float | None:
        """Seconds to wait after the `num_failed`-th failure (from 1); None: give up."""
        if not error.can_retry or num_failed > self.retries:
            return None
        wait = min(self.longest, self.first * 2.0 ** (num_failed - 1)) * (0.5 + self._jitter() / 2)
        if error.retry_after is None:
            return wait
        return max(wait, error.retry_after) if error.retry_after <= self.patience else None
