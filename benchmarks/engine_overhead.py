"""What the engine itself costs per step: everything but the runner's forward pass.

    python benchmarks/engine_overhead.py [--steps 200] [--seqs 8,32,...] [--contexts 100,2000] [--profile NUM_SEQS]

Steady decode with the mock runner. Overhead = schedule + pack the batch + sample + advance + commit.
`pack` is timed by itself, since it happens inside the runner's call: `Batch.packed` is built at first use.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Iterator
from typing import Any

from nanovllm.batch import Batch, SeqOutput
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine
from nanovllm.request import Request, SamplingParams
from nanovllm.stats import StepStats

TARGETS = {(32, 100): 0.3, (32, 2000): 0.3, (256, 2000): 2.0}  # (sequences, context) -> ms per step
KINDS = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95, "seed": 1},
}


class TimedRunner(MockRunner):
    """The mock runner with a cheap forward pass, and a clock around packing and computing."""

    pack_seconds = forward_seconds = 0.0

    def execute(self, batch: Batch) -> list[SeqOutput]:
        started = time.perf_counter()
        _ = batch.packed
        self.pack_seconds = time.perf_counter() - started
        return super().execute(batch)

    def forward(self, packed: Any) -> Any:
        started = time.perf_counter()
        logits = super().forward(packed)
        self.forward_seconds = time.perf_counter() - started
        return logits


class Steps:
    """Keeps the last step's statistics."""

    last: StepStats

    def on_step(self, stats: StepStats) -> None:
        self.last = stats


def decoding(num_seqs: int, context: int, params: dict[str, Any], steps: int) -> tuple[Engine, TimedRunner, Steps]:
    """An engine in the middle of decoding `num_seqs` sequences of `context` tokens and more."""
    room = context + steps + 64
    runner = TimedRunner(max_model_len=room, max_num_seqs=num_seqs, num_blocks=num_seqs * (room // 16 + 1))
    seen = Steps()
    engine = Engine(runner, SimpleBPETokenizer(), max_num_seqs=num_seqs, max_num_batched_tokens=8192, observers=[seen])
    for i in range(num_seqs):
        prompt = [(i + 7 * j) % 120 + 4 for j in range(context)]
        engine.add(Request(prompt=prompt, params=SamplingParams(max_tokens=steps + 32, ignore_eos=True, **params)))
    while engine.scheduler.waiting or seen.last.num_prefill_tokens:
        engine.step()
    return engine, runner, seen


def measure(num_seqs: int, context: int, params: dict[str, Any], steps: int) -> dict[str, float]:
    """Medians in milliseconds per step."""
    engine, runner, seen = decoding(num_seqs, context, params, steps)
    samples: dict[str, list[float]] = {name: [] for name in ("total", "schedule", "pack", "sample", "rest")}
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        total = time.perf_counter() - started - runner.forward_seconds
        step = seen.last
        samples["total"].append(total)
        samples["schedule"].append(step.schedule_seconds)
        samples["pack"].append(runner.pack_seconds)
        samples["sample"].append(step.sample_seconds)
        samples["rest"].append(total - step.schedule_seconds - runner.pack_seconds - step.sample_seconds)
    return {name: 1000 * statistics.median(values) for name, values in samples.items()}


def rows(steps: int, sizes: list[int], contexts: list[int]) -> Iterator[str]:
    yield f"{'':8} {'seqs':>5} {'context':>8} {'ms/step':>8} {'us/seq':>7}   schedule   pack  sample    rest   target"
    for kind, params in KINDS.items():
        for context in contexts:
            for num_seqs in sizes:
                ms = measure(num_seqs, context, params, steps)
                target = TARGETS.get((num_seqs, context)) if kind == "greedy" else None
                verdict = "" if target is None else f"{target} {'ok' if ms['total'] <= target else 'MISSED'}"
                yield (
                    f"{kind:8} {num_seqs:5} {context:8} {ms['total']:8.3f} {1000 * ms['total'] / num_seqs:7.2f}   "
                    f"{ms['schedule']:8.3f} {ms['pack']:6.3f}  {ms['sample']:6.3f}  {ms['rest']:6.3f}   {verdict}"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="decode steps per row of the table")
    parser.add_argument("--seqs", type=_numbers, default=[8, 32, 64, 128, 256])
    parser.add_argument("--contexts", type=_numbers, default=[100, 2000], help="tokens per sequence")
    parser.add_argument("--profile", type=int, metavar="NUM_SEQS", help="profile this many sequences instead")
    args = parser.parse_args()
    if args.profile is None:
        for line in rows(args.steps, args.seqs, args.contexts):
            print(line, flush=True)
        return
    engine, _, _ = decoding(args.profile, 2000, KINDS["greedy"], args.steps)
    with cProfile.Profile() as profile:
        for _ in range(args.steps):
            engine.step()
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
