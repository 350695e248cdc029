"""Stream: one sequence's answer on its way, in a thread of its own that reads it.

The thread asks a server, and another one or again while no token has come; hands every piece to the inbox as
it arrives; and ends with the last piece or with the error. `requests` blocks, hence a thread each; one that
waits for bytes costs no processor time. Knows no engine.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

from nanovllm.batch import ScheduledSeq
from nanovllm.errors import NanoVLLMError, RunnerError
from nanovllm.request import Finish

from .backoff import Backoff
from .call import Call
from .dialects import Dialect, Facts, Piece
from .errors import UpstreamError, one_line
from .sse import Event, EventParser
from .transport import Answer, Transport

if TYPE_CHECKING:
    from .servers import Servers

log = logging.getLogger("nanovllm.http")

# (seq_id, what came for it); None only wakes the one who waits.
Inbox: TypeAlias = SimpleQueue[tuple[int, Piece | NanoVLLMError] | None]

# Pieces of text beyond max_tokens that a server which sends no tokens may take for them.
SPARE_PIECES = 16


@dataclass(frozen=True, slots=True)
class Source:
    """Where all streams of one runner come from."""

    servers: Servers
    dialect: Dialect
    facts: Facts
    extra: dict[str, Any]  # allowed by the dialect
    backoff: Backoff
    pause: Callable[[Call, float], None]


class Stream:
    def __init__(self, seq: ScheduledSeq, source: Source, inbox: Inbox) -> None:
        self._seq = seq  # as it was at first: its context is the prompt
        self._source = source
        self._inbox = inbox
        self._call = Call()
        self._has_begun = False  # text or a token has been handed over: from here on nothing is tried again
        self.url: str | None = None  # of the server that is asked, or was asked last
        self._verdict: UpstreamError | None = None  # why the one who aborted gave up on the server
        self._thread = threading.Thread(target=self._run, name=f"nanovllm-stream-{seq.seq_id}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def abort(self, verdict: UpstreamError | None = None) -> None:
        """End it; nothing it hands over later means anything. `verdict`: the server is to blame."""
        self._verdict = verdict
        self._call.abort()

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    # -------------------------------------------------------------------------- the reader's thread

    def _run(self) -> None:
        try:
            error = self._ask()
        except NanoVLLMError as e:  # no server is left, or the prompt cannot be said in this dialect
            error = e
        except Exception as e:  # a bug of ours, or of a dialect
            log.exception("reading the answer of sequence %d failed", self._seq.seq_id)
            error = RunnerError(f"{self.url}: reading the answer failed: {type(e).__name__}: {one_line(e)}")
        if error is not None:
            self._inbox.put((self._seq.seq_id, error))

    def _ask(self) -> NanoVLLMError | None:
        """Attempts, until one succeeds or there is no sense in another."""
        source, call = self._source, self._call
        tried: list[Transport] = []
        num_failed, delay = 0, 0.0
        while not call.is_aborted:
            try:
                transport = source.servers.acquire(tried, _head(self._seq))
                failure = self._attempt(transport, delay if transport in tried else 0.0)  # another need not wait
                tried.append(transport)
            except UpstreamError as e:  # there is none to ask
                source.pause(call, delay)
                failure = e
            num_failed += 1
            wait = None if failure is None or self._has_begun else source.backoff.delay(num_failed, failure)
            if wait is None or call.is_aborted:
                return failure
            delay = wait
            log.info("sequence %d: %s; trying again", self._seq.seq_id, failure)
        return None

    def _attempt(self, transport: Transport, delay: float) -> UpstreamError | None:
        failure: UpstreamError | None = None
        self.url = transport.url
        try:
            if delay:
                self._source.pause(self._call, delay)
            self._read(transport)
        except UpstreamError as e:
            failure = e
        finally:
            self._source.servers.release(transport, self._verdict if self._call.is_aborted else failure)
        return failure

    def _read(self, transport: Transport) -> None:
        """One attempt. Raises UpstreamError; NanoVLLMError for a prompt that the dialect cannot say."""
        source, seq = self._source, self._seq
        exchange = source.dialect.exchange(seq, source.facts, source.extra)
        num_tokens = num_texts = 0
        most = seq.sampling.params.max_tokens
        with transport.stream(exchange.path, exchange.body, self._call) as answer:
            for piece in _pieces(answer, exchange.read, transport.url):
                num_tokens += len(piece.tokens)
                num_texts += bool(piece.text)
                if most is not None and num_texts > most + SPARE_PIECES:
                    raise UpstreamError(f"{transport.url} sent more than the {most} tokens that were asked for")
                if piece.finish is None:
                    piece = piece._replace(finish=self._end_after(piece.tokens, num_tokens))
                self._has_begun |= bool(piece.tokens or piece.text)
                self._inbox.put((seq.seq_id, piece))
                if piece.finish is not None:
                    return  # what is left, an end mark perhaps, is of no interest
        raise _cut(transport.url)

    def _end_after(self, tokens: tuple[int, ...], num_tokens: int) -> Finish | None:
        """The end that the server is about to tell, after so many tokens of which these are the last.

        The engine finds it, too, and would hang up; as it is, the connection serves again.
        """
        eos_ids, params = self._seq.sampling.eos_ids, self._seq.sampling.params
        if any(t in eos_ids and n > params.min_tokens for n, t in enumerate(tokens, num_tokens - len(tokens) + 1)):
            return Finish.STOP
        return Finish.LENGTH if params.max_tokens is not None and num_tokens >= params.max_tokens else None


def _pieces(answer: Answer, read: Callable[[Event], Piece | None], url: str) -> Iterator[Piece]:
    """What the events say, as they arrive. Raises UpstreamError."""
    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "text/event-stream":
        if not answer.read():  # an answer that is cut in its headers looks complete until here
            raise _cut(url)
        raise UpstreamError(f"{url} answered with {one_line(kind) or 'no type'}, not with events")
    parser = EventParser()
    while data := answer.read():
        try:
            for event in parser.feed(data):
                piece = read(event)
                if piece is not None:
                    if piece.error is not None:
                        raise UpstreamError(piece.error)
                    yield piece
        except UpstreamError as e:
            raise e.at(url) from None


def _cut(url: str) -> UpstreamError:
    return UpstreamError(f"{url} ended its answer in the middle", can_retry=True)


def _head(seq: ScheduledSeq) -> bytes:
    """The beginning of the prompt: a server that has seen it may have it in its cache."""
    return seq.context[:64].tobytes() or str(seq.prompt)[:256].encode("utf-8", "replace")
