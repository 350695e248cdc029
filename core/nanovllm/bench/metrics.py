"""The three figures, of anything that can generate, ours or not. Each is tokens over seconds:

    prefill     P / T(one prompt of P tokens, 1 new token)
    decode      N / (T(one short prompt, N + 1 new) - T(the same, 1 new)): the speed of one stream
    throughput  all output tokens / T(all requests, sent at once)

This file knows no engine, no process and no table.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ..errors import RunnerError
from .workload import DECODE_TOKENS, Job, Workload

METRICS = ("prefill", "decode", "throughput")

Tokens: TypeAlias = "list[list[int]]"  # per job, in order


class Timed(NamedTuple):
    seconds: float
    tokens: Tokens


Generate: TypeAlias = Callable[[Sequence[Job]], Timed]


class Sample(NamedTuple):
    """One reading of one metric."""

    num_tokens: int
    seconds: float
    tokens: Tokens  # what was generated

    @property
    def rate(self) -> float | None:
        """Tokens per second; None where the clock saw no time pass."""
        return self.num_tokens / self.seconds if self.seconds > 0 else None


def take(metric: str, generate: Generate, workload: Workload) -> Sample | None:
    """One reading; None if the workload has no prompt for it. Raises RunnerError if a job came back short."""
    if metric == "throughput":
        done = _checked(generate, workload.jobs)
        return Sample(workload.num_output_tokens, done.seconds, done.tokens)
    prompt = workload.prefill if metric == "prefill" else workload.decode
    if prompt is None:
        return None
    first = _checked(generate, [Job(prompt, 1)])
    if metric == "prefill":
        return Sample(len(prompt), first.seconds, first.tokens)
    whole = _checked(generate, [Job(prompt, 1 + DECODE_TOKENS)])
    return Sample(DECODE_TOKENS, whole.seconds - first.seconds, whole.tokens)


def _checked(generate: Generate, jobs: Sequence[Job]) -> Timed:
    done = generate(jobs)
    if len(done.tokens) != len(jobs):
        raise RunnerError(f"{len(done.tokens)} answers came back for {len(jobs)} requests")
    for i, (job, tokens) in enumerate(zip(jobs, done.tokens, strict=True)):
        if len(tokens) != job.num_tokens:
            raise RunnerError(f"request {i} gave {len(tokens)} tokens instead of {job.num_tokens}")
    return done


@dataclass(frozen=True, slots=True)
class Rate:
    """Readings of one metric."""

    num_tokens: int
    seconds: tuple[float, ...]  # per run

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Rate | None:
        return cls(samples[0].num_tokens, tuple(s.seconds for s in samples)) if samples else None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Of the median run; None where the clock saw no time pass."""
        return self.num_tokens / self.median_seconds if self.median_seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """Interpolated between the two nearest values; None of nothing."""
        import numpy as np

        return cls(*np.percentile(values, (50, 90, 99)).tolist()) if len(values) else None
