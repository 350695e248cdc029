"""Does anything grow? Thousands of requests of every kind, and then memory, threads and files are counted.

    python benchmarks/soak.py [--requests 2000] [--model DIRECTORY --runner numpy]

Prints a line per tenth; the slope is taken over the second half, after caches and pools have filled.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanovllm import LLM, RequestError, SamplingParams
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer

LIMIT = 1.0  # KiB per request


def resident() -> int:
    """Bytes of memory in use; where the system does not say, the most there ever were."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def open_files() -> int | None:
    """File descriptors in use; None where the system does not say."""
    descriptors = Path("/proc/self/fd")
    return len(os.listdir(descriptors)) if descriptors.is_dir() else None


def burst(llm: LLM, draw: random.Random, num: int, width: int) -> None:
    """`num` requests: shared prefixes, siblings, stops, logprobs, refusals, and a stream that is left early."""
    shared = [draw.randrange(5, width) for _ in range(48)]

    def prompt() -> list[int]:
        own = [draw.randrange(5, width) for _ in range(draw.randrange(1, 60))]
        return shared[: draw.choice([0, 16, 48])] + own

    def params() -> SamplingParams:
        return SamplingParams(
            temperature=draw.choice([0.0, 0.8]),
            max_tokens=draw.randrange(1, 24),
            stop=draw.choice([(), ("the",)]),
            logprobs=draw.choice([None, None, 3]),
        )

    llm.generate(
        [prompt() for _ in range(num)], [params() for _ in range(num)], n=draw.choice([1, 1, 2]), show_progress=False
    )
    for _ in llm.stream([prompt() for _ in range(4)], params()):
        break
    try:
        llm.generate([], params())
    except RequestError:
        return
    raise AssertionError("an empty list of prompts was accepted")


def slope(counts: Sequence[int], bytes_used: Sequence[int]) -> float:
    """KiB per request over the second half."""
    half = len(counts) // 2
    return float(np.polyfit(counts[half:], bytes_used[half:], 1)[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model", help="a model directory or name; without one, the mock runner")
    parser.add_argument("--runner", default="numpy", help="the runner for --model")
    args = parser.parse_args()
    if args.model is None:
        llm = LLM.from_components(MockRunner(num_blocks=160, max_model_len=512), SimpleBPETokenizer(), max_num_seqs=16)
    else:
        llm = LLM(args.model, runner=args.runner)
    draw = random.Random(0)
    counts, used, before = [], [], None
    size = 20
    with llm:
        width = llm.tokenizer.vocab_size if llm.tokenizer is not None else 100
        for done in range(size, args.requests + 1, size):
            burst(llm, draw, size, width)
            counts.append(done)
            used.append(resident())
            if done % max(size, args.requests // 10) == 0:
                handles = (threading.active_count(), open_files())
                before = before or handles
                print(
                    f"{done:6} requests  {used[-1] / 2**20:8.1f} MiB  {handles[0]} threads  {handles[1]} files",
                    flush=True,
                )
                assert handles == before, "threads or files leak"
    growth = slope(counts, used)
    print(f"slope {growth:.3f} KiB per request (limit {LIMIT}: {'ok' if growth <= LIMIT else 'MISSED'})")


if __name__ == "__main__":
    main()
