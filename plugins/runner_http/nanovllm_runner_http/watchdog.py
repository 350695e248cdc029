"""Watchdog: aborts calls that take too long. One thread for all calls of a transport, while there are any.

A socket's own timeout starts again with every byte. Knows no message.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .call import Call

IDLE_SECONDS = 5.0  # without a call, until the thread ends: nobody closes the transport of a tokenizer
TIMEOUT = "timeout"  # why it aborts, as `Call.why` tells


class Watchdog:
    def __init__(self) -> None:
        self._due: dict[Call, float] = {}  # when each call in progress must be over, by time.monotonic
        self._next: float | None = None  # when the thread looks again; None = when told
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @contextmanager
    def watching(self, call: Call, seconds: float) -> Iterator[None]:
        """Abort `call` unless this is left within that time."""
        due = time.monotonic() + seconds
        with self._changed:
            self._due[call] = due
            if self._thread is None and not self._is_closed:
                self._thread = threading.Thread(target=self._watch, name="nanovllm-watchdog", daemon=True)
                self._thread.start()
            elif self._next is None or due < self._next:
                self._changed.notify()
        try:
            yield
        finally:
            with self._changed:
                self._due.pop(call, None)

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._is_closed:
                now = time.monotonic()
                for call in [call for call, due in self._due.items() if due <= now]:
                    del self._due[call]
                    call.abort(TIMEOUT)
                self._next = min(self._due.values(), default=None)
                pause = IDLE_SECONDS if self._next is None else min(IDLE_SECONDS, self._next - now)
                if not self._changed.wait(pause) and not self._due:
                    break
            self._thread = None
