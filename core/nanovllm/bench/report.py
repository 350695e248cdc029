"""One engine's figures as a value, and how they are taken. Knows no table and no other engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from . import machine, memory
from .engine import EngineBench, Run
from .metrics import METRICS, Percentiles, Rate, Sample, Timed, take
from .workload import Job, Workload

if TYPE_CHECKING:
    from ..engine import Engine
    from .trace import Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes; None where the system does not tell."""

    base: int | None  # before the model was loaded
    loaded: int | None  # after it was loaded and warm
    per_request: int | None  # growth during the first workload run / sequences that ran at once
    peak: int | None  # of the whole process


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The engine's own time: all that a step takes besides the runner's forward pass. Seconds per step."""

    num_steps: int  # per run
    overhead: Percentiles | None
    schedule: Percentiles | None
    sample: Percentiles | None
    advance: Percentiles | None
    overhead_share: float | None  # of the time of all steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    num_blocks: int | None  # None unless KV is paged
    max_blocks: int | None  # in use at the end of a step, at most
    num_preemptions: int  # per run, at most
    num_cached_tokens: int  # prompt tokens per run taken from the prefix cache, at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    subject: dict[str, Any]  # model, runner, and what the runner says of itself
    machine: dict[str, Any]
    workload: dict[str, Any]
    prefill: Rate | None  # None where the workload has no prompt for it
    decode: Rate | None
    throughput: Rate  # output tokens
    ttft: Percentiles | None  # seconds, over the requests of all runs
    tpot: Percentiles | None  # seconds; per request the mean time per token after the first
    gap: Percentiles | None  # seconds between two tokens of one sequence
    queue: Percentiles | None  # seconds from arrival to first scheduled
    steps: Steps
    memory: Memory
    cache: Cache
    last_run: Run  # for plots; not part of the JSON document

    @property
    def total_tokens_per_second(self) -> float | None:
        """Prompt and output tokens of the workload per second."""
        rate = self.throughput.tokens_per_second
        tokens = self.workload["prompt_tokens"] + self.workload["output_tokens"]
        return None if rate is None else rate * tokens / self.workload["output_tokens"]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the rates spelled out."""
        out = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "last_run"}
        out = {
            name: asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
            for name, value in out.items()
        }
        for metric in METRICS:
            if (rate := getattr(self, metric)) is not None:
                out[metric]["tokens_per_second"] = rate.tokens_per_second
        return out | {"total_tokens_per_second": self.total_tokens_per_second}


def measure(
    load: Callable[[], Engine],
    workload_for: Callable[[int | None, int], Workload],
    *,
    runs: int,
    describe: Callable[[Engine], dict[str, Any]],
    clock: Callable[[], float] = time.perf_counter,
    on_progress: Callable[[str], None] = lambda text: None,
    tracer: Tracer | None = None,
) -> Report:
    """Load an engine, warm it up, and take every figure `runs` times. Closes the engine.

    `tracer` sees one more run of the workload, after the measured ones: it costs none of them anything.

    `workload_for` gets the vocabulary's size and the length of the longest sequence. Raises what loading does,
    RequestError for a workload that the engine cannot run, RequestFailed if a request ended in an error.
    """
    facts = machine.describe()
    base = memory.resident()
    on_progress("loading")
    engine = load()
    try:
        bench = EngineBench(engine, clock)
        workload = workload_for(engine.info.vocab_size, engine.max_len)
        workload.check(engine.info.vocab_size, engine.max_len)
        done: list[Run] = []  # by every call of `generate`

        def generate(jobs: Sequence[Job]) -> Timed:
            done.append(bench.run(jobs))
            return Timed(done[-1].seconds, done[-1].tokens)

        on_progress("warming up")
        for metric in ("prefill", "decode"):
            take(metric, generate, workload)
        loaded, grown = memory.resident(), None
        samples: dict[str, list[Sample]] = {metric: [] for metric in METRICS}
        whole: list[Run] = []  # those of the workload itself
        for i in range(runs):
            for metric in METRICS:
                on_progress(f"run {i + 1} of {runs}: {metric}")
                if (sample := take(metric, generate, workload)) is not None:
                    samples[metric].append(sample)
            whole.append(done[-1])
            grown = grown or memory.resident()
        manager = engine.scheduler.manager
        subject, peak = describe(engine), memory.peak()
        if tracer is not None:
            on_progress("one more run, traced")
            engine.observe(tracer)
            bench.run(workload.jobs)
    finally:
        engine.close()
    throughput = Rate.of(samples["throughput"])
    assert throughput is not None, "a workload has at least one request, and there is at least one run"
    per_request = (
        None if loaded is None or grown is None else max(0, grown - loaded) // max(r.max_running for r in whole)
    )
    requests = [stats for run in whole for stats in run.requests]
    return Report(
        subject=subject,
        machine=facts,
        workload=workload.summary() | {"runs": runs},
        prefill=Rate.of(samples["prefill"]),
        decode=Rate.of(samples["decode"]),
        throughput=throughput,
        ttft=_percentiles(r.ttft for r in requests),
        tpot=_percentiles(r.tpot for r in requests),
        gap=_percentiles(gap for run in whole for _, gap in run.gaps),
        queue=_percentiles(r.queue_time for r in requests),
        steps=_steps(whole),
        memory=Memory(base=base, loaded=loaded, per_request=per_request, peak=peak),
        cache=Cache(
            num_blocks=None if manager is None else manager.num_blocks,
            max_blocks=None if manager is None else max(r.max_blocks or 0 for r in whole),
            num_preemptions=max(r.stats.num_preemptions for r in whole),
            num_cached_tokens=max(r.stats.num_cached_tokens for r in whole),
        ),
        last_run=whole[-1],
    )


def _steps(runs: Sequence[Run]) -> Steps:
    steps = [step for run in runs for step in run.steps]
    total = sum(step.total for step in steps)
    return Steps(
        num_steps=len(runs[-1].steps),
        overhead=_percentiles(step.overhead for step in steps),
        schedule=_percentiles(step.schedule for step in steps),
        sample=_percentiles(step.sample for step in steps),
        advance=_percentiles(step.advance for step in steps),
        overhead_share=sum(step.overhead for step in steps) / total if total > 0 else None,
    )


def _percentiles(values: Iterable[float | None]) -> Percentiles | None:
    return Percentiles.of([value for value in values if value is not None])
