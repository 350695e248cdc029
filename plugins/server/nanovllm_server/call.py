"""Call: what one API call has the engine generate, from the checked requests to the last delta.

    open_call: prepare all prompts (off the loop) -> admission -> accept all at once
      call.next() -> what has come since, merged per choice, so that a slow reader is bounded
    leaving it, or the client's leaving: what still runs is aborted and its blocks are free after the step

A choice is one completion of one prompt: prompt_index * n + completion_index, OpenAI's `index`. Knows no API's fields.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from nanovllm.aio import merged
from nanovllm.errors import EngineClosed, EngineDead, NanoVLLMError, PromptTooLong
from nanovllm.request import Completion, Delta, Finish, Request

from .body import check_text
from .errors import ApiError, ClientGone, as_api_error
from .keys import OWNER, cache_salt

if TYPE_CHECKING:
    from starlette.requests import Request as HTTPRequest

    from nanovllm.aio import AsyncLLM
    from nanovllm.intake import Ticket

    from .state import State

log = logging.getLogger("nanovllm.server")

REQUEST_ID = "nanovllm.request_id"  # in the scope: what this call is named in answers and logs


@dataclass(frozen=True, slots=True)
class Usage:
    """In tokens."""

    num_prompt: int
    num_cached: int  # of the prompts, taken from the prefix cache
    num_output: int


class Call:
    """All but the boxes' `num_open` belongs to one event loop."""

    def __init__(self, request_id: str, llm: AsyncLLM, tickets: Sequence[Ticket]) -> None:
        self.request_id = request_id
        self.tickets = tickets
        self.completions: dict[int, Completion] = {}  # by choice; those that have ended
        self.num_choices = sum(len(ticket.sequences) for ticket in tickets)
        self._llm = llm
        self._pending: dict[int, Delta] = {}  # by choice
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return len(self.completions) == self.num_choices

    async def next(self) -> list[tuple[int, Delta]]:
        """What has come since the last call, or an empty list after a nudge; waits for one of them.

        Raises ClientGone, ApiError for a choice that the engine could not finish, EngineDead and EngineClosed.
        """
        await self._news.wait()
        self._news.clear()
        if self._failure is not None:
            raise self._failure
        found, self._pending = self._pending, {}
        for choice, delta in found.items():
            if delta.finish is Finish.ERROR:
                log.error("request %s failed: %s", self.request_id, delta.error)
                raise ApiError(500, "the model failed to answer this request", code="generation_failed")
            if delta.finish is Finish.ABORT:
                raise as_api_error(EngineClosed("it ended before its answer"))  # nobody else aborts what is awaited
            if delta.output is not None:
                self.completions[choice] = delta.output
        return list(found.items())

    async def finish(self) -> None:
        """Wait for the last delta. Raises as `next` does."""
        while not self.is_over:
            await self.next()

    def usage(self) -> Usage:
        """Once it is over."""
        size = self.num_choices // len(self.tickets)  # n
        leaders = [self.completions[i].stats for i in range(0, self.num_choices, size)]
        return Usage(
            sum(stats.num_prompt_tokens for stats in leaders),
            sum(stats.num_cached_tokens for stats in leaders),
            sum(len(completion.token_ids) for completion in self.completions.values()),
        )

    def nudge(self) -> None:
        self._news.set()

    # ------------------------------------------------------------------------- begin, arrive, end

    def begin(self) -> None:
        """Raises EngineDead, EngineClosed."""
        boxes, first = [], 0
        for ticket in self.tickets:
            boxes.append((ticket, _Box(self, first, len(ticket.sequences))))
            first += len(ticket.sequences)
        self._llm.pace(boxes)

    def put(self, choice: int, delta: Delta) -> None:
        before = self._pending.get(choice)
        self._pending[choice] = delta if before is None else merged(before, delta)
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._news.set()

    def abort(self) -> None:
        if not self.is_over:
            with suppress(EngineDead, EngineClosed):
                self._llm.pace(over=[ticket.request_id for ticket in self.tickets])

    async def watch(self, receive: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Ends the call when its client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort()
        self.fail(ClientGone())


class _Box:
    """One prompt's inbox."""

    def __init__(self, call: Call, first: int, num_open: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.num_open = num_open
        self._call = call
        self._first = first  # the choice of its completion 0

    def put(self, delta: Delta) -> None:
        self._call.put(self._first + delta.completion_index, delta)

    def fail(self, error: NanoVLLMError) -> None:
        self._call.fail(error)


@asynccontextmanager
async def open_call(
    state: State, http: HTTPRequest, requests: Sequence[Request], *, is_stream: bool
) -> AsyncIterator[Call]:
    """Have all of these answered, or none: raises RequestError, TokenizerError, ApiError, EngineDead, EngineClosed.

    The body must have been read: what comes after it is that the client went away.
    """
    llm, owner = state.llm, http.scope.get(OWNER, "")
    check_text(sum(_num_chars(request) for request in requests), state.options)
    state.admission.check(owner, len(requests), is_stream)  # before the work of tokenizing
    salted = [replace(request, cache_salt=cache_salt(owner, request.cache_salt)) for request in requests]
    tickets = await asyncio.to_thread(_prepare, llm, salted, state.options.max_prompt_tokens)
    with state.admission.enter(owner, tickets, is_stream):
        call = Call(http.scope.get(REQUEST_ID) or uuid4().hex, llm, tickets)
        watcher = asyncio.create_task(call.watch(http.receive))  # type: ignore[arg-type]
        try:
            call.begin()
            yield call
        finally:
            watcher.cancel()
            call.abort()


def _num_chars(request: Request) -> int:
    """To tokenize."""
    if isinstance(request.prompt, str):
        return len(request.prompt)
    return sum(len(item["content"]) for item in request.prompt if not isinstance(item, int))


def _prepare(llm: AsyncLLM, requests: Sequence[Request], max_prompt_tokens: int | None) -> list[Ticket]:
    tickets = []
    for request in requests:
        tickets.append(ticket := llm.engine.prepare(request))
        if max_prompt_tokens is not None and len(ticket.prompt_ids) > max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(ticket.prompt_ids)} tokens; this server takes {max_prompt_tokens}"
            )
    return tickets
