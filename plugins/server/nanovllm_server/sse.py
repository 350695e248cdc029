"""EventStream: a call's deltas as server-sent events, one write per engine step.

The status line waits for the first delta, so that what fails before it has a status of its own. Afterwards a failure
is a last event `{"error": ...}`, without the `[DONE]` that says that all is there. Raw ASGI: a step costs one write
and no task. Knows no API's fields: a Format has them.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import Response

from .call import Call
from .errors import ClientGone, as_api_error

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from nanovllm.request import Delta

    from .options import ServerOptions

DONE = "data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events
]


class Format(Protocol):
    """One call's events; each is `event({...})`, "" is none."""

    def begin(self, call: Call) -> None:
        """Called once, before the first step."""

    def step(self, choice: int, delta: Delta) -> str: ...

    def last(self) -> str:
        """Behind the last step, when all went well."""
        ...


def event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


class EventStream(Response):
    """Answers one request; keeps no body, and sends as the call goes on."""

    def __init__(self, opened: AbstractAsyncContextManager[Call], form: Format, options: ServerOptions) -> None:
        self.status_code = 200
        self.background = None
        self._opened = opened
        self._form = form
        self._options = options
        self._clock = asyncio.get_running_loop().time
        self._has_begun = False  # is the status line out?
        self._wrote = self._clock()  # when the last write ended
        self._writing: float | None = None  # when the one that goes on began
        self._is_stuck = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._opened as call:
                await self._stream(call, send)
        except ClientGone:
            return
        except asyncio.CancelledError:
            if not self._is_stuck:
                raise
            # An answer that ends in its middle: the server closes the connection.
        except Exception as e:
            error = as_api_error(e)
            if self._has_begun:
                await self._write(send, event(error.body()), is_last=True)
            else:
                await error.response()(scope, receive, send)

    async def _stream(self, call: Call, send: Send) -> None:
        form = self._form
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._tick(call, task)
        try:
            form.begin(call)
            while True:
                deltas = await call.next()
                events = "".join([form.step(choice, delta) for choice, delta in deltas])
                if call.is_over:
                    await self._write(send, events + form.last(), is_last=True)
                    return
                if not deltas:
                    events = ": keep-alive\n\n"
                if events:
                    await self._write(send, events)
        finally:
            self._timer.cancel()

    async def _write(self, send: Send, events: str, is_last: bool = False) -> None:
        self._writing = self._clock()
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await send({"type": "http.response.body", "body": events.encode(), "more_body": not is_last})
        self._wrote, self._writing = self._clock(), None

    def _tick(self, call: Call, task: asyncio.Task[Any]) -> None:
        """Keep a silent stream alive; cut off a reader that takes nothing. Costs a timer, no task."""
        now, options = self._clock(), self._options
        if self._writing is None:
            if now - self._wrote >= options.keep_alive_seconds:
                call.nudge()
        elif now - self._writing >= options.reader_seconds:
            self._is_stuck = True
            task.cancel()
            return
        after = min(options.keep_alive_seconds, options.reader_seconds) / 4
        self._timer = asyncio.get_running_loop().call_later(after, self._tick, call, task)
