"""What tracing costs: time of a step, bytes of the file, and the memory that a full tracer holds.

    python benchmarks/trace_cost.py [--seqs 32] [--rounds 9]

The mock runner, so that the engine's own time is nearly all there is. Traced and plain runs take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

from nanovllm.bench.trace import MAX_STEPS, Tracer
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine
from nanovllm.request import Request, SamplingParams


def run(engine: Engine, num_seqs: int, num_tokens: int = 200) -> float:
    """Seconds per step."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for i in range(num_seqs):
        engine.add(Request(prompt=[i % 100, 1, 2, 3], params=params))
    before, started = engine.stats().num_steps, time.perf_counter()
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - started) / (engine.stats().num_steps - before)


def new_engine(num_seqs: int) -> Engine:
    return Engine(MockRunner(), SimpleBPETokenizer(), max_num_seqs=num_seqs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqs", type=int, default=32, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of runs")
    parser.add_argument("--full", type=int, default=MAX_STEPS, help="steps that the full tracer holds")
    args = parser.parse_args()

    engines, tracer = [new_engine(args.seqs) for _ in range(2)], Tracer()
    engines[1].observe(tracer)
    plain, traced = [], []
    for i in range(args.rounds):
        for j in (0, 1) if i % 2 else (1, 0):
            (plain, traced)[j].append(1e6 * run(engines[j], args.seqs))
    extra = [b - a for a, b in zip(plain, traced, strict=True)]
    usual, more = statistics.median(plain), statistics.median(extra)
    print(f"a step of {args.seqs} sequences: {usual:.1f} us")
    print(f"traced: {more:.1f} us more ({min(extra):.1f} to {max(extra):.1f})")

    with tempfile.TemporaryDirectory() as directory:
        for name in ("trace.json", "trace.json.gz"):
            path, started = Path(directory, name), time.perf_counter()
            tracer.write(path)
            seconds = time.perf_counter() - started
            print(f"{name}: {path.stat().st_size / tracer.num_steps:.0f} bytes a step, written in {seconds:.1f} s")

    # As many steps as it keeps, and with 4 tokens each, as many sequences.
    engine, tracer = new_engine(1), Tracer()
    engine.observe(tracer)
    tracemalloc.start()
    while tracer.num_steps < args.full:
        run(engine, 16, 4)
    held = tracemalloc.get_traced_memory()[0]
    print(f"{tracer.num_steps} steps and {tracer.num_sequences} sequences kept: {held / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
