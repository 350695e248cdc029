"""Engines in turns: A B B A, each in a child process that stays loaded, only one of them active at a time.

A reading of A and the reading of B beside it saw the same machine, so their ratio means something where the
readings themselves drift; a probe of the memory's bandwidth before and after each round shows the drift.
Knows no table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from ..errors import NanoVLLMError, RequestError, RunnerError
from . import machine
from .child import Child, ChildFailed, Contestant
from .machine import Probe
from .metrics import METRICS, Rate, Sample, Tokens, take
from .workload import Workload

# Threads that have just computed go on spinning for a moment, and would slow down whoever is measured next.
SETTLE_SECONDS = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One contestant's readings."""

    name: str
    facts: dict[str, Any]  # what the child said of itself
    rates: dict[str, Rate]  # metric -> all its readings
    peak_memory: int | None  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """`first` over `second`, above 1 where `first` is faster: one value per round, and what they come to."""

    metric: str
    first: str
    second: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How many requests of the workload had equal greedy tokens, in the round where the fewest had."""

    first: str
    second: str
    num_equal: int
    num_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    machine: dict[str, Any]
    workload: dict[str, Any]
    results: tuple[Result, ...]  # of those that came through, in the order given
    ratios: tuple[Ratio, ...]  # of every pair
    agreements: tuple[Agreement, ...]
    bandwidth: tuple[tuple[float, float], ...]  # GB/s before and after each round of each metric
    failures: dict[str, str]  # name -> why it is missing, one sentence

    def to_json(self) -> dict[str, Any]:
        """Plain values, with rates and spreads spelled out."""
        out = asdict(self)
        for result, row in zip(self.results, out["results"], strict=True):
            for metric, rate in result.rates.items():
                row["rates"][metric]["tokens_per_second"] = rate.tokens_per_second
        for ratio, row in zip(self.ratios, out["ratios"], strict=True):
            row |= {"median": ratio.median, "min": min(ratio.values), "max": max(ratio.values)}
        return out


class _Entry:
    """A contestant that is still in."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.samples: dict[str, list[Sample]] = {metric: [] for metric in METRICS}


def compare(
    contestants: Sequence[Contestant],
    workload_for: Callable[[int | None, int], Workload],
    *,
    runs: int,
    timeout: float,  # seconds that one answer of a child may take
    probe: Probe | None = None,
    settle_seconds: float = SETTLE_SECONDS,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure all of them. One that fails is left out and named in `failures`; the rest go on.

    `workload_for` gets the smallest vocabulary and the smallest length that all of them have.
    """
    facts = machine.describe()
    probe = probe or machine.bandwidth_probe()
    entries: dict[str, _Entry] = {}
    failures: dict[str, str] = {}
    bandwidth: list[tuple[float, float]] = []
    with ExitStack() as stack:
        for contestant in contestants:
            on_progress(f"loading {contestant.name}")
            try:
                child = Child(contestant, timeout)
            except ChildFailed as e:
                failures[contestant.name] = str(e)
            else:
                stack.callback(child.close)
                entries[contestant.name] = _Entry(child)
        sizes = [e.child.facts.get("vocab_size") for e in entries.values()]
        lengths = [e.child.facts["max_len"] for e in entries.values()]
        workload = workload_for(min((s for s in sizes if s is not None), default=None), min(lengths, default=2**31))

        def drop(name: str, e: NanoVLLMError) -> None:
            failures[name] = str(e) if isinstance(e, ChildFailed) else f"{name}: {e}"
            entries.pop(name).child.close()

        for name, entry in list(entries.items()):
            try:
                workload.check(entry.child.facts.get("vocab_size"), entry.child.facts["max_len"])
            except RequestError as e:
                drop(name, e)

        def turn(metric: str, number: int = 0, *, keep: bool = True) -> None:
            """One measurement of each; who begins changes from round to round."""
            order = list(entries.items())
            first = number % max(1, len(order))
            for name, entry in order[first:] + order[:first]:
                time.sleep(settle_seconds)
                try:
                    sample = take(metric, entry.child.generate, workload)
                except (ChildFailed, RunnerError) as e:
                    drop(name, e)
                    continue
                if sample is not None and keep:
                    entry.samples[metric].append(sample)

        for metric in ("prefill", "decode"):
            on_progress(f"warming up ({metric})")
            turn(metric, keep=False)
        for i in range(runs):
            for metric in METRICS:
                if not entries:
                    break
                on_progress(f"run {i + 1} of {runs}: {metric}")
                before = probe()
                turn(metric, i)
                bandwidth.append((before, probe()))
        results = tuple(_result(name, entry) for name, entry in entries.items())
    samples = {name: entry.samples for name, entry in entries.items()}
    pairs = list(combinations(samples, 2))
    return Comparison(
        machine=facts,
        workload=workload.summary() | {"runs": runs},
        results=results,
        ratios=tuple(r for m in METRICS for a, b in pairs if (r := _ratio(m, a, b, samples)) is not None),
        agreements=tuple(_agreement(a, b, samples) for a, b in pairs),
        bandwidth=tuple(bandwidth),
        failures=failures,
    )


def _result(name: str, entry: _Entry) -> Result:
    rates = {metric: rate for metric, samples in entry.samples.items() if (rate := Rate.of(samples)) is not None}
    return Result(name=name, facts=dict(entry.child.facts), rates=rates, peak_memory=entry.child.peak_memory)


def _ratio(metric: str, first: str, second: str, samples: dict[str, dict[str, list[Sample]]]) -> Ratio | None:
    """None where there is nothing to divide."""
    pairs = zip(samples[first][metric], samples[second][metric], strict=True)
    values = tuple(a.rate / b.rate for a, b in pairs if a.rate is not None and b.rate is not None)
    return Ratio(metric=metric, first=first, second=second, values=values) if values else None


def _agreement(first: str, second: str, samples: dict[str, dict[str, list[Sample]]]) -> Agreement:
    def equal(a: Tokens, b: Tokens) -> int:
        return sum(x == y for x, y in zip(a, b, strict=True))

    rounds = list(zip(samples[first]["throughput"], samples[second]["throughput"], strict=True))
    return Agreement(
        first=first,
        second=second,
        num_equal=min(equal(a.tokens, b.tokens) for a, b in rounds),
        num_requests=len(rounds[0][0].tokens),
    )
