"""AsyncLLM: one thin bridge from asyncio to an engine that runs in a thread of its own.

Requests are checked and tokenized off the event loop and off the engine thread, then posted to an
inbox. After each step the engine thread hands every event loop its deltas in one call. A request has
one mailbox, which merges what a slow reader has not fetched, so that it is bounded and stalls nobody.
When the consumer goes away, its request is aborted. Knows nothing that `LLM` does not know.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from .errors import EngineClosed, EngineDead, NanoVLLMError, RequestFailed
from .face import EngineFace
from .llm import as_request
from .request import Completion, Delta, Message, Output, Prompt, Request, RequestOptions, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .components import Components
    from .engine import Engine
    from .intake import Ticket
    from .stats import Health

log = logging.getLogger("nanovllm.engine")

CLOSE_SECONDS = 10.0  # how long `close` waits for a step that hangs


class Inbox(Protocol):
    """What takes the deltas of one request. `put` and `fail` are called on its event loop."""

    loop: asyncio.AbstractEventLoop
    num_open: int  # completions not ended yet; the engine thread's

    def put(self, delta: Delta) -> None: ...

    def fail(self, error: NanoVLLMError) -> None:
        """The engine is over, or refused the request: nothing more will come."""


class Mailbox:
    """Deltas on their way to one consumer. All but `num_open` belongs to the consumer's event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, num_open: int) -> None:
        self.loop = loop
        self.num_open = num_open
        self._pending: dict[int, Delta] = {}  # by completion
        self._failure: NanoVLLMError | None = None
        self._arrived = asyncio.Event()

    def put(self, delta: Delta) -> None:
        before = self._pending.get(delta.completion_index)
        self._pending[delta.completion_index] = delta if before is None else merged(before, delta)
        self._arrived.set()

    def fail(self, error: NanoVLLMError) -> None:
        self._failure = error
        self._arrived.set()

    async def get(self) -> list[Delta]:
        """What has come since the last call; waits if that is nothing."""
        await self._arrived.wait()
        self._arrived.clear()
        if not self._pending and self._failure is not None:
            raise self._failure
        found, self._pending = list(self._pending.values()), {}
        if self._failure is not None:
            self._arrived.set()
        return found


class AsyncLLM(EngineFace):
    """An engine for asyncio. Constructed like `LLM`; use `async with`, or `await close()`."""

    def _start(self, engine: Engine, components: Components | None) -> None:
        super()._start(engine, components)
        self._inbox: deque[Callable[[], None]] = deque()  # run by the engine thread, in order
        self._wanted = threading.Condition()
        self._is_closing = False
        self._crash: str | None = None  # why the engine thread ended by itself
        self._mail: dict[int, Inbox] = {}  # by request_id; entered under the lock
        self._thread = threading.Thread(target=self._work, name="nanovllm-engine", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------- calls

    async def stream(
        self,
        prompt: Prompt | Request,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> AsyncGenerator[Delta, None]:
        """Answer one prompt piece by piece. Leaving the iterator (`aclose`, cancellation) aborts the request.

        Raises RequestError for an impossible prompt, and RequestFailed if an accepted one ends in an error.
        """
        async with aclosing(self._stream(as_request(prompt, params, options), [])) as deltas:
            async for delta in deltas:
                yield delta

    async def generate(
        self,
        prompt: Prompt | Request,
        params: SamplingParams | None = None,
        **options: Unpack[RequestOptions],
    ) -> Output:
        """Answer one prompt. Cancelling the call aborts the request. Raises as `stream` does."""
        outputs: list[Output] = []
        async with aclosing(self._stream(as_request(prompt, params, options), outputs)) as deltas:
            async for _ in deltas:
                pass
        return outputs[0]

    async def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Any) -> Output:
        """Answer one conversation, with the model's chat template."""
        return await self.generate(messages, params, **options)

    async def _stream(self, request: Request, outputs: list[Output]) -> AsyncGenerator[Delta, None]:
        """Yield the deltas; append the whole output at the end."""
        loop = asyncio.get_running_loop()
        ticket = await loop.run_in_executor(None, self.engine.prepare, request)
        box = Mailbox(loop, len(ticket.sequences))
        self._post(lambda: self._accept(ticket), {ticket.request_id: box})
        done: list[Completion] = []
        try:
            while len(done) < len(ticket.sequences):
                for delta in await box.get():
                    if delta.output is not None:
                        done.append(delta.output)
                    if delta.error is None:
                        yield delta
        finally:
            if len(done) < len(ticket.sequences):
                with suppress(EngineClosed, EngineDead):
                    self._post(lambda: self._abort(ticket.request_id))
        outputs.append(output := ticket.output(done))
        if output.error is not None:
            raise RequestFailed(f"request {output.request_id}: {output.error}", outputs=[output])

    def pace(
        self,
        new: Sequence[tuple[Ticket, Inbox]] = (),
        grants: Sequence[tuple[int, int]] = (),
        over: Sequence[int] = (),
    ) -> None:
        """Lead paced requests, all in one go between two steps: abort, accept, grant.

        `new`: prepared PacedRequests, each with what takes its deltas; `grants`: (request id, tokens in all) as for
        `Engine.grant`; `over`: request ids to abort. Raises EngineClosed, EngineDead.
        """

        def act() -> None:
            for request_id in over:
                self._abort(request_id)
            for ticket, _ in new:
                self._accept(ticket)
            for request_id, num_output in grants:
                self.engine.grant(request_id, num_output)

        self._post(act, {ticket.request_id: inbox for ticket, inbox in new})

    # ---------------------------------------------------------------------------------- the end

    def health(self) -> Health:
        """Whether the engine takes requests and gets on with them. From any thread."""
        health = super().health()
        return health if self._crash is None else replace(health, is_live=False, is_ready=False, reason=self._crash)

    async def close(self) -> None:
        """Abort what runs, end the engine thread, free the model. Safe to call twice."""
        with self._wanted:
            self._is_closing = True
            self._wanted.notify()
        self.engine.wake()
        await asyncio.get_running_loop().run_in_executor(None, self._join)
        if self._thread.is_alive():
            log.error("a step has not ended after %.0f s; its thread is left behind", CLOSE_SECONDS)
            self._crash = "the engine was closed while a step hung"
            self._fail_all(EngineClosed(self._crash))

    def _join(self) -> None:
        self._thread.join(CLOSE_SECONDS)
        if not self._thread.is_alive():
            self.engine.close()  # the thread's last act, unless it crashed

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # --------------------------------------------------------------------------- the engine thread

    def _post(self, action: Callable[[], None], boxes: Mapping[int, Inbox] | None = None) -> None:
        """Have the engine thread do this between two steps. Raises EngineClosed, EngineDead."""
        with self._wanted:
            if self._is_closing:
                raise EngineClosed("the engine is closed", hint="create a new one")
            if self._crash is not None:
                raise EngineDead(self._crash, hint="restart it")
            if boxes:  # from here on, whatever ends the engine finds them
                self._mail.update(boxes)
            self._inbox.append(action)
            self._wanted.notify()
        self.engine.wake()

    def _work(self) -> None:
        engine = self.engine
        try:
            is_closing = False
            while not is_closing:
                with self._wanted:
                    while not (self._inbox or engine.has_work or self._is_closing):
                        self._wanted.wait()
                    actions, is_closing = list(self._inbox), self._is_closing
                    self._inbox.clear()
                for action in actions:
                    action()
                if not is_closing:
                    self._deliver(engine.step())
            engine.close()
            self._deliver(engine.take_deltas())
        except BaseException as e:  # a bug of ours: nobody may wait for ever because of it
            log.exception("the engine thread ended")
            with self._wanted:
                self._crash = f"the engine thread ended: {type(e).__name__}: {e}"
            self._fail_all(EngineDead(self._crash, hint="restart it"))

    def _accept(self, ticket: Ticket) -> None:
        try:
            self.engine.add(ticket)
        except NanoVLLMError as e:
            box = self._mail.pop(ticket.request_id)
            _post(box.loop, box.fail, e)

    def _deliver(self, deltas: list[Delta]) -> None:
        """Hand out a step's deltas, one call per event loop."""
        by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[Inbox, Delta]]] = defaultdict(list)
        for delta in deltas:
            box = self._mail.get(delta.request_id)
            if box is None:
                continue
            by_loop[box.loop].append((box, delta))
            box.num_open -= delta.finish is not None
            if not box.num_open:
                del self._mail[delta.request_id]
        for loop, mail in by_loop.items():
            if not _post(loop, _put_all, mail):  # the loop is closed: its consumers are gone
                for _, delta in mail:
                    self._abort(delta.request_id)

    def _abort(self, request_id: int) -> None:
        self._mail.pop(request_id, None)
        self.engine.abort(request_id)

    def _fail_all(self, error: NanoVLLMError) -> None:
        with self._wanted:
            boxes = list(self._mail.values())
            self._mail.clear()
        for box in boxes:
            _post(box.loop, box.fail, error)


def merged(a: Delta, b: Delta) -> Delta:
    """Two deltas of one completion as one."""
    return b._replace(
        text=a.text + b.text,
        token_ids=a.token_ids + b.token_ids,
        logprobs=None if a.logprobs is None and b.logprobs is None else (a.logprobs or ()) + (b.logprobs or ()),
    )


def _put_all(mail: list[tuple[Inbox, Delta]]) -> None:
    for box, delta in mail:
        box.put(delta)


def _post(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *args: Any) -> bool:
    """call_soon_threadsafe; False if the loop is closed."""
    try:
        loop.call_soon_threadsafe(call, *args)
    except RuntimeError:
        return False
    return True
