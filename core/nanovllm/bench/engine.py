"""One of our engines under measurement: it runs jobs, greedy and to their full length, and notes what happened.

The engine's own statistics are read after every step. Knows no workload file, no process and no table.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..engine import Engine
from ..errors import RequestError, RequestFailed
from ..intake import Ticket
from ..request import Completion, Request, RequestStats, SamplingParams
from ..stats import EngineStats
from .workload import Job


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a run. Times are seconds."""

    end: float  # since the run began
    total: float  # the whole step
    schedule: float
    forward: float  # the runner's part: packing the batch and computing the logits
    sample: float
    advance: float  # appending, detokenizing, committing

    @property
    def overhead(self) -> float:
        """All that is not the runner's forward pass."""
        return self.total - self.forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What one call of `EngineBench.run` saw. Times are seconds."""

    seconds: float
    tokens: list[list[int]]  # per job
    requests: tuple[RequestStats, ...]  # per job
    steps: tuple[Step, ...]
    gaps: tuple[tuple[float, float], ...]  # (moment since the run began, time since the sequence's token before)
    stats: EngineStats  # of this run alone
    max_running: int  # sequences that ran at once
    max_blocks: int | None  # KV blocks in use at the end of a step, at most; None unless KV is paged


class EngineBench:
    """Runs jobs on an engine that the caller owns and closes."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.perf_counter) -> None:
        self.engine = engine
        self._clock = clock
        self._num_runs = 0

    def run(self, jobs: Sequence[Job]) -> Run:
        """All jobs at once. Raises RequestError before anything runs, RequestFailed if one ended in an error.

        Each run has its own cache salt: what an earlier run left in the prefix cache is no help, what the
        jobs of this one share is.
        """
        engine, clock = self.engine, self._clock
        self._num_runs += 1
        salt = f"bench {self._num_runs}"
        before = engine.stats()
        started = clock()
        tickets = [self._prepare(job, f"request {i}", salt) for i, job in enumerate(jobs)]
        for ticket in tickets:
            engine.add(ticket)
        completions: dict[int, Completion] = {}  # request_id -> its end
        last_token: dict[int, float] = {}  # request_id -> when its last token came
        steps: list[Step] = []
        gaps: list[tuple[float, float]] = []
        max_running, manager = 0, engine.scheduler.manager
        max_blocks = None if manager is None else manager.num_used
        totals = engine.stats()
        while engine.has_work:
            began = clock()
            deltas = engine.step()
            now = clock()
            stats = engine.stats()
            steps.append(_step(stats.since(totals), now - started, now - began))
            totals = stats
            for delta in deltas:
                if delta.token_ids:
                    if delta.request_id in last_token:
                        gaps.append((now - started, now - last_token[delta.request_id]))
                    last_token[delta.request_id] = now
                if delta.output is not None:
                    completions[delta.request_id] = delta.output
            # Those that ended in this step have left already, so they are counted by their last delta.
            ended = sum(delta.output is not None for delta in deltas)
            max_running = max(max_running, len(engine.scheduler.running) + ended)
            if manager is not None:
                max_blocks = max(max_blocks or 0, manager.num_used)
        seconds = clock() - started
        ends = [completions[ticket.request_id] for ticket in tickets]
        if failed := [(i, end.error) for i, end in enumerate(ends) if end.error is not None]:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RequestFailed(f"request {failed[0][0]}{more} failed: {failed[0][1]}")
        return Run(
            seconds=seconds,
            tokens=[list(end.token_ids) for end in ends],
            requests=tuple(end.stats for end in ends),
            steps=tuple(steps),
            gaps=tuple(gaps),
            stats=totals.since(before),
            max_running=max_running,
            max_blocks=max_blocks,
        )

    def _prepare(self, job: Job, where: str, salt: str) -> Ticket:
        params = SamplingParams(temperature=0.0, max_tokens=job.num_tokens, ignore_eos=True)
        try:
            return self.engine.prepare(Request(prompt=job.prompt, params=params, cache_salt=salt))
        except RequestError as e:
            raise RequestError(f"{where}: {e.message}", hint=e.hint) from None


def _step(stats: EngineStats, end: float, total: float) -> Step:
    return Step(
        end=end,
        total=total,
        schedule=stats.schedule_seconds,
        forward=stats.prefill_seconds + stats.decode_seconds,
        sample=stats.sample_seconds,
        advance=stats.advance_seconds,
    )
