"""Tracer: an observer that writes what an engine did as a trace for Perfetto and Chrome, in the Trace Event Format.

The process `engine` has a lane of steps, each with the phases of stats.py inside, and the counters. The process
`requests` has a lane for each sequence: queue (tokenize inside), prefill, decode, and all three again after a
preemption. Spans of a lane nest and never overlap: one that ends where the next begins shares its moment.

Memory is bounded: the last MAX_STEPS steps and the last MAX_SEQUENCES that ended, besides those that live.
Knows no runner and no viewer.
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import __version__
from ..request import Finish

if TYPE_CHECKING:
    from ..intake import Ticket
    from ..request import Completion
    from ..sequence import Sequence
    from ..stats import Phase, StepStats

MAX_STEPS = 2**16
MAX_SEQUENCES = 2**14

Event = dict[str, Any]  # one of the format's: ph, pid, tid, name, args; ts and dur are microseconds

# The format's processes and threads are our groups and lanes. None is 0: that is the idle task to Perfetto.
_ENGINE, _REQUESTS, _STEPS, _FIRST_LANE = 1, 2, 1, 10


class _Life(NamedTuple):
    """A sequence, as its lane shows it. Times are seconds by the engine's clock."""

    seq_id: int
    request_id: int
    answer: int  # which completion of the request
    tokenize: Phase | None  # of the request's first sequence
    marks: tuple[tuple[str, float], ...]  # (the span that begins, when); the first is the arrival
    end: float
    args: Mapping[str, Any]


class Tracer:
    """`engine.observe(tracer)`, run something, and when the engine rests, `tracer.write(path)`."""

    def __init__(self, max_steps: int = MAX_STEPS, max_sequences: int = MAX_SEQUENCES) -> None:
        self.num_steps = 0  # seen, kept or not
        self.num_sequences = 0  # that ended, kept or not
        self._steps: deque[StepStats] = deque(maxlen=max_steps)
        self._lives: deque[_Life] = deque(maxlen=max_sequences)
        self._live: dict[int, tuple[Sequence, Phase | None]] = {}  # by seq_id, in order of arrival
        self._ended: list[tuple[Sequence, Phase | None, float]] = []  # since the last step, with their ends
        self._later: dict[int, list[tuple[str, float]]] = {}  # by seq_id: marks from the first preemption on
        self._recomputing: dict[int, Sequence] = {}  # preempted, and no token gained since then
        self._num_preemptions = 0  # of the engine, as last told

    # ----------------------------------------------------------------------- what the engine tells

    def on_request(self, ticket: Ticket) -> None:
        for seq in ticket.sequences:
            self._live[seq.seq_id] = seq, ticket.tokenize if seq.index == 0 else None

    def on_output(self, output: Completion) -> None:
        # What ends is near the front, unless priorities differ: requests run in the order in which they came.
        for seq_id, (seq, tokenize) in self._live.items():
            if seq.finish is not None:
                del self._live[seq_id]
                self._ended.append((seq, tokenize, seq.arrival + output.stats.total_time))
                return

    def on_step(self, step: StepStats) -> None:
        self._steps.append(step)
        self.num_steps += 1
        if step.num_preemptions != self._num_preemptions:
            self._num_preemptions = step.num_preemptions
            self._note_preempted(step.start)
        for seq in list(self._recomputing.values()):
            marks = self._later[seq.seq_id]
            is_admitted = seq.lane is not None or seq.finish in (Finish.STOP, Finish.LENGTH)
            if marks[-1][0] == "queue" and is_admitted:
                marks.append(("prefill", step.start))
            if marks[-1][0] == "prefill" and not seq.is_protected:
                marks.append(
                    ("decode", step.start + step.schedule_seconds + step.forward_seconds + step.sample_seconds)
                )
                del self._recomputing[seq.seq_id]
        self._settle()

    def _note_preempted(self, now: float) -> None:
        for seq in (*(seq for seq, _ in self._live.values()), *(seq for seq, _, _ in self._ended)):
            marks = self._later.get(seq.seq_id, [])
            if seq.num_preemptions > sum(name == "queue" for name, _ in marks):
                self._later[seq.seq_id] = [*marks, ("queue", now)]
                self._recomputing[seq.seq_id] = seq

    def _settle(self) -> None:
        """Reduce what has ended to what its lane shows: a sequence holds its tokens and its text."""
        for seq, tokenize, end in self._ended:
            self._recomputing.pop(seq.seq_id, None)
            self._lives.append(_life(seq, tokenize, self._later.pop(seq.seq_id, []), end))
            self.num_sequences += 1
        self._ended.clear()

    # ----------------------------------------------------------------------------------- the file

    def write(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Write the trace, compressed if `path` ends in .gz. `facts`: more for its `otherData`. Raises OSError."""
        self._settle()
        other = {
            "nanovllm": __version__,
            "steps_left_out": self.num_steps - len(self._steps),
            "sequences_left_out": self.num_sequences - len(self._lives),
            **(facts or {}),
        }
        with gzip.open(path, "wt", encoding="utf-8") if path.suffix == ".gz" else path.open("w", encoding="utf-8") as f:
            f.write(f'{{"displayTimeUnit": "ms", "otherData": {json.dumps(other)}, "traceEvents": [\n')
            for i, event in enumerate(self.events()):
                f.write(f"{',' if i else ' '}{json.dumps(event)}\n")
            f.write("]}\n")

    def events(self) -> Iterator[Event]:
        """All that was kept, by lane. The trace's time begins at the first moment in it."""
        now = _end(self._steps[-1]) if self._steps else 0.0
        lives = list(self._lives)
        for seq, tokenize in self._live.values():  # what has not ended is shown up to now
            life = _life(seq, tokenize, self._later.get(seq.seq_id, []), now)
            lives.append(life._replace(end=max(now, life.marks[-1][1])))
        first = [self._steps[0].start] if self._steps else []
        origin = min([*first, *(life.marks[0][1] for life in lives)], default=0.0)
        yield from _group(_ENGINE, "engine")
        yield from _lane(_ENGINE, _STEPS, "steps")
        for step in self._steps:
            yield from _step(step, origin)
        yield from _group(_REQUESTS, "requests")
        for life in lives:
            yield from _sequence(life, origin)


def _life(seq: Sequence, tokenize: Phase | None, later: list[tuple[str, float]], end: float) -> _Life:
    marks = [("queue", seq.arrival)]
    if seq.first_scheduled is not None:
        marks.append(("prefill", seq.first_scheduled))
    if seq.first_token is not None:
        marks.append(("decode", seq.first_token))
    args = {
        "prompt_tokens": seq.num_prompt,
        "cached_tokens": seq.num_cached,
        "output_tokens": seq.num_output,
        "preemptions": seq.num_preemptions,
        "finish": None if seq.finish is None else seq.finish.value,
    }
    return _Life(seq.seq_id, seq.request_id, seq.index, tokenize, (*marks, *later), end, args)


def _end(step: StepStats) -> float:
    phase = step.phases[-1]  # a step always has one that detokenizes
    return phase.start + phase.duration


def _step(step: StepStats, origin: float) -> Iterator[Event]:
    args = {"sequences": step.num_seqs} | ({"error": step.error} if step.error is not None else {})
    at = {"pid": _ENGINE, "tid": _STEPS, "cat": "engine"}
    yield _span(f"step {step.step}", step.start, _end(step), origin, at, args)
    yield _span("schedule", step.start, step.start + step.schedule_seconds, origin, at)
    for phase in step.phases:
        what = {"sequences" if phase.name in ("sample", "detokenize") else "tokens": phase.num_tokens}
        yield _span(phase.name, phase.start, phase.start + phase.duration, origin, at, what)
    if step.error is not None:
        yield _instant("step failed", _end(step), origin, at)
    counts = {"sequences": {"running": step.num_running, "waiting": step.num_waiting}}
    if step.kv_blocks_used is not None and step.kv_blocks_total is not None:
        counts["KV blocks"] = {"used": step.kv_blocks_used, "free": step.kv_blocks_total - step.kv_blocks_used}
    for name, values in counts.items():
        yield {"ph": "C", "name": name, "ts": _us(_end(step), origin), "pid": _ENGINE, "args": values}


def _sequence(life: _Life, origin: float) -> Iterator[Event]:
    answer = f", answer {life.answer + 1}" if life.answer else ""
    yield from _lane(_REQUESTS, _FIRST_LANE + life.seq_id, f"request {life.request_id}{answer}")
    at = {"pid": _REQUESTS, "tid": _FIRST_LANE + life.seq_id, "cat": "request"}
    ends = [*(when for _, when in life.marks[1:]), life.end]
    for i, ((name, start), end) in enumerate(zip(life.marks, ends, strict=True)):
        yield _span(name, start, end, origin, at, life.args if i == 0 else None)
        if i == 0 and life.tokenize is not None:
            phase = life.tokenize
            yield _span(phase.name, start, phase.start + phase.duration, origin, at, {"tokens": phase.num_tokens})
        elif name == "queue" and i > 0:
            yield _instant("preempted", start, origin, at)


# ------------------------------------------------------------------------------ the format's events


def _us(moment: float, origin: float) -> float:
    """Microseconds since the trace began, in whole nanoseconds: rounding keeps order, so what nests still nests."""
    return round((moment - origin) * 1e9) / 1e3


def _span(
    name: str, start: float, end: float, origin: float, at: Mapping[str, Any], args: Mapping[str, Any] | None = None
) -> Event:
    ts = _us(start, origin)
    event = {"ph": "X", "name": name, "ts": ts, "dur": round(_us(end, origin) - ts, 3), **at}
    return event if args is None else event | {"args": args}


def _instant(name: str, moment: float, origin: float, at: Mapping[str, Any]) -> Event:
    return {"ph": "i", "s": "t", "name": name, "ts": _us(moment, origin), **at}


def _group(pid: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}


def _lane(pid: int, tid: int, name: str) -> Iterator[Event]:
    yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
    yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
