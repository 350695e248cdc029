"""What `bench` measures, by a clock that only the mock runner and the sampler move: every figure is then exact."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from nanovllm.batch import Batch, SeqOutput
from nanovllm.bench import memory, show, tables
from nanovllm.bench.engine import EngineBench
from nanovllm.bench.metrics import Percentiles, Rate, Sample, Timed, take
from nanovllm.bench.plot import svg
from nanovllm.bench.report import Report, measure
from nanovllm.bench.workload import DECODE_TOKENS, Job, Workload
from nanovllm.builtin.mock import MockRunner, Script, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine
from nanovllm.errors import RequestError, RequestFailed, RunnerError
from nanovllm.sampler import NumpySampler

FORWARD, SAMPLE = 1.0, 0.25  # seconds per step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class SlowRunner(MockRunner):
    def __init__(self, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self.clock, self.is_closed = clock, False

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self.clock.now += FORWARD
        return super().execute(batch)

    def close(self) -> None:
        self.is_closed = True
        super().close()


class SlowSampler(NumpySampler):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        self.clock.now += SAMPLE
        return super().sample(*args, **kwargs)


def engine(clock: Clock, *, max_num_seqs: int = 8, max_num_batched_tokens: int = 64, **runner: Any) -> Engine:
    return Engine(
        SlowRunner(clock, **runner), SimpleBPETokenizer(), sampler=SlowSampler(clock), clock=clock,
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
    )  # fmt: skip


def prompt(length: int, start: int = 0) -> tuple[int, ...]:
    return tuple((start + 7 * i) % 100 for i in range(length))


JOBS = (Job(prompt(20, 1), 5), Job(prompt(20, 2), 9), Job(prompt(20, 3), 2))
WORKLOAD = Workload(name="three", jobs=JOBS, prefill=prompt(128), decode=prompt(10, 5))


def report(**options: Any) -> Report:
    clock = Clock()
    return measure(
        lambda: engine(clock, **options), lambda vocab_size, max_len: WORKLOAD, runs=2, clock=clock,
        describe=lambda e: {"model": "m", "runner": "mock", "architecture": None, "dtype": None, "device": "CPU"},
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- one engine


def test_the_tokens_are_the_greedy_ones_to_the_full_length() -> None:
    run = EngineBench(engine(Clock(), eos_ids=tuple(range(60)))).run(JOBS)
    assert run.tokens == [expected(job.prompt, job.num_tokens) for job in JOBS]


def test_every_figure_follows_from_the_clock() -> None:
    figures = report()
    step = FORWARD + SAMPLE
    # A chunk of a prompt that reaches no end is not sampled: 128 tokens in steps of 64 are 1 + 1.25 s.
    assert figures.prefill == Rate(128, (2 * FORWARD + SAMPLE,) * 2)
    assert figures.decode == Rate(DECODE_TOKENS, (DECODE_TOKENS * step,) * 2)
    assert figures.decode.tokens_per_second == pytest.approx(1 / step)
    assert figures.throughput == Rate(16, (9 * step,) * 2)  # 60 prompt tokens fit the first step; the longest has 9
    assert figures.total_tokens_per_second == pytest.approx((60 + 16) / (9 * step))
    assert figures.steps.num_steps == 9
    assert figures.steps.overhead == Percentiles(SAMPLE, SAMPLE, SAMPLE)
    assert figures.steps.sample == Percentiles(SAMPLE, SAMPLE, SAMPLE)
    assert figures.steps.schedule == figures.steps.advance == Percentiles(0, 0, 0)
    assert figures.steps.overhead_share == pytest.approx(SAMPLE / step)
    assert figures.ttft == figures.tpot == figures.gap == Percentiles(step, step, step)
    assert figures.queue == Percentiles(0, 0, 0)
    assert figures.cache.max_blocks == 6  # 3 sequences of 20 to 22 tokens, before the first ends
    assert (figures.cache.num_preemptions, figures.cache.num_cached_tokens) == (0, 0)


def test_who_waits_is_seen_in_the_queue() -> None:
    figures = report(max_num_seqs=1)
    run = figures.last_run
    assert [r.queue_time for r in run.requests] == pytest.approx([0, 5 * 1.25, 14 * 1.25])
    assert run.max_running == 1
    assert run.stats.num_steps == 16


def test_time_between_tokens_adds_up_to_the_time_per_token() -> None:
    jobs = [Job(prompt(14, i), 20) for i in range(3)]  # of three blocks each
    run = EngineBench(engine(clock := Clock(), max_num_seqs=2, num_blocks=4), clock).run(jobs)
    assert run.stats.num_preemptions > 0, "the pool is small enough to hurt"
    per_request = sum(r.tpot * (r.num_output_tokens - 1) for r in run.requests if r.tpot is not None)
    assert sum(gap for _, gap in run.gaps) == pytest.approx(per_request)
    assert sum(step.total for step in run.steps) == pytest.approx(run.seconds)
    assert run.steps[-1].end == pytest.approx(run.seconds)
    assert run.max_blocks is not None
    assert run.max_blocks <= 4


def test_a_run_takes_nothing_from_the_prefix_cache_of_another() -> None:
    bench = EngineBench(engine(Clock(), max_num_seqs=1))
    shared = [Job(prompt(48), 2), Job(prompt(48), 2)]
    for _ in range(2):
        assert bench.run(shared).stats.num_cached_tokens == 32  # the second request takes two of three full blocks
    assert bench.run(shared[:1]).stats.num_cached_tokens == 0


def test_lanes_have_no_blocks() -> None:
    figures = report(layout="lanes", can_resume_prefix=False)
    assert (figures.cache.num_blocks, figures.cache.max_blocks) == (None, None)
    assert "-" in tables.terminal("", show.report_tables(figures))


def test_a_request_that_fails_is_named_and_the_engine_is_closed() -> None:
    clock = Clock()
    made: list[Engine] = []

    def load() -> Engine:
        made.append(engine(clock, script=Script(nan_token=JOBS[1].prompt[0])))
        return made[0]

    with pytest.raises(RequestFailed, match=r"^request 1 failed: "):
        measure(
            load, lambda v, n: Workload(name="w", jobs=JOBS, prefill=None, decode=None), runs=1, describe=lambda e: {}
        )
    assert made[0].runner.is_closed


def test_what_the_engine_refuses_is_refused_before_anything_runs() -> None:
    bench = EngineBench(engine(clock := Clock()))
    with pytest.raises(RequestError, match=r"^request 1: the prompt holds the token id 125"):
        bench.run([JOBS[0], Job((125,), 1)])
    assert clock.now == 0


# ---------------------------------------------------------------------------------------- arithmetic


def test_percentiles_are_numpys() -> None:
    values = [3.0, 1.0, 2.0, 10.0]
    assert Percentiles.of(values) == Percentiles(*np.percentile(values, [50, 90, 99]))
    assert Percentiles.of([]) is None


def test_a_clock_that_stands_still_gives_no_rate() -> None:
    assert Rate(5, (0.0, 0.0, 1.0)).tokens_per_second is None
    assert Rate(6, (1.0, 3.0, 2.0)).tokens_per_second == 3
    assert Sample(5, -0.1, []).rate is None


def test_an_answer_that_is_short_or_missing_is_no_reading() -> None:
    with pytest.raises(RunnerError, match="request 1 gave 8 tokens instead of 9"):
        take("throughput", lambda jobs: Timed(1, [[0] * min(8, job.num_tokens) for job in jobs]), WORKLOAD)
    with pytest.raises(RunnerError, match="0 answers came back for 1 requests"):
        take("prefill", lambda jobs: Timed(1, []), WORKLOAD)


def test_memory_is_told_in_bytes() -> None:
    held = np.ones(32 * 2**20, np.uint8)
    now, most = memory.resident(), memory.peak()
    if now is not None and most is not None:
        assert held.nbytes < now <= most < 2**40


# ------------------------------------------------------------------------------------------- showing


def test_the_json_document_is_complete_and_plain() -> None:
    figures = report()
    document = json.loads(json.dumps(figures.to_json()))
    assert document["prefill"] == {"num_tokens": 128, "seconds": [2.25, 2.25], "tokens_per_second": 128 / 2.25}
    assert document["ttft"] == {"p50": 1.25, "p90": 1.25, "p99": 1.25}
    assert document["workload"] == {
        "name": "three", "requests": 3, "prompt_tokens": 60, "output_tokens": 16, "runs": 2
    }  # fmt: skip
    assert set(document["memory"]) == {"base", "loaded", "per_request", "peak"}
    assert "last_run" not in document


def test_terminal_and_markdown_show_the_same_rows() -> None:
    figures = report()
    parts = show.report_tables(figures)
    text, page = tables.terminal(show.report_heading(figures), parts), tables.markdown("", parts)
    assert "three: 3 requests, 60 prompt and 16 output tokens; 2 runs" in text
    for table in parts:
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in page
            assert any(line.split() == " ".join(row).split() for line in text.splitlines()), row


def test_the_tables_of_the_seeds_have_their_columns() -> None:
    page = tables.markdown("", show.report_seed_tables(report()))
    assert "| Implementation | CPU (tok/s) | GPU T4 (tok/s) | GPU A100 (tok/s) |" in page
    assert "| mock | 0.8 | - | - |" in page
    assert "| Implementation | Base Memory | Per Request | Peak Memory |" in page


@pytest.mark.parametrize(
    ("device", "row"), [("cpu", "| mock | 0.8 | - | - |"), ("GPU T4", "| mock | - | 0.8 | - |"),
                        ("cuda:0", "| mock | - | - | - | 0.8 |")],
)  # fmt: skip
def test_a_runner_on_any_device_has_its_column(device: str, row: str) -> None:
    figures = report()
    figures.subject["device"] = device
    assert row in tables.markdown("", show.report_seed_tables(figures))


def test_the_plot_is_svg_with_every_point_inside() -> None:
    root = ET.fromstring(svg(report().last_run, "a <title> & more"))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert len(lines) == 4
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points", "").split()]
        assert points
        assert all(0 <= x <= width and 0 <= y <= height for x, y in points)
    assert "a <title> & more" in [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]


def test_a_run_without_a_second_token_is_drawn_too() -> None:
    run = EngineBench(engine(clock := Clock()), clock).run([Job(prompt(3), 1)])
    assert run.gaps == ()
    ET.fromstring(svg(run, "one token"))
