"""LLM: the synchronous face of an engine. Generate, stream, chat.

Every call steps the one engine and sorts what comes out into per-request mailboxes, so calls may be
nested (a half-read stream and a generate) and may come from several threads: whoever waits steps for
all. This file knows nothing about scheduling, models or plugins.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from .errors import RequestError, RequestFailed
from .face import EngineFace
from .progress import Progress
from .request import Completion, Delta, Message, Output, Prompt, Request, RequestOptions, SamplingParams

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .components import Components
    from .engine import Engine
    from .intake import Ticket

Prompts: TypeAlias = "Prompt | Request | Sequence[Prompt | Request]"


class LLM(EngineFace):
    """An engine with a loaded model.

    `LLM("demo")`, `LLM("./models/qwen", runner="numpy", max_num_seqs=8)`, `LLM.from_config("app.yaml")`,
    `LLM.from_components(runner, tokenizer)`. Use it as a context manager, or call `close()`.
    """

    def _start(self, engine: Engine, components: Components | None) -> None:
        super()._start(engine, components)
        self._lock = threading.RLock()  # held while the engine is called
        self._door = threading.RLock()  # held by the one thread that waits for the lock next
        self._mail: dict[int, deque[Delta]] = {}  # request_id -> deltas not read yet; appended by whoever steps

    # ------------------------------------------------------------------------------------- calls

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = True,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """Answer one prompt or many; outputs come in prompt order.

        A prompt is text, a list of token ids, a list of chat messages, or a Request, which brings its own
        params. `params` is one for all or one per prompt. The progress bar goes to stderr, if that is a
        terminal. Raises RequestError before anything runs if a prompt is impossible, and RequestFailed,
        which carries all outputs, if one ended in an error.
        """
        tickets = self._prepare(_requests(prompts, params, options))
        done: dict[int, list[Completion]] = {t.request_id: [] for t in tickets}
        sizes = {t.request_id: len(t.sequences) for t in tickets}
        before, finished = self.stats(), 0
        with (
            Progress(len(tickets), enabled=None if show_progress else False) as progress,
            closing(self._run(tickets)) as steps,
        ):
            for deltas in steps:
                for delta in deltas:
                    if delta.output is not None:
                        done[delta.request_id].append(delta.output)
                        finished += len(done[delta.request_id]) == sizes[delta.request_id]
                if progress.is_enabled:
                    rates = self.stats().since(before)
                    progress.update(finished, rates.prefill_tokens_per_second, rates.decode_tokens_per_second)
        return _checked([t.output(done[t.request_id]) for t in tickets])

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        show_progress: bool = True,
        **options: Unpack[RequestOptions],
    ) -> list[Output]:
        """Answer one conversation `[{"role": ..., "content": ...}, ...]` or several, with the model's chat template."""
        if not isinstance(messages, (list, tuple)) or not messages:
            raise RequestError("chat takes a list of messages, or a list of such lists")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        return self.generate(conversations, params, show_progress=show_progress, **options)

    def stream(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Unpack[RequestOptions],
    ) -> Iterator[Delta]:
        """Answer piece by piece: deltas of all prompts as they come, told apart by `delta.prompt_index`.

        The texts of a completion's deltas join to its whole text. Requests are refused when `stream` is
        called; leaving the iterator early aborts the rest. A request that fails raises RequestFailed, once
        the others have ended.
        """
        return self._stream(self._prepare(_requests(prompts, params, options)))

    def _stream(self, tickets: list[Ticket]) -> Iterator[Delta]:
        places = {t.request_id: i for i, t in enumerate(tickets)}
        done: dict[int, list[Completion]] = {t.request_id: [] for t in tickets}
        with closing(self._run(tickets)) as steps:
            for delta in chain.from_iterable(steps):
                if delta.output is not None:
                    done[delta.request_id].append(delta.output)
                if delta.error is None:
                    yield delta._replace(prompt_index=places[delta.request_id])
        _checked([t.output(done[t.request_id]) for t in tickets])

    # ---------------------------------------------------------------------------------- the end

    def close(self) -> None:
        """Abort what runs and free the model. Safe to call twice; any other call raises EngineClosed."""
        with self._turn(wake=True):
            self.engine.close()
            self._sort(self.engine.take_deltas())

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------- details

    def _prepare(self, requests: list[Request]) -> list[Ticket]:
        """All or none: every request is checked before the first is accepted."""
        tickets = []
        for i, request in enumerate(requests):
            try:
                tickets.append(self.engine.prepare(request))
            except RequestError as e:
                if len(requests) == 1:
                    raise
                raise RequestError(f"prompt {i} of {len(requests)}: {e.message}", hint=e.hint) from None
        return tickets

    def _run(self, tickets: list[Ticket]) -> Generator[list[Delta], None, None]:
        """Accept these requests and step until all have ended; leaving early aborts the rest."""
        missing = {t.request_id: len(t.sequences) for t in tickets}  # completions not ended yet
        try:
            with self._turn(wake=True):
                for ticket in tickets:
                    self._mail[ticket.request_id] = deque()
                    self.engine.add(ticket)
            while missing:
                # What is here already needs no turn: another thread's step may be blocked for long.
                if not any(self._mail[i] for i in missing):
                    with self._turn():
                        if not any(self._mail[i] for i in missing):
                            self._sort(self.engine.step())
                boxes = [self._mail[i] for i in missing]
                deltas = [box.popleft() for box in boxes for _ in range(len(box))]
                for delta in deltas:
                    if delta.finish is not None:
                        missing[delta.request_id] -= 1
                missing = {i: count for i, count in missing.items() if count}
                yield deltas
        finally:
            if missing:
                self.engine.wake()
                with self._lock:  # no turn is awaited here: the garbage collector may run this inside a step
                    for request_id in missing:
                        self.engine.abort(request_id)
                    self._sort(self.engine.take_deltas())
            for ticket in tickets:
                self._mail.pop(ticket.request_id, None)

    @contextmanager
    def _turn(self, *, wake: bool = False) -> Generator[None, None, None]:
        """The lock, in order of arrival: a thread that steps queues like the others before it steps again.

        `wake`: a step of another thread may be blocked until something arrives; have it return.
        """
        with self._door:
            if wake:
                self.engine.wake()
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def _sort(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            if (box := self._mail.get(delta.request_id)) is not None:
                box.append(delta)


def _requests(
    prompts: Prompts,
    params: SamplingParams | Sequence[SamplingParams] | None,
    options: RequestOptions,
) -> list[Request]:
    """One Request per prompt, whatever shape they came in."""
    if isinstance(prompts, (list, tuple)):
        if not prompts:
            raise RequestError("there is no prompt", hint="give at least one")
        # A list of ids or of messages is one prompt; a list of anything else is that many.
        is_one = isinstance(prompts[0], (int, np.integer, Mapping))
    else:
        is_one = True
    each: Sequence[Any] = [prompts] if is_one else prompts  # type: ignore[assignment]
    if params is None or isinstance(params, SamplingParams):
        chosen: Sequence[SamplingParams | None] = [params] * len(each)
    elif not isinstance(params, (list, tuple)):
        raise RequestError(f"params must be SamplingParams or a list of them, not {type(params).__name__}")
    elif len(params) != len(each):
        raise RequestError(f"there are {len(each)} prompts but {len(params)} params")
    else:
        chosen = params
    return [as_request(prompt, p, options) for prompt, p in zip(each, chosen, strict=True)]


def as_request(prompt: Prompt | Request, params: SamplingParams | None, options: RequestOptions) -> Request:
    """A Request passes as it is; anything else becomes one."""
    if not isinstance(prompt, Request):
        return Request(prompt=prompt, params=SamplingParams() if params is None else params, **options)
    if params is not None or options:
        raise RequestError("a Request brings its own params and options", hint="put them into the Request")
    return prompt


def _checked(outputs: list[Output]) -> list[Output]:
    failed = [o for o in outputs if o.error is not None]
    if failed:
        more = f" (and {len(failed) - 1} more of {len(outputs)})" if len(failed) > 1 else ""
        raise RequestFailed(f"request {failed[0].request_id}{more}: {failed[0].error}", outputs=outputs)
    return outputs
