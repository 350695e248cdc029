"""StepRunner: one call for each engine step, for the whole batch. The server advances each sequence by a token.

What the server knows is never relied on: it is told the length from which a sequence is to be advanced, so a call that
is repeated gives the same token again, and a sequence that it does not know (any more) is sent to it as a whole. Knows
no socket; retries within a call are the transport's.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Any

from nanovllm.batch import Batch, Remote, RunnerInfo, ScheduledSeq, SeqOutput
from nanovllm.runner import ModelRunner

from . import wire
from .dialects.nanovllm import NanoVLLM
from .errors import UpstreamError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nanovllm.hookspecs import Context

    from .dialects import Facts
    from .options import HttpOptions
    from .servers import Servers
    from .transport import Transport

log = logging.getLogger("nanovllm.http")

UNKNOWN_LENGTH = 4096  # where neither the server nor the user says the model's length
RELEASE_SECONDS = 2.0  # for a call that only tidies up


class StepRunner(ModelRunner):
    def __init__(self, servers: Servers, facts: Facts, options: HttpOptions, ctx: Context) -> None:
        self._info = RunnerInfo(
            vocab_size=facts.vocabulary(ctx.tokenizer),
            max_model_len=facts.length(ctx.max_model_len, UNKNOWN_LENGTH),
            max_num_seqs=ctx.max_num_seqs if facts.num_slots is None else min(ctx.max_num_seqs, facts.num_slots),
            kv=Remote(),
            supports=NanoVLLM.supports - facts.lacks,
            eos_ids=facts.eos_ids,
            description=facts.described("step"),
        )
        self._servers = servers
        self._step = {"extended": self._extended, "sequences": self._sequences, "batch": self._batch}[
            facts.kind or "sequences"
        ]
        self._transport: Transport | None = None  # the server that knows our sequences
        self._client = secrets.token_hex(8)  # whose sequence ids ours are
        self._num_calls = 0
        self._known: dict[int, int] = {}  # seq_id -> its length when the server last advanced it
        self._released: list[int] = []  # known to the server, and over

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def execute(self, batch: Batch) -> list[SeqOutput]:
        """A call that fails ends the sequences of the step, never the engine: the server may be back for the next."""
        tried: list[Transport] = []
        while True:
            try:
                transport = self._server(tried)
            except UpstreamError as e:
                return _failed(e, len(batch))
            try:
                return [_output(answer, transport.url) for answer in self._step(transport, batch.seqs)]
            except wire.WireError as e:
                failure = UpstreamError(f"{transport.url}: {e.message}")
            except UpstreamError as e:
                failure = e
            # It may know our sequences or not: the next call tells it everything.
            self._leave(transport, failure)
            tried.append(transport)
            if not failure.can_retry or len(tried) == len(self._servers.transports):
                return _failed(failure, len(batch))
            log.warning("%s; another server goes on", failure)

    def release(self, seq_id: int, lane: int) -> None:
        """The server hears of it with the next call, or now if there may be none for long."""
        if self._known.pop(seq_id, None) is None:
            return
        self._released.append(seq_id)
        transport = self._transport
        if not self._known and transport is not None:
            try:
                self._post(transport, (), retries=0, timeout=RELEASE_SECONDS)
            except (UpstreamError, wire.WireError) as e:  # it frees what nobody asks for, by itself
                log.info("%s; the server was not told that sequences are over", e)

    def close(self) -> None:
        if self._transport is not None:
            self._servers.release(self._transport, None)
            self._transport = None
        self._servers.close()

    # ------------------------------------------------------------------------------------- servers

    def _server(self, tried: Sequence[Transport]) -> Transport:
        """The one that knows our sequences, else any. Raises UpstreamError, RunnerDead."""
        if self._transport is None:
            self._transport = self._servers.acquire(tried)
        return self._transport

    def _leave(self, transport: Transport, failure: UpstreamError) -> None:
        self._servers.release(transport, failure)
        self._transport = None
        self._known.clear()
        self._released.clear()

    # -------------------------------------------------------------------------------- three ways to ask

    def _extended(self, transport: Transport, seqs: Sequence[ScheduledSeq]) -> list[wire.Answer]:
        answers = self._post(transport, [self._ask(s, self._known.get(s.seq_id)) for s in seqs])
        if strangers := [i for i, answer in enumerate(answers) if answer.is_unknown]:
            again = self._post(transport, [self._ask(seqs[i], None) for i in strangers])
            for i, answer in zip(strangers, again, strict=True):
                answers[i] = answer._replace(error="the server does not take it") if answer.is_unknown else answer
        for s, answer in zip(seqs, answers, strict=True):
            self._known[s.seq_id] = len(s.context)
            if answer.token is not None and s.sampling.params.logprobs is not None and answer.logprob is None:
                raise wire.WireError(f"the answer lacks the log-probabilities of sequence {s.seq_id}")
        return answers

    def _ask(self, s: ScheduledSeq, known: int | None) -> wire.Ask:
        length = len(s.context)
        if known is not None:
            # Asked again, because it was still computing the prompt: the scores come with the first token.
            unscored = s.context[1:].tolist() if length == s.num_prompt else ()
            return wire.Ask(s.seq_id, length, s.context[known:].tolist(), None, unscored)
        start = wire.start_of(s.sampling, s.num_prompt, s.cache_salt, is_resumed=length > s.num_prompt)
        return wire.Ask(s.seq_id, length, s.context.tolist(), start)

    def _post(self, transport: Transport, asks: Sequence[wire.Ask], **options: Any) -> list[wire.Answer]:
        self._num_calls += 1
        step = wire.Step(self._client, self._num_calls, asks, tuple(self._released))
        data = transport.post(wire.STEP_PATH, wire.step_json(step), **options)
        answers = wire.read_answers(data, step, self._info.vocab_size)
        self._released.clear()
        return answers

    def _sequences(self, transport: Transport, seqs: Sequence[ScheduledSeq]) -> list[wire.Answer]:
        plain = [wire.Plain(s.context.tolist(), s.sampling.params.temperature) for s in seqs]
        data = transport.post(wire.STEP_PATH, wire.sequences_json(plain, _has_prompt(seqs)))
        return wire.read_tokens(data, len(seqs), self._info.vocab_size)

    def _batch(self, transport: Transport, seqs: Sequence[ScheduledSeq]) -> list[wire.Answer]:
        """One call for each temperature: this shape has room for one."""
        answers: dict[int, wire.Answer] = {}
        for temperature in dict.fromkeys(s.sampling.params.temperature for s in seqs):
            some = [s for s in seqs if s.sampling.params.temperature == temperature]
            body = wire.batch_json([s.context.tolist() for s in some], temperature, _has_prompt(some))
            data = transport.post(wire.BATCH_PATH, body)
            for s, answer in zip(some, wire.read_tokens(data, len(some), self._info.vocab_size), strict=True):
                answers[s.seq_id] = answer
        return [answers[s.seq_id] for s in seqs]


def _has_prompt(seqs: Sequence[ScheduledSeq]) -> bool:
    return any(len(s.context) == s.num_prompt for s in seqs)


def _output(answer: wire.Answer, url: str) -> SeqOutput:
    if answer.error is not None:
        return SeqOutput(error=f"{url}: {answer.error}")
    return SeqOutput(
        () if answer.token is None else (answer.token,),
        logprobs=None if answer.logprob is None else (answer.logprob,),
        prompt_logprobs=None if answer.prompt_logprobs is None else tuple(answer.prompt_logprobs),
    )


def _failed(failure: UpstreamError, num: int) -> list[SeqOutput]:
    return [SeqOutput(error=str(failure))] * num
