"""Traces: the file is the Trace Event Format to the letter, and its spans add up to what the engine counted."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from engine_support import Answers, RemoteRunner, ask, drive, greedy, make_engine
from nanovllm.batch import SeqOutput
from nanovllm.bench.trace import Tracer
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.cli import cli
from nanovllm.engine import Engine
from nanovllm.request import Finish

# "Trace Event Format", the Chromium project: the events that we write, and the keys that each must have.
KEYS = {
    "M": {"ph", "name", "pid", "args"},
    "X": {"ph", "name", "cat", "ts", "dur", "pid", "tid"},
    "i": {"ph", "name", "cat", "ts", "s", "pid", "tid"},
    "C": {"ph", "name", "ts", "pid", "args"},
}


@dataclass
class Span:
    name: str
    start: int  # nanoseconds
    end: int
    args: dict[str, Any]
    depth: int = 0
    inside: list[Span] = field(default_factory=list)


@dataclass
class Trace:
    """A file that was read strictly: spans nest in their lane, lanes have names, times are whole nanoseconds."""

    other: dict[str, Any]
    lanes: dict[str, list[Span]]  # "engine/steps", "requests/request 3": its outermost spans, in order of time
    instants: dict[str, list[tuple[str, int]]]
    counters: dict[str, list[tuple[int, float]]]  # "KV blocks used" and so on, as Perfetto names them

    def spans(self, lane: str, name: str) -> list[Span]:
        top = self.lanes[lane]
        return [s for span in top for s in (span, *span.inside) if s.name == name]


def read(path: Path) -> Trace:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    document = json.loads(text, parse_constant=no_constant)
    assert set(document) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    events = document["traceEvents"]
    groups = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert 0 not in groups, "0 is the idle task"
    assert len({tid for _, tid in threads}) == len(threads), "a thread's number is unique, whatever its process"
    names = {key: f"{groups[key[0]]}/{name}" for key, name in threads.items()}
    trace = Trace(document["otherData"], {lane: [] for lane in names.values()}, defaultdict(list), defaultdict(list))
    open_spans: dict[str, list[Span]] = defaultdict(list)  # per lane, outermost first
    for e in events:
        ph = e["ph"]
        assert KEYS[ph] <= set(e) <= KEYS[ph] | {"args", "tid"}
        assert all(type(e[key]) is int for key in ("pid", "tid") if key in e)
        if ph == "M":
            assert e["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            continue
        at = nanoseconds(e["ts"])
        assert at >= 0
        if ph == "C":
            for key, value in e["args"].items():
                assert type(value) in (int, float)
                trace.counters[f"{e['name']} {key}"].append((at, value))
            continue
        lane = names[e["pid"], e["tid"]]
        if ph == "i":
            assert e["s"] == "t"
            trace.instants[lane].append((e["name"], at))
            continue
        span = Span(e["name"], at, at + nanoseconds(e["dur"]), e.get("args", {}))
        assert span.start <= span.end
        above = open_spans[lane]
        while (
            above and above[-1].end <= span.start and not (above[-1].start == span.start and above[-1].end >= span.end)
        ):
            above.pop()
        for outer in above:
            assert outer.start <= span.start, f"{span.name} begins before {outer.name}, which holds it"
            assert span.end <= outer.end, f"{span.name} overlaps {outer.name}"
        (above[-1].inside if above else trace.lanes[lane]).append(span)
        above.append(span)
    for values in trace.counters.values():
        assert values == sorted(values, key=lambda v: v[0]), "counters go forward in time"
    return trace


def nanoseconds(microseconds: float) -> int:
    assert type(microseconds) in (int, float)
    whole = round(microseconds * 1000)
    assert microseconds * 1000 == pytest.approx(whole, abs=1e-2), "finer than a nanosecond"
    return whole


def document(*events: dict[str, Any]) -> str:
    named = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "p"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "t"}},
    ]
    return json.dumps({"displayTimeUnit": "ms", "otherData": {}, "traceEvents": [*named, *events]})


def span(ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return {"ph": "X", "name": "s", "cat": "c", "ts": ts, "dur": dur, "pid": 1, "tid": tid}


def test_the_reader_is_not_fooled(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(document(span(0, 5), span(1, 2), span(3, 2), span(5, 1)))
    assert [len(s.inside) for s in read(path).lanes["p/t"]] == [2, 0]
    for wrong, sentence in (
        (document(span(0, 5), span(3, 4)), "s overlaps s"),
        (document(span(3, 4), span(0, 5)), "s begins before s"),
        (document(span(0, float("nan"))), "NaN is no JSON"),
        (document(span(0, 0.00025)), "finer than a nanosecond"),
        (document(span(0, -1)), "assert"),
    ):
        path.write_text(wrong)
        with pytest.raises(AssertionError, match=sentence):
            read(path)
    path.write_text(document(span(0, 1, tid=2)))
    with pytest.raises(KeyError):
        read(path)


class Clock:
    """Goes on by another fraction of a microsecond at every look, and never in whole nanoseconds."""

    def __init__(self) -> None:
        self.steps = itertools.cycle([1e-7 / 3, 1.7e-6, 2.3e-7, 9.1e-5 / 7])
        self.now = 12345.678

    def __call__(self) -> float:
        self.now += next(self.steps)
        return self.now


def traced(runner: Any = None, **options: Any) -> tuple[Engine, Tracer]:
    engine, tracer = make_engine(runner, clock=Clock(), **options), Tracer()
    engine.observe(tracer)
    return engine, tracer


def written(tracer: Tracer, tmp_path: Path) -> Trace:
    tracer.write(tmp_path / "run.json", {"model": "mock"})
    return read(tmp_path / "run.json")


def total(spans: list[Span]) -> float:
    return sum(s.end - s.start for s in spans) / 1e9


# --------------------------------------------------------------------------------- what it shows


def test_the_lane_of_steps_adds_up_to_the_statistics(tmp_path: Path) -> None:
    engine, tracer = traced(max_num_batched_tokens=32)
    for i in range(5):
        ask(engine, [i + 1] * (10 + 7 * i), greedy(9))
    drive(engine)
    trace, stats, lane = written(tracer, tmp_path), engine.stats(), "engine/steps"
    assert trace.other["steps_left_out"] == trace.other["sequences_left_out"] == 0
    assert [s.name for s in trace.lanes[lane]] == [f"step {i + 1}" for i in range(stats.num_steps)]
    allowed = pytest.approx
    for name, seconds in (
        ("schedule", stats.schedule_seconds),
        ("prefill", stats.prefill_seconds),
        ("decode", stats.decode_seconds),
        ("sample", stats.sample_seconds),
        ("detokenize", stats.advance_seconds),
    ):
        assert seconds > 0
        assert total(trace.spans(lane, name)) == allowed(seconds, abs=2e-9 * stats.num_steps)
    for name, tokens in (("prefill", stats.num_prefill_tokens), ("decode", stats.num_decode_tokens)):
        assert sum(s.args["tokens"] for s in trace.spans(lane, name)) == tokens
    for step in trace.lanes[lane]:  # without a gap from its first moment to its last
        assert [step.start, *(s.end for s in step.inside)] == [*(s.start for s in step.inside), step.end]
    assert {s.name for step in trace.lanes[lane] for s in step.inside} == {
        "schedule", "prefill", "decode", "sample", "detokenize",
    }  # fmt: skip


def test_a_request_s_lane_is_its_statistics(tmp_path: Path) -> None:
    engine, tracer = traced(max_num_seqs=2)
    tickets = [ask(engine, [i + 1] * 20, greedy(4 + i)) for i in range(5)]
    answers = drive(engine)
    trace = written(tracer, tmp_path)
    for ticket in tickets:
        stats = answers.of(ticket).stats
        queue, prefill, decode = trace.lanes[f"requests/request {ticket.request_id}"]
        assert (queue.name, prefill.name, decode.name) == ("queue", "prefill", "decode")
        assert stats.queue_time is not None
        assert stats.ttft is not None
        edges = [queue.start, queue.end, prefill.end, decode.end]
        assert [queue.end, prefill.end] == [prefill.start, decode.start]
        since = [(edge - queue.start) / 1e9 for edge in edges]
        assert since == pytest.approx([0, stats.queue_time, stats.ttft, stats.total_time], abs=2e-9)
        assert [(s.name, s.args) for s in queue.inside] == [("tokenize", {"tokens": 20})]
        assert queue.args == {
            "prompt_tokens": 20,
            "cached_tokens": stats.num_cached_tokens,
            "output_tokens": stats.num_output_tokens,
            "preemptions": 0,
            "finish": "length",
        }
    waits = [total(trace.spans(f"requests/request {t.request_id}", "queue")) for t in tickets]
    assert waits[-1] > waits[0], "the last of five waits for two lanes"


def test_counters_say_what_the_pool_and_the_queue_hold(tmp_path: Path) -> None:
    engine, tracer = traced(MockRunner(num_blocks=40), max_num_seqs=2)
    for i in range(4):
        ask(engine, [i + 1] * 30, greedy(18))
    drive(engine)
    trace = written(tracer, tmp_path)
    used, free = (dict(trace.counters[f"KV blocks {what}"]) for what in ("used", "free"))
    assert len(used) == engine.stats().num_steps
    assert {used[at] + free[at] for at in used} == {40}
    assert max(used.values()) == 2 * 3  # two sequences of 30 to 48 tokens, 16 to a block
    assert [values[-1][1] for values in trace.counters.values()] == [0, 0, 0, 40]
    assert max(n for _, n in trace.counters["sequences running"]) == 2
    assert max(n for _, n in trace.counters["sequences waiting"]) == 2
    ends = [step.end for step in trace.lanes["engine/steps"]]
    assert all([at for at, _ in values] == ends for values in trace.counters.values())


def test_a_preempted_request_queues_again_and_is_computed_again(tmp_path: Path) -> None:
    engine, tracer = traced(MockRunner(num_blocks=6), max_num_seqs=3)
    tickets = [ask(engine, [i + 1] * 20, greedy(40)) for i in range(3)]
    answers = drive(engine)
    trace = written(tracer, tmp_path)
    assert engine.stats().num_preemptions > 0
    for ticket in tickets:
        lane = f"requests/request {ticket.request_id}"
        times = answers.of(ticket).stats.num_preemptions
        assert [s.name for s in trace.lanes[lane]] == ["queue", "prefill", "decode"] * (1 + times)
        again = [s.start for s in trace.spans(lane, "queue")[1:]]
        assert trace.instants[lane] == [("preempted", at) for at in again]
        starts = {step.start for step in trace.lanes["engine/steps"]}
        assert set(again) <= starts, "the scheduler preempts, at the start of a step"
        assert {s.start for s in trace.spans(lane, "prefill")} <= starts


def test_failures_and_departures_have_an_end(tmp_path: Path) -> None:
    engine, tracer = traced(MockRunner(script=Script(fail_steps=[2])), max_num_seqs=1)
    failed, left, never = (ask(engine, [i + 1] * 4, greedy(6), n=1) for i in range(3))
    answers = Answers()
    answers.take(engine.step())
    answers.take(engine.step())  # fails
    answers.take(engine.step())
    engine.abort(left.request_id)
    engine.abort(never.request_id)
    drive(engine, answers)
    trace = written(tracer, tmp_path)
    assert trace.instants["engine/steps"] == [("step failed", trace.lanes["engine/steps"][1].end)]
    assert "the script fails step 2" in trace.lanes["engine/steps"][1].args["error"]
    for ticket, names, finish in (
        (failed, ["queue", "prefill", "decode"], "error"),
        (left, ["queue", "prefill", "decode"], "abort"),
        (never, ["queue"], "abort"),
    ):
        lane = trace.lanes[f"requests/request {ticket.request_id}"]
        assert [s.name for s in lane] == names
        assert lane[0].args["finish"] == finish
        assert total(lane) == pytest.approx(answers.of(ticket).stats.total_time, abs=1e-8)


def test_runners_without_blocks_and_runners_elsewhere_are_traced_too(tmp_path: Path) -> None:
    engine, tracer = traced(MockRunner(layout="lanes"))
    ask(engine, [1, 2, 3], greedy(4))
    drive(engine)
    assert set(written(tracer, tmp_path).counters) == {"sequences running", "sequences waiting"}

    engine, tracer = traced(RemoteRunner([SeqOutput(), SeqOutput((5,)), SeqOutput((6,), Finish.STOP)]))
    ticket = ask(engine, [1, 2, 3], greedy(4))
    drive(engine)
    trace = written(tracer, tmp_path)
    assert [s.name for s in trace.lanes[f"requests/request {ticket.request_id}"]] == ["queue", "prefill", "decode"]
    assert len(trace.lanes["engine/steps"]) == 3


def test_the_answers_of_a_request_have_a_lane_each(tmp_path: Path) -> None:
    engine, tracer = traced()
    ticket = ask(engine, [1, 2, 3, 4], greedy(3), n=3)
    drive(engine)
    lanes = [lane for lane in written(tracer, tmp_path).lanes if lane.startswith("requests/")]
    number = ticket.request_id
    assert sorted(lanes) == [f"requests/request {number}{more}" for more in ("", ", answer 2", ", answer 3")]


def test_what_has_not_ended_is_shown_up_to_the_last_step(tmp_path: Path) -> None:
    engine, tracer = traced(max_num_seqs=1)
    first, second = ask(engine, [1] * 5, greedy(9)), ask(engine, [2] * 5, greedy(9))
    for _ in range(3):
        engine.step()
    trace = written(tracer, tmp_path)
    end = trace.lanes["engine/steps"][-1].end
    for ticket, names in ((first, ["queue", "prefill", "decode"]), (second, ["queue"])):
        lane = trace.lanes[f"requests/request {ticket.request_id}"]
        assert [s.name for s in lane] == names
        assert lane[-1].end == end
        assert lane[0].args["finish"] is None


def test_nothing_seen_is_an_empty_trace(tmp_path: Path) -> None:
    assert written(Tracer(), tmp_path).lanes == {"engine/steps": []}


def test_memory_is_bounded(tmp_path: Path) -> None:
    engine, tracer = make_engine(clock=Clock(), max_num_seqs=2), Tracer(max_steps=4, max_sequences=3)
    engine.observe(tracer)
    tickets = [ask(engine, [i + 1] * 3, greedy(5)) for i in range(8)]
    drive(engine)
    trace, num_steps = written(tracer, tmp_path), engine.stats().num_steps
    assert [s.name for s in trace.lanes["engine/steps"]] == [f"step {i}" for i in range(num_steps - 3, num_steps + 1)]
    assert set(trace.lanes) == {"engine/steps", *(f"requests/request {t.request_id}" for t in tickets[-3:])}
    assert (trace.other["steps_left_out"], trace.other["sequences_left_out"]) == (num_steps - 4, 5)


REQUESTS = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 2), st.integers(0, 2)), min_size=1, max_size=8
)


@given(
    requests=REQUESTS,
    num_blocks=st.integers(5, 12),
    max_num_seqs=st.integers(1, 4),
    aborts=st.sets(st.integers(0, 60)),
    sharing=st.booleans(),
)
def test_any_run_is_a_well_formed_trace(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[tuple[int, int, int, int]],
    num_blocks: int,
    max_num_seqs: int,
    aborts: set[int],
    sharing: bool,
) -> None:
    engine, tracer = traced(
        MockRunner(num_blocks=num_blocks), max_num_seqs=max_num_seqs, max_num_batched_tokens=16, prefix_caching=sharing
    )
    tickets = [
        ask(engine, [7] * length, greedy(tokens), n=n, priority=priority) for length, tokens, n, priority in requests
    ]
    answers = Answers()
    for step in itertools.count():
        if not engine.has_work:
            break
        answers.take(engine.step())
        if step in aborts:
            engine.abort(tickets[step % len(tickets)].request_id)
    trace = written(tracer, tmp_path_factory.mktemp("trace"))
    assert len(trace.lanes["engine/steps"]) == engine.stats().num_steps
    seen = 0
    for ticket in tickets:
        for index in range(ticket.request.n):
            lane = f"requests/request {ticket.request_id}" + (f", answer {index + 1}" if index else "")
            done, spans = answers.of(ticket, index), trace.lanes[lane]
            names = [s.name for s in spans]
            assert names == (["queue", "prefill", "decode"] * len(names))[: len(names)]
            assert [s.end for s in spans[:-1]] == [s.start for s in spans[1:]]
            assert total(spans) == pytest.approx(done.stats.total_time, abs=1e-8)
            assert len(trace.instants[lane]) == names.count("queue") - 1
            assert names.count("queue") - 1 == done.stats.num_preemptions
            if done.finish is not Finish.ABORT:
                assert names[-1] == "decode"
            seen += 1
    assert len(trace.lanes) == 1 + seen


# ------------------------------------------------------------------------------------ the command


def bench(*arguments: str) -> Any:
    few = ["--runner", "mock", "--runs", "1", "--num-requests", "3", "--input-len", "9", "--output-len", "4"]
    return CliRunner().invoke(cli, ["bench", *few, *arguments])


def test_bench_traces_one_more_run(tmp_path: Path) -> None:
    plain, packed = tmp_path / "run.json", tmp_path / "run.json.gz"
    for path in (plain, packed):
        done = bench("--trace", str(path))
        assert done.exit_code == 0, done.output
        assert f"trace of 4 steps: {path}" in done.stderr
        trace = read(path)
        assert len(trace.lanes["engine/steps"]) == 4
        assert len(trace.lanes) == 1 + 3
        assert trace.other["runner"] == "mock"
        assert trace.other["workload"]["requests"] == 3
    assert packed.stat().st_size < plain.stat().st_size / 3


def test_bench_refuses_a_trace_that_could_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "dir.json").mkdir()
    for arguments, sentence in (
        (["--trace", str(tmp_path / "run.txt")], "end in .json or .json.gz"),
        (["--trace", str(tmp_path / "no" / "run.json")], "there is no directory"),
        (["--trace", str(tmp_path / "dir.json")], "cannot be written"),
    ):
        done = bench(*arguments)
        assert done.exit_code == 2
        assert sentence in done.stderr
        assert done.stderr.count("\n") == 1
    done = CliRunner().invoke(cli, ["bench", "--compare", "a.yaml", "b.yaml", "--trace", str(tmp_path / "run.json")])
    assert done.exit_code == 2
    assert "--trace shows one engine" in done.stderr
