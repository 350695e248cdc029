"""CompletionRunner: one stream for each sequence; the server schedules, batches and samples.

A sequence's stream opens when it is first seen; each step hands back what has arrived, and waits while that
is nothing; release closes it. Knows no dialect and no socket.
"""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty
from typing import TYPE_CHECKING

from nanovllm.batch import Batch, Remote, RunnerInfo, ScheduledSeq, SeqOutput, TokenLogprob
from nanovllm.errors import NanoVLLMError, RunnerDead
from nanovllm.request import Finish
from nanovllm.runner import ModelRunner

from .backoff import Backoff
from .call import Call
from .dialects import Piece
from .errors import UpstreamError
from .stream import Inbox, Source, Stream

if TYPE_CHECKING:
    from nanovllm.hookspecs import Context

    from .dialects import Dialect, Facts
    from .options import HttpOptions
    from .servers import Servers

# Where neither the server nor the user names the model's length: the server refuses what is too long for it.
UNKNOWN_LENGTH = 1 << 20
CLOSE_SECONDS = 10.0  # for readers to end, of which only one that connects needs any time
# Tokens that a server computes together arrive one after another: steps this far apart take them together. Where
# tokens come less often than that, none waits.
STEP_INTERVAL = 2e-3  # seconds
MAX_LOGPROB = 1e-3  # 0 is the most that a log-probability can be; servers round


@dataclass(slots=True)
class Live:
    """A sequence whose answer is not complete; the engine's thread alone looks at it."""

    stream: Stream
    opened: float  # when its prompt was sent, in seconds
    last: float | None = None  # when a token or a piece of text last came
    pending: deque[Piece | NanoVLLMError] = field(default_factory=deque)  # arrived, not handed out
    has_ended: bool = False  # its last piece has arrived


class CompletionRunner(ModelRunner):
    def __init__(
        self,
        servers: Servers,
        dialect: Dialect,
        facts: Facts,
        options: HttpOptions,
        ctx: Context,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[Call, float], None] = Call.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        tokenizer = ctx.tokenizer
        self._info = RunnerInfo(
            vocab_size=facts.vocabulary(tokenizer),
            max_model_len=facts.length(ctx.max_model_len, UNKNOWN_LENGTH),
            max_num_seqs=ctx.max_num_seqs,
            kv=Remote(),
            tokenizes=tokenizer is None or not facts.takes_ids,
            supports=dialect.supports - facts.lacks,
            eos_ids=facts.eos_ids,
            description=facts.described("completion"),
        )
        self._servers = servers
        self._source = Source(servers, dialect, facts, options.extra, Backoff(options.retries, jitter), pause)
        self._timeouts = options.timeouts
        self._clock = clock
        self._inbox: Inbox = Inbox()
        self._live: dict[int, Live] = {}  # by seq_id
        self._next_step = 0.0  # when the next tokens are handed out at the earliest, by time.monotonic
        self._ending: list[Stream] = []  # released, and perhaps still reading

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        for seq in batch.seqs:
            if seq.seq_id not in self._live:
                self._live[seq.seq_id] = Live(Stream(seq, self._source, self._inbox), self._clock())
        lives = [self._live[seq.seq_id] for seq in batch.seqs]
        self._gather(lives)
        return [self._output(seq, live) for seq, live in zip(batch.seqs, lives, strict=True)]

    def wake(self) -> None:
        self._inbox.put(None)

    def release(self, seq_id: int, lane: int) -> None:
        live = self._live.pop(seq_id, None)
        if live is not None:
            if not live.has_ended:
                live.stream.abort()
            self._ending = [stream for stream in (*self._ending, live.stream) if stream.is_alive]

    def close(self) -> None:
        streams = [*self._ending, *(live.stream for live in self._live.values())]
        for stream in streams:
            stream.abort()
        self._servers.close()  # a reader may wait for a server to start
        patience = time.monotonic() + CLOSE_SECONDS
        for stream in streams:
            stream.join(max(0.0, patience - time.monotonic()))

    # ------------------------------------------------------------------------------ what arrived

    def _gather(self, lives: list[Live]) -> None:
        """Wait until anything is there to hand out, a deadline passes, or `wake`."""
        try:
            if not any(live.pending for live in lives):
                due = min(map(self._due, lives))
                mail = self._inbox.get(timeout=None if due == math.inf else max(0.0, due - self._clock()))
                self._file(mail)
                if mail is not None:
                    time.sleep(max(0.0, self._next_step - time.monotonic()))
            while True:
                self._file(self._inbox.get_nowait())
        except Empty:
            pass
        self._next_step = time.monotonic() + STEP_INTERVAL
        now = self._clock()
        for live in lives:
            if not live.pending and self._due(live) <= now:
                verdict = _of(live, self._too_late(live, now), can_retry=True)  # elsewhere: the server is not in order
                live.stream.abort(verdict)
                live.pending.append(verdict)

    def _file(self, mail: tuple[int, Piece | NanoVLLMError] | None) -> None:
        live = None if mail is None else self._live.get(mail[0])
        if mail is None or live is None:  # a wake; of one that was released meanwhile
            return
        came = mail[1]
        live.pending.append(came)
        if not isinstance(came, Piece):
            live.has_ended = True
        else:
            live.has_ended |= came.finish is not None
            if came.tokens or came.text:
                live.last = self._clock()

    def _due(self, live: Live) -> float:
        """When its server will have been silent for too long."""
        times = self._timeouts
        silence = live.opened + times.queue if live.last is None else live.last + times.read
        return silence if times.total is None else min(silence, live.opened + times.total)

    def _too_late(self, live: Live, now: float) -> str:
        times = self._timeouts
        if times.total is not None and now >= live.opened + times.total:
            return f"it did not complete its answer within {times.total:g} s (timeouts.total)"
        if live.last is None:
            return f"it sent no token within {times.queue:g} s (timeouts.queue)"
        return f"it stopped in the middle of its answer for {times.read:g} s (timeouts.read)"

    # ------------------------------------------------------------------------- what is handed out

    def _output(self, seq: ScheduledSeq, live: Live) -> SeqOutput:
        """All that is pending, as one output; an error comes alone, after what came before it."""
        tokens: list[int] = []
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        finish: Finish | None = None
        is_plain = False  # are there tokens that no text stands for?
        while live.pending and finish is None:
            came = live.pending[0]
            error = self._wrong(seq, live, came) if isinstance(came, Piece) else came
            if isinstance(came, Piece) and error is None:
                # An output's text stands for all of its tokens, so those without go into another one.
                if is_plain if came.text is not None else came.tokens and texts:
                    break
                live.pending.popleft()
                tokens += came.tokens
                logprobs += came.logprobs or ()
                if came.text is not None:
                    texts.append(came.text)
                else:
                    is_plain |= bool(came.tokens)
                finish = came.finish
            else:
                assert error is not None, "what is no piece is an error"
                if tokens or texts:
                    live.pending[0] = error
                    break
                live.pending.clear()
                if isinstance(error, RunnerDead):
                    raise error
                return SeqOutput(error=str(error))
        return SeqOutput(
            tuple(tokens),
            finish,
            logprobs=tuple(logprobs) if logprobs else None,
            text="".join(texts) if texts else None,
        )

    def _wrong(self, seq: ScheduledSeq, live: Live, piece: Piece) -> NanoVLLMError | None:
        """What no dialect may let through to the engine."""
        size = self._info.vocab_size or 1 << 31
        for token in piece.tokens:
            if not 0 <= token < size:
                return _of(live, f"it sent the token id {token}, outside its vocabulary of {size} entries")
        if seq.sampling.params.logprobs is None or not piece.tokens:
            return None
        if len(piece.logprobs or ()) != len(piece.tokens):
            return _of(live, f"it sent {len(piece.logprobs or ())} log-probabilities for {len(piece.tokens)} tokens")
        for one in piece.logprobs or ():
            for token, value in ((one.token_id, one.logprob), *one.top):
                if not value <= MAX_LOGPROB or not 0 <= token < size:  # NaN is not <= anything
                    return _of(live, f"it sent the log-probability {value} of the token id {token}")
        return None


def _of(live: Live, sentence: str, *, can_retry: bool = False) -> UpstreamError:
    """An error of the server that a stream comes from; its sentence says `it`."""
    return UpstreamError(sentence, can_retry=can_retry).at(live.stream.url or "no server")
