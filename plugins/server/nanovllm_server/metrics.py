"""Metrics for Prometheus, one registry per server. docs/server/metrics.md lists them.

Histograms and counters are fed by the engine as an observer of it; what is true now (running, waiting, KV use) and
the engine's own sums are read when somebody asks. Knows no route.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nanovllm.request import Completion, Finish

if TYPE_CHECKING:
    from nanovllm.aio import AsyncLLM

    from .state import State

# Seconds. Up to the time of one token, and up to that of a long answer.
_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0)


class Metrics:
    """`on_output` is called on the engine's thread, the rest on the event loop."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._ttft = Histogram(
            "nanovllm_time_to_first_token_seconds", "From arrival to the first token", buckets=_LONG, registry=registry
        )
        self._tpot = Histogram(
            "nanovllm_time_per_output_token_seconds",
            "Mean time of the tokens after the first, per answer",
            buckets=_SHORT,
            registry=registry,
        )
        self._queue = Histogram(
            "nanovllm_queue_seconds", "From arrival to the first step", buckets=_LONG, registry=registry
        )
        self._total = Histogram(
            "nanovllm_answer_seconds", "From arrival to the last token", buckets=_LONG, registry=registry
        )
        self._answers = Counter("nanovllm_answers", "Answers by how they ended", ["finish"], registry=registry)
        self._tokens = Counter(
            "nanovllm_tokens", "Tokens of answers that have ended, by kind", ["kind"], registry=registry
        )
        self._calls = Counter("nanovllm_http_calls", "HTTP calls", ["route", "status"], registry=registry)
        self._errors = Counter(
            "nanovllm_errors", "Calls that were refused or failed, by kind", ["kind"], registry=registry
        )
        for finish in Finish:  # a rate needs a zero to rise from
            self._answers.labels(finish.value)
        for kind in ("prompt", "cached", "completion"):
            self._tokens.labels(kind)

    def watch(self, state: State, llm: AsyncLLM) -> None:
        """Once, when the engine is loaded."""
        self._registry.register(_Now(state, llm))
        llm.engine.observe(self)

    def on_output(self, output: Completion) -> None:
        stats = output.stats
        self._answers.labels(output.finish.value).inc()
        self._tokens.labels("prompt").inc(stats.num_prompt_tokens if output.index == 0 else 0)
        self._tokens.labels("cached").inc(stats.num_cached_tokens if output.index == 0 else 0)
        self._tokens.labels("completion").inc(stats.num_output_tokens)
        for histogram, value in (
            (self._ttft, stats.ttft), (self._tpot, stats.tpot), (self._queue, stats.queue_time),
        ):  # fmt: skip
            if value is not None:
                histogram.observe(value)
        if output.finish in (Finish.STOP, Finish.LENGTH):
            self._total.observe(stats.total_time)

    def count_call(self, route: str | None, status: int, error: str | None) -> None:
        """`route`: as declared, so that nobody's paths become labels; None = there is none. status 0 = no answer."""
        self._calls.labels(route or "none", str(status)).inc()
        if error is not None:
            self._errors.labels(error).inc()

    def text(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            # When each series began: a line for every number, which nobody asks for.
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


class _Now(Collector):
    """What is true at the moment of the question."""

    def __init__(self, state: State, llm: AsyncLLM) -> None:
        self._state = state
        self._llm = llm

    def collect(self) -> Iterator[Metric]:
        engine, health, sums = self._llm.engine, self._llm.health(), self._llm.stats()
        yield _gauge("ready", "1 = work may be sent here", self._state.status == "ready")
        yield _gauge("running", "Sequences in the engine's batch", health.num_running)
        yield _gauge("waiting", "Sequences that wait for a place in it", health.num_waiting)
        yield _gauge("streams", "Streamed answers that are open", self._state.admission.num_streams)
        yield _counter("steps", "Steps of the engine", sums.num_steps)
        yield _counter("failed_steps", "Steps whose runner failed", sums.num_failed_steps)
        yield _counter("preemptions", "Sequences that had to give their KV blocks to others", sums.num_preemptions)
        yield _counter("prefill_tokens", "Prompt tokens computed, again after a preemption", sums.num_prefill_tokens)
        yield _counter("decode_tokens", "Tokens computed one by one", sums.num_decode_tokens)
        yield _counter("prefix_hit_tokens", "Prompt tokens taken from the prefix cache", sums.num_cached_tokens)
        prompt = sums.num_cached_tokens + sums.num_prefill_tokens
        yield _gauge(
            "prefix_hit_ratio",
            "prefix_hit_tokens / (these and prefill_tokens)",
            sums.num_cached_tokens / max(1, prompt),
        )
        blocks = engine.kv_blocks()
        if blocks is not None:
            yield _gauge("kv_blocks", "Blocks of the KV cache", blocks.total)
            yield _gauge("kv_blocks_used", "Of them, held by sequences", blocks.used)
            yield _gauge("kv_usage_ratio", "kv_blocks_used / kv_blocks", blocks.used / blocks.total)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"nanovllm_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"nanovllm_{name}", text, value=value)
