"""Reports and comparisons as tables. Knows no renderer; everything here is words and rounding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .metrics import METRICS, Percentiles, Rate
from .tables import Table

if TYPE_CHECKING:
    from .compare import Comparison
    from .report import Report

NONE = "-"


def report_tables(report: Report) -> list[Table]:
    """Everything that `nanovllm bench` says about one engine."""
    steps, memory, cache = report.steps, report.memory, report.cache
    total = report.total_tokens_per_second
    share = NONE if steps.overhead_share is None else f"{100 * steps.overhead_share:.1f} %"
    blocks = NONE if cache.num_blocks is None else f"{cache.max_blocks} of {cache.num_blocks}"
    return [
        Table(
            "Speed",
            ("", "tok/s", "tokens", "seconds (min, median, max)"),
            [(metric, *_rate(getattr(report, metric))) for metric in METRICS],
            "" if total is None else f"Prompt and output tokens of the workload together: {_number(total)} tok/s.",
        ),
        Table(
            "Latency, ms",
            ("", "p50", "p90", "p99"),
            [
                ("TTFT: arrival to first token", *_ms(report.ttft)),
                ("TPOT: mean per token after it, by request", *_ms(report.tpot)),
                ("between two tokens of a sequence", *_ms(report.gap)),
                ("queue: arrival to first scheduled", *_ms(report.queue)),
            ],
        ),
        Table(
            "Engine overhead, ms per step",
            ("", "p50", "p90", "p99"),
            [
                ("all but the forward pass", *_ms(steps.overhead)),
                ("schedule", *_ms(steps.schedule)),
                ("sample", *_ms(steps.sample)),
                ("advance and commit", *_ms(steps.advance)),
            ],
            f"{steps.num_steps} steps a run; the overhead is {share} of their time.",
        ),
        Table(
            "Memory, MB",
            ("base", "model loaded", "per request", "peak"),
            [tuple(_megabytes(n) for n in (memory.base, memory.loaded, memory.per_request, memory.peak))],
        ),
        Table(
            "KV cache",
            ("blocks used", "preemptions", "cached prompt tokens"),
            [(blocks, str(cache.num_preemptions), str(cache.num_cached_tokens))],
        ),
    ]


def report_heading(report: Report) -> str:
    """Model, machine and workload, a line each."""
    subject = report.subject
    what = f"{subject['architecture'] or 'unknown architecture'}, {subject['dtype'] or 'unknown dtype'}"
    return f"{subject['model']} on {subject['runner']} ({what})\n{circumstances(report)}"


def comparison_tables(comparison: Comparison) -> list[Table]:
    spread = [f"{_number(low)}" for low in _extent(value for pair in comparison.bandwidth for value in pair)]
    probe = f"Memory read bandwidth between the runs: {' to '.join(spread)} GB/s." if spread else ""
    agreed = "\n".join(
        f"{a.first} and {a.second} gave equal tokens in {a.num_equal} of {a.num_requests} requests."
        for a in comparison.agreements
    )
    tables = [
        Table(
            "tok/s, medians",
            ("", *METRICS, "peak memory, MB"),
            [
                (r.name, *(_rate(r.rates.get(metric))[0] for metric in METRICS), _megabytes(r.peak_memory))
                for r in comparison.results
            ],
            probe,
        )
    ]
    if comparison.ratios:
        tables.append(
            Table(
                "Ratios of readings taken side by side",
                ("", "", "median", "min", "max", "rounds"),
                [
                    (
                        f"{r.first} / {r.second}",
                        r.metric,
                        *(f"{value:.2f}" for value in (r.median, min(r.values), max(r.values))),
                        str(len(r.values)),
                    )
                    for r in comparison.ratios
                ],
                agreed,
                num_text=2,
            )
        )
    if comparison.failures:
        tables.append(Table("Not measured", ("", "why"), list(comparison.failures.items()), num_text=2))
    return tables


class SeedRow(NamedTuple):
    """One implementation in the shape of the seed documents' tables."""

    name: str
    device: str
    decode: float | None  # tokens per second of one stream
    base: int | None = None  # bytes, model loaded
    per_request: int | None = None  # bytes
    peak: int | None = None  # bytes


def report_seed_tables(report: Report) -> list[Table]:
    memory = report.memory
    decode = None if report.decode is None else report.decode.tokens_per_second
    row = SeedRow(
        report.subject["runner"], report.subject["device"], decode, memory.loaded, memory.per_request, memory.peak
    )
    return _seed_tables(report.subject["model"], [row])


def comparison_seed_tables(comparison: Comparison) -> list[Table]:
    rows = []
    for result in comparison.results:
        decode = result.rates.get("decode")
        rows.append(
            SeedRow(
                result.name,
                result.facts.get("device", "CPU"),
                None if decode is None else decode.tokens_per_second,
                peak=result.peak_memory,
            )
        )
    return _seed_tables(f"Workload {comparison.workload['name']}", rows)


def _seed_tables(model: str, rows: Sequence[SeedRow]) -> list[Table]:
    """The two tables of the seed documents: speed by device, and memory. What was not measured is a dash."""
    rows = [row._replace(device="CPU") if row.device == "cpu" else row for row in rows]  # as runners name it
    devices = list(dict.fromkeys(["CPU", "GPU T4", "GPU A100", *(row.device for row in rows)]))
    return [
        Table(
            model,
            ("Implementation", *(f"{device} (tok/s)" for device in devices)),
            [(row.name, *(_number(row.decode) if d == row.device else NONE for d in devices)) for row in rows],
            "Decode of one stream, measured here; a dash was not measured.",
        ),
        Table(
            "Memory",
            ("Implementation", "Base Memory", "Per Request", "Peak Memory"),
            [
                (
                    row.name,
                    *(NONE if n is None else f"{_megabytes(n)} MB" for n in (row.base, row.per_request, row.peak)),
                )
                for row in rows
            ],
        ),
    ]


def circumstances(measured: Report | Comparison) -> str:
    machine, workload = measured.machine, measured.workload
    load = f", load {machine['load_average']} at the start" if machine["load_average"] is not None else ""
    runs = "1 run" if workload["runs"] == 1 else f"{workload['runs']} runs"
    return (
        f"{machine['cores']} cores of {machine['processor']}, Python {machine['python']}{load}\n"
        f"workload {workload['name']}: {workload['requests']} requests, {workload['prompt_tokens']} prompt and "
        f"{workload['output_tokens']} output tokens; {runs}"
    )


def _number(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return NONE
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _rate(rate: Rate | None) -> tuple[str, str, str]:
    if rate is None:
        return NONE, NONE, NONE
    ordered = sorted(rate.seconds)
    seconds = (ordered[0], rate.median_seconds, ordered[-1])
    return _number(rate.tokens_per_second), str(rate.num_tokens), ", ".join(f"{s:.3f}" for s in seconds)


def _ms(percentiles: Percentiles | None) -> tuple[str, ...]:
    if percentiles is None:
        return NONE, NONE, NONE
    return tuple(_number(1000 * value) for value in (percentiles.p50, percentiles.p90, percentiles.p99))


def _megabytes(num_bytes: int | None) -> str:
    return NONE if num_bytes is None else f"{num_bytes / 1e6:.1f}"


def _extent(values: Iterable[float]) -> tuple[float, ...]:
    known = list(values)
    return (min(known), max(known)) if known else ()
