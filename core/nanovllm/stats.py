"""Numbers about the engine, as values: per step for observers, summed up for people.

Times are seconds. Knows nothing about where they are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple


class Phase(NamedTuple):
    """One of the five stages of the pipeline: tokenize, prefill, decode, sample, detokenize."""

    name: str
    start: float  # seconds by the engine's clock
    duration: float  # seconds
    num_tokens: int  # that it worked on; sequences, for the stages sample and detokenize


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step. Prefill and decode share one forward pass: its time is split by their tokens."""

    step: int  # 1, 2, ...
    start: float  # seconds by the engine's clock
    schedule_seconds: float
    forward_seconds: float  # the runner's time without sampling
    sample_seconds: float
    advance_seconds: float  # appending, detokenizing, stop strings, committing
    num_seqs: int  # sequences in the batch
    num_prefill_tokens: int  # all others: of prompts, and what is computed again
    num_decode_tokens: int  # computed one per sequence, behind its prompt
    num_running: int  # sequences that hold a lane
    num_waiting: int  # sequences that wait for one
    num_preemptions: int  # since the engine started
    kv_blocks_used: int | None  # None unless the runner's KV is paged
    kv_blocks_total: int | None  # the pool
    error: str | None = None  # why the step failed, if it did

    @property
    def prefill_seconds(self) -> float:
        """The part of the forward pass that is its prefill tokens'."""
        share = self.num_prefill_tokens / max(1, self.num_prefill_tokens + self.num_decode_tokens)
        return self.forward_seconds * share  # in this order: a share of 1 leaves exactly nothing to decode

    @property
    def decode_seconds(self) -> float:
        """The rest of the forward pass."""
        return self.forward_seconds - self.prefill_seconds

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The step on a time line: what ran, when, on how many tokens."""
        at = self.start + self.schedule_seconds
        out = []
        for name, seconds, tokens in (
            ("prefill", self.prefill_seconds, self.num_prefill_tokens),
            ("decode", self.decode_seconds, self.num_decode_tokens),
            ("sample", self.sample_seconds, self.num_seqs),
            ("detokenize", self.advance_seconds, self.num_seqs),
        ):
            if tokens:
                out.append(Phase(name, at, seconds, tokens))
            at += seconds
        return tuple(out)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """Sums since the engine started."""

    num_steps: int = 0
    num_failed_steps: int = 0
    num_requests: int = 0
    num_prefill_tokens: int = 0  # prompt tokens computed (and recomputed after preemption)
    num_decode_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    num_preemptions: int = 0
    schedule_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    sample_seconds: float = 0.0
    advance_seconds: float = 0.0

    def since(self, before: EngineStats) -> EngineStats:
        """The part of these sums that came after `before`."""
        return EngineStats(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})

    def plus(self, step: StepStats) -> EngineStats:
        """These sums with one more step."""
        return replace(
            self,
            num_steps=self.num_steps + 1,
            num_failed_steps=self.num_failed_steps + (step.error is not None),
            num_prefill_tokens=self.num_prefill_tokens + step.num_prefill_tokens,
            num_decode_tokens=self.num_decode_tokens + step.num_decode_tokens,
            schedule_seconds=self.schedule_seconds + step.schedule_seconds,
            prefill_seconds=self.prefill_seconds + step.prefill_seconds,
            decode_seconds=self.decode_seconds + step.decode_seconds,
            sample_seconds=self.sample_seconds + step.sample_seconds,
            advance_seconds=self.advance_seconds + step.advance_seconds,
        )

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prefill tokens over the time of their forward passes; None before the first."""
        return self.num_prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Decode tokens over the time of their forward passes; None before the first."""
        return self.num_decode_tokens / self.decode_seconds if self.decode_seconds > 0 else None


class KvBlocks(NamedTuple):
    """The pool now. used + free = total; of the used ones some are shared, of the free ones some still cached."""

    total: int
    used: int  # owned by at least one sequence
    shared: int  # owned by more than one
    cached: int  # free, and the next prompt with the same beginning still finds them


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """May traffic be sent here? `reason` says why not."""

    is_live: bool  # False: dead or closed, only a restart helps
    is_ready: bool  # False also while work waits longer than the stall limit
    reason: str | None
    num_running: int
    num_waiting: int
    seconds_without_progress: float | None  # since a step last completed; None while there is no work
