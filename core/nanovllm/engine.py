"""Engine: add requests, step, collect deltas. `step()` is four verbs: schedule, execute, advance, commit.

`_advance` is the one place where a token is appended and an end is decided; text and stop strings are
decided before commit, so no token is computed after a stop. Failure rules: a sequence's error ends that
sequence; an exception from the runner ends the sequences of that step; RunnerDead, or three failing
steps in a row, ends all and marks the engine dead. Every accepted request gets a last delta.

One thread calls an engine (`prepare` and `health` may be called from any). Knows no backend, no model
format and no network.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from .batch import Batch, Paged, Remote, SeqOutput, TokenLogprob
from .blocks import HashBlock, sha256_chain
from .errors import ConfigError, EngineClosed, EngineDead, RunnerDead, RunnerError
from .guard import GuardedSampler
from .intake import Intake, Limits, Ticket
from .request import Completion, Delta, Finish, Request
from .runner import LogitsRunner, ModelRunner, Sampler
from .scheduler import Scheduler
from .sequence import Sequence
from .stats import EngineStats, Health, KvBlocks, StepStats
from .tokenizer import Tokenizer

log = logging.getLogger("nanovllm.engine")

MAX_FAILED_STEPS = 3  # in a row, after which the engine is dead


class Engine:
    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Tokenizer | None = None,
        *,
        sampler: Sampler | None = None,  # None = the core's NumpySampler, for runners that return logits
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 2048,
        prefix_caching: bool = True,
        eos_ids: Iterable[int] | None = None,  # None = what the model's and the tokenizer's files name
        stall_seconds: float = 120.0,  # work without a finished step for this long is reported as not ready
        observers: Iterable[Any] = (),
        clock: Callable[[], float] = time.perf_counter,  # seconds
        hash_block: HashBlock = sha256_chain,
    ) -> None:
        self.runner = runner
        self.tokenizer = tokenizer
        self.info = runner.info
        self.stall_seconds = stall_seconds
        self._clock = clock

        def new_scheduler() -> Scheduler:
            return Scheduler(
                self.info,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                prefix_caching=prefix_caching,
                on_release=self._on_release,
                hash_block=hash_block,
            )

        self._new_scheduler = new_scheduler
        self.scheduler = new_scheduler()
        if max_num_batched_tokens < self.scheduler.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({max_num_batched_tokens}) is smaller than max_num_seqs "
                f"({self.scheduler.max_num_seqs}), so a step could not give every sequence a token",
                hint="raise the first or lower the second",
            )
        limits = Limits(
            max_len=self.scheduler.max_len,
            max_num_batched_tokens=max_num_batched_tokens,
            is_preemptible=isinstance(self.info.kv, Paged),
            can_share=self.scheduler.can_share,
        )
        self._intake = Intake(self.info, tokenizer, limits, eos_ids=eos_ids, clock=clock)
        self.eos_ids = self._intake.eos_ids

        self._sampler: GuardedSampler | None = None
        if isinstance(runner, LogitsRunner):
            if sampler is None:
                from .sampler import NumpySampler

                sampler = NumpySampler()
            self._sampler = GuardedSampler(sampler, clock)
            runner.sampler = self._sampler

        self._observers = list(observers)
        self._live: dict[int, Sequence] = {}  # seq_id -> sequence
        self._tickets: dict[int, Ticket] = {}  # request_id -> ticket with live sequences
        self._arrivals = itertools.count(1)
        self._out: list[Delta] = []  # deltas not handed out yet; an interrupted step loses none
        self._late_aborts: list[int] = []  # request ids that were aborted from inside a step
        self._totals = EngineStats()
        self._num_failed = 0  # steps in a row
        self._last_progress = clock()  # when a step last completed, or work came to an idle engine
        self._is_stepping = False  # while True, state may be half changed
        self._dead: str | None = None  # why
        self._is_closed = False

    # ---------------------------------------------------------------------------- taking requests

    def prepare(self, request: Request) -> Ticket:
        """Check and tokenize, changing nothing. Raises RequestError, EngineDead, EngineClosed."""
        self._refuse_if_over()
        return self._intake.prepare(request)

    def add(self, request: Request | Ticket) -> Ticket:
        """Accept a request: from here on it gets an answer. Raises as `prepare` does."""
        ticket = request if isinstance(request, Ticket) else self.prepare(request)
        self._refuse_if_over()
        self._note_work()
        arrival_number = next(self._arrivals)
        self._tickets[ticket.request_id] = ticket
        for seq in ticket.sequences:
            seq.order = (ticket.request.priority, arrival_number, seq.index)
            self._live[seq.seq_id] = seq
            self.scheduler.add(seq)
        self._totals = replace(self._totals, num_requests=self._totals.num_requests + 1)
        self._tell("on_request", ticket)
        self.wake()
        return ticket

    def grant(self, request_id: int, num_output: int) -> None:
        """Let a PacedRequest go on until it has generated `num_output` tokens in all. Unknown or ended ids are fine."""
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            self._note_work()
            self.scheduler.grant(ticket.sequences[0], num_output)

    def abort(self, request_id: int) -> None:
        """End a request now; its blocks are free on return. Unknown or finished ids are fine.

        From inside a step (an observer, or a forgotten stream that the garbage collector closes) it takes
        effect when the step ends.
        """
        if self._is_stepping:
            self._late_aborts.append(request_id)
            return
        ticket = self._tickets.get(request_id)
        if ticket is not None:
            for seq in ticket.sequences:
                if seq.finish is None:
                    self._end(seq, Finish.ABORT)
            self.wake()

    def wake(self) -> None:
        """Have a blocked runner return at once. From any thread."""
        try:
            self.runner.wake()
        except Exception:
            log.exception("the runner failed to wake")

    @property
    def has_work(self) -> bool:
        """Would a step do or return anything? False also while all that lives rests, for want of a grant."""
        return self.scheduler.has_work or bool(self._out)

    # ------------------------------------------------------------------------------------ a step

    def step(self) -> list[Delta]:
        """Advance every sequence that the budget allows; returns what came of it, possibly nothing."""
        if self._is_closed:
            raise EngineClosed("the engine is closed", hint="create a new one")
        if self._is_stepping:  # only if `_recover` itself was interrupted
            self._recover()
        self._is_stepping = True
        try:
            self._step()
        except BaseException:  # an interrupt, or a bug of ours
            if self._is_stepping:
                self._recover()
            raise
        self._is_stepping = False
        while self._late_aborts:
            self.abort(self._late_aborts.pop())
        return self.take_deltas()

    def _step(self) -> None:
        t0 = self._clock()
        batch = self.scheduler.schedule(t0)
        if batch is None:
            return
        t1 = self._clock()
        error: str | None = None
        outputs: list[SeqOutput] = []
        try:
            outputs = self._execute(batch)
        except Exception as e:
            error = self._step_failed(e)
        except BaseException:  # an interrupt: this step never happened
            self.scheduler.rollback()
            self._is_stepping = False
            raise
        t2 = self._clock()
        if error is None:
            self._num_failed = 0
            for scheduled, out in zip(batch.seqs, outputs, strict=True):
                self._advance(self._live[scheduled.seq_id], out, t2)
            self.scheduler.commit()
        self._count(batch, outputs, error, t0, t1, t2)

    def _execute(self, batch: Batch) -> list[SeqOutput]:
        if self._sampler is not None:
            self._sampler.seconds = 0.0
        outputs = self.runner.execute(batch)
        if len(outputs) != len(batch.seqs):
            raise RunnerError(f"the runner returned {len(outputs)} outputs for {len(batch.seqs)} sequences")
        return outputs

    def _advance(self, seq: Sequence, out: SeqOutput, now: float) -> None:
        """Append what arrived, turn it into text, decide whether this is the end."""
        if out.prompt_logprobs:
            seq.prompt_logprobs += out.prompt_logprobs
        if out.error is not None or out.finish is Finish.ERROR:
            self._finish(seq, Finish.ERROR, error=out.error or "the runner gave up on it without a reason")
        elif out.tokens or out.text or out.finish is not None:
            try:
                text, num_accepted, finish = self._accept(seq, out, now)
            except Exception as e:
                log.exception("request %d: turning tokens into text failed", seq.request_id)
                self._finish(seq, Finish.ERROR, error=f"turning tokens into text failed: {_sentence(e)}")
                return
            tokens, logprobs = out.tokens[:num_accepted], None
            if seq.logprobs is not None and out.logprobs is not None:
                logprobs = out.logprobs[:num_accepted]
                seq.logprobs += logprobs
            if finish is not None:
                self._finish(seq, finish, text, tokens, logprobs)
                return
            if text:
                seq.text.append(text)
            self._out.append(Delta(seq.request_id, seq.index, text, tokens, logprobs))

    def _accept(self, seq: Sequence, out: SeqOutput, now: float) -> tuple[str, int, Finish | None]:
        """Append tokens up to the first end. Returns (new text, tokens accepted, why it ended or None)."""
        params, matcher, finish = seq.sampling.params, seq.matcher, out.finish
        if seq.first_token is None:
            seq.first_token = now
        seq.last_token = now
        text = ""
        num_accepted = 0
        # Pieces of (token, its text); a runner that tokenizes brings the text of the whole step.
        for token in out.tokens:
            seq.append(token)
            num_accepted += 1
            num_output = seq.num_tokens - seq.num_prompt
            if token in seq.sampling.stop_ids and num_output > params.min_tokens:
                seq.stop_reason = token
                finish = Finish.STOP
                break
            if out.text is None:
                piece = seq.stream.feed((token,))
                if matcher is not None:
                    piece, seq.stop_reason = matcher.feed(piece, num_output >= params.min_tokens)
                    if seq.stop_reason is not None:
                        return text + piece, num_accepted, Finish.STOP
                text += piece
            if num_output == params.max_tokens or seq.num_tokens >= seq.max_len:
                finish = finish or Finish.LENGTH
                break
        # The true end: what was held back is text after all, half a character becomes U+FFFD.
        rest = (out.text or "") + (seq.stream.flush() if finish is not None else "")
        if matcher is not None and (rest or finish is not None):
            rest, matched = matcher.feed(rest, seq.num_output >= params.min_tokens)
            if matched is not None:
                seq.stop_reason = matched
                return text + rest, num_accepted, Finish.STOP
            if finish is not None:
                rest += matcher.flush()
        return text + rest, num_accepted, finish

    # ----------------------------------------------------------------------------------- endings

    def _finish(
        self,
        seq: Sequence,
        finish: Finish,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        error: str | None = None,
    ) -> None:
        """The one last delta of a sequence. The scheduler frees what it holds at commit, or `_end` already did."""
        seq.finish = finish
        if text:
            seq.text.append(text)
        completion = Completion(
            index=seq.index,
            text="".join(seq.text),
            token_ids=seq.output_ids,
            finish=finish,
            stats=seq.stats(self._clock()),
            stop_reason=seq.stop_reason,
            logprobs=None if seq.logprobs is None else tuple(seq.logprobs),
            error=error,
        )
        del self._live[seq.seq_id]
        self._out.append(Delta(seq.request_id, seq.index, text, tokens, logprobs, finish, error, completion))
        if all(s.finish is not None for s in self._tickets[seq.request_id].sequences):
            del self._tickets[seq.request_id]
        self._tell("on_output", completion)

    def _end(self, seq: Sequence, finish: Finish, error: str | None = None) -> None:
        """End a sequence outside of `_advance`: it is freed now, its last delta comes with the next ones."""
        self.scheduler.remove(seq, suspect=finish is Finish.ERROR)
        held = seq.stream.flush()
        if seq.matcher is not None:
            held = seq.matcher.flush() + held
        self._finish(seq, finish, held, error=error)

    def _end_all(self, finish: Finish, error: str | None = None) -> None:
        for seq in list(self._live.values()):
            self._end(seq, finish, error)

    def take_deltas(self) -> list[Delta]:
        """Deltas that no step has returned yet (of aborts, of close), each given once."""
        deltas, self._out = self._out, []
        return deltas

    def _step_failed(self, cause: Exception) -> str:
        """The runner raised: the step's sequences fail, and perhaps the engine with them."""
        sentence = _sentence(cause)
        expected = isinstance(cause, RunnerError)
        log.error("step %d failed: %s", self._totals.num_steps + 1, sentence, exc_info=not expected)
        self._num_failed += 1
        for seq in self.scheduler.rollback():
            self._end(seq, Finish.ERROR, f"the runner failed: {sentence}")
        if isinstance(cause, RunnerDead):
            self._dead = f"the runner died: {sentence}"
        elif self._num_failed >= MAX_FAILED_STEPS:
            self._dead = f"{MAX_FAILED_STEPS} steps failed in a row, the last one with: {sentence}"
        if self._dead is not None:
            log.error("the engine is dead: %s", self._dead)
            self._end_all(Finish.ERROR, self._dead)
        return sentence

    def _recover(self) -> None:
        """State may be half changed: fail what is live and start over with an empty pool."""
        log.error("a step was interrupted in its bookkeeping; every live request fails")
        old, self.scheduler = self.scheduler, self._new_scheduler()
        self.scheduler.num_preemptions, self.scheduler.num_cached_tokens = old.num_preemptions, old.num_cached_tokens
        for seq in (*old.running, *old.resting.values()):
            if seq.lane is not None:
                self._on_release(seq.seq_id, seq.lane)
                seq.lane = None
        self._end_all(Finish.ERROR, "the engine was interrupted in the middle of its bookkeeping")
        self._is_stepping = False

    def close(self) -> None:
        """Abort what is live and close the runner. Raises RunnerError if it cannot. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            try:
                self._end_all(Finish.ABORT)
            finally:
                try:
                    self.runner.close()
                except Exception as e:
                    raise RunnerError(f"the runner failed to close: {_sentence(e)}") from e

    # ------------------------------------------------------------------------------------- facts

    @property
    def max_len(self) -> int:
        """Tokens, prompt and generated, that one sequence can hold: the model's limit or the KV pool's."""
        return self.scheduler.max_len

    def stats(self) -> EngineStats:
        scheduler = self.scheduler
        return replace(
            self._totals, num_preemptions=scheduler.num_preemptions, num_cached_tokens=scheduler.num_cached_tokens
        )

    def health(self) -> Health:
        """From any thread, also while a step hangs."""
        waited = self._clock() - self._last_progress if self.scheduler.has_work else None
        over = "the engine is closed" if self._is_closed else self._dead
        stalled = None
        if waited is not None and waited > self.stall_seconds:
            stalled = f"work waits and no step has completed for {waited:.0f} s (limit {self.stall_seconds:.0f} s)"
        return Health(
            is_live=over is None,
            is_ready=over is None and stalled is None,
            reason=over or stalled,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            seconds_without_progress=waited,
        )

    def kv_blocks(self) -> KvBlocks | None:
        """From any thread; None unless the runner's KV is paged."""
        manager = self.scheduler.manager
        if manager is None:
            return None
        return KvBlocks(manager.num_blocks, manager.num_used, manager.num_shared, manager.num_cached)

    def observe(self, observer: Any) -> None:
        """Tell one more observer, from the next event on. From any thread."""
        self._observers.append(observer)

    # ----------------------------------------------------------------------------------- details

    def _note_work(self) -> None:
        """Work comes: to an idle engine it is as if a step had just been completed."""
        if not self.scheduler.has_work:
            self._last_progress = self._clock()

    def _refuse_if_over(self) -> None:
        if self._is_closed:
            raise EngineClosed("the engine is closed", hint="create a new one")
        if self._dead is not None:
            raise EngineDead(f"the engine is dead: {self._dead}", hint="restart it")

    def _on_release(self, seq_id: int, lane: int) -> None:
        try:
            self.runner.release(seq_id, lane)
        except Exception:
            log.exception("the runner failed to release lane %d", lane)

    def _count(
        self, batch: Batch, outputs: list[SeqOutput], error: str | None, t0: float, t1: float, t2: float
    ) -> None:
        """Add a finished step to the totals and tell the observers."""
        sample = self._sampler.seconds if self._sampler is not None else 0.0
        if isinstance(self.info.kv, Remote):  # what arrived; the prompt counts when its first token comes
            num_decode = sum(len(out.tokens) for out in outputs)
            pairs = zip(batch.seqs, outputs, strict=False)  # a failed step has no outputs
            num_prefill = sum(s.num_prompt for s, out in pairs if out.tokens and len(s.context) == s.num_prompt)
        else:
            num_decode = sum(1 for s in batch.seqs if s.stop - s.start == 1 and s.stop > s.num_prompt)
            num_prefill = batch.num_tokens - num_decode
        manager = self.scheduler.manager
        t3 = self._clock()
        self._last_progress = t3
        step = StepStats(
            step=self._totals.num_steps + 1,
            start=t0,
            schedule_seconds=t1 - t0,
            forward_seconds=t2 - t1 - sample,
            sample_seconds=sample,
            advance_seconds=t3 - t2,
            num_seqs=len(batch.seqs),
            num_prefill_tokens=num_prefill,
            num_decode_tokens=num_decode,
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_preemptions=self.scheduler.num_preemptions,
            kv_blocks_used=None if manager is None else manager.num_used,
            kv_blocks_total=None if manager is None else manager.num_blocks,
            error=error,
        )
        self._totals = self._totals.plus(step)
        self._tell("on_step", step)

    def _tell(self, hook: str, value: object) -> None:
        """Call every observer; one that raises is logged once and detached."""
        for observer in self._observers[:]:
            try:
                if (call := getattr(observer, hook, None)) is not None:
                    call(value)
            except Exception:
                log.exception("observer %r failed in %s and is detached", observer, hook)
                self._observers.remove(observer)


def _sentence(e: BaseException) -> str:
    """The first line of an exception, with its type unless the text was written for people."""
    lines = str(e).strip().splitlines() or ["(no text)"]
    return lines[0] if isinstance(e, RunnerError) else f"{type(e).__name__}: {lines[0]}"
