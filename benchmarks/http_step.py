"""What a step over HTTP costs beyond the served runner: the same decode here and through `nanovllm runner-serve`.

    python benchmarks/http_step.py [--steps 400] [--seqs 32] [--context 100] [--rounds 5] [--model mock|demo]

Both take turns in one run, so that a machine that drifts drifts for both. `beyond` is the median step over HTTP less
the median time that the runner itself takes here, which leaves both engines, the protocol and HTTP.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nanovllm import LLM, Request, SamplingParams
from nanovllm.engine import Engine
from nanovllm.stats import StepStats

TARGET = 2.0  # ms per step of 32 sequences, beyond the served runner's own time
SECTIONS = {
    "mock": {"runner": "mock", "tokenizer": "simple"},
    "demo": {"runner": "numpy", "model": "demo"},
}
LIMITS = {"max_num_batched_tokens": 8192}


class Steps:
    """Keeps the last step's statistics."""

    last: StepStats

    def on_step(self, stats: StepStats) -> None:
        self.last = stats


@contextmanager
def served(model: str, num_seqs: int) -> Iterator[str]:
    """The address of a runner-serve in a process of its own."""
    options = [f"--{key}={value}" for key, value in SECTIONS[model].items()]
    sets = [f"--set=scheduler.{key}={value}" for key, value in {**LIMITS, "max_num_seqs": num_seqs}.items()]
    command = [
        sys.executable,
        "-c",
        "from nanovllm.cli import main; main()",
        "runner-serve",
        "--port=0",
        *options,
        *sets,
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            yield found[0]
        finally:
            process.terminate()


def begin(llm: LLM, num_seqs: int, context: int, steps: int) -> tuple[Engine, Steps]:
    """An engine in the middle of decoding."""
    engine, seen = llm.engine, Steps()
    engine._observers.append(seen)
    vocab = engine.info.vocab_size or 100
    params = SamplingParams(temperature=0, max_tokens=steps + 64, ignore_eos=True)
    for i in range(num_seqs):
        engine.add(Request(prompt=[(i + 7 * j) % (vocab - 4) + 4 for j in range(context)], params=params))
    while not engine.has_work or any(s.num_output == 0 for s in engine._live.values()):
        engine.step()
    return engine, seen


def timed(engine: Engine, seen: Steps, steps: int) -> tuple[list[float], list[float]]:
    """Milliseconds per step: of the whole engine, of its runner."""
    whole, own = [], []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        whole.append(1000 * (time.perf_counter() - started))
        own.append(1000 * seen.last.forward_seconds)
    return whole, own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="decode steps on each side")
    parser.add_argument("--rounds", type=int, default=5, help="turns that they are split into")
    parser.add_argument("--seqs", type=int, default=32)
    parser.add_argument("--context", type=int, default=100, help="tokens per sequence at the start")
    parser.add_argument("--model", choices=SECTIONS, default="mock")
    args = parser.parse_args()
    scheduler = {**LIMITS, "max_num_seqs": args.seqs}
    per_round = max(1, args.steps // args.rounds)
    with served(args.model, args.seqs) as url:
        local = LLM.from_config(None, scheduler=scheduler, **SECTIONS[args.model])
        remote = LLM.from_config(
            None, scheduler=scheduler, **{**SECTIONS[args.model], "runner": {"type": "http", "url": url}}
        )
        with local, remote:
            here, there = (begin(llm, args.seqs, args.context, args.steps) for llm in (local, remote))
            samples: dict[str, list[float]] = {"local": [], "runner": [], "http": []}
            calls = count(remote, url)[1]
            for _ in range(args.rounds):
                whole, own = timed(*here, per_round)
                samples["local"] += whole
                samples["runner"] += own
                samples["http"] += timed(*there, per_round)[0]
            connections, now = count(remote, url)
            same = [s.output_ids for s in here[0]._live.values()] == [s.output_ids for s in there[0]._live.values()]
            report(args, samples, now - calls, connections, same)


def count(llm: LLM, url: str) -> tuple[int, int]:
    """Connections and calls of the runner's pool so far."""
    runner: Any = llm.engine.runner
    pools = runner._servers.transports[0]._session.get_adapter(url).poolmanager.pools
    every = [pools[key] for key in pools.keys()]  # noqa: SIM118 (it has no iterator)
    return sum(pool.num_connections for pool in every), sum(pool.num_requests for pool in every)


def report(args: argparse.Namespace, samples: dict[str, list[float]], calls: int, connections: int, same: bool) -> None:
    medians = {name: statistics.median(values) for name, values in samples.items()}
    beyond = medians["http"] - medians["runner"]
    p95 = statistics.quantiles(samples["http"], n=20)[-1] if len(samples["http"]) > 1 else medians["http"]
    print(f"{args.seqs} sequences, {args.model}, {len(samples['http'])} steps, medians in ms:")
    print(f"  the runner alone   {medians['runner']:7.3f}")
    print(f"  a local step       {medians['local']:7.3f}")
    print(f"  a step over HTTP   {medians['http']:7.3f}   (95 % within {p95:.3f})")
    print(f"  beyond the runner  {beyond:7.3f}   target {TARGET}: {'ok' if beyond <= TARGET else 'MISSED'}")
    print(f"  {calls / len(samples['http']):.2f} calls per step, {connections} connection(s), same tokens: {same}")


if __name__ == "__main__":
    main()
