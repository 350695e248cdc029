"""Recorded traces: every step of the engine on nano-vllm's workload, against a scheduler of plain integers.

The reference follows the rules of docs/architecture.md ("Scheduling") and knows no blocks, tables, lanes or tokens:
a request is four numbers, the pool is a count. It has no prefix cache, which the engine's is off for here.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from nanovllm.batch import Batch, SeqOutput
from nanovllm.bench.engine import EngineBench
from nanovllm.bench.workload import PRESETS, Drawn, Job
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine

BLOCK = 16
Trace = list[list[tuple[int, int, int]]]  # per step: (request, start, stop) of everything computed, by request


class Recorder(MockRunner):
    def __init__(self, **options: int) -> None:
        super().__init__(**options)
        self.trace: Trace = []

    def execute(self, batch: Batch) -> list[SeqOutput]:
        self.trace.append(sorted((s.seq_id - 1, s.start, s.stop) for s in batch.seqs))
        return super().execute(batch)


@dataclass
class State:
    index: int
    known: int  # tokens: the prompt, and what was generated
    end: int  # known tokens at its end
    computed: int = 0
    blocks: int = 0
    admitted_at: int = 0
    was_preempted: bool = False


def naive(jobs: tuple[Job, ...], max_num_seqs: int, budget_per_step: int, free: int) -> tuple[Trace, int]:
    """The trace, and how many preemptions it took."""
    waiting = [State(i, len(job.prompt), len(job.prompt) + job.num_tokens) for i, job in enumerate(jobs)]
    running: list[State] = []
    trace: Trace = []
    num_preemptions = 0
    while waiting or running:
        budget, step, partial = budget_per_step, [], []
        for r in list(running):
            if r not in running:
                continue
            if r.known - r.computed > 1:
                partial.append(r)
                continue
            while r in running and r.blocks * BLOCK < r.known:
                if free:
                    r.blocks, free = r.blocks + 1, free - 1
                    continue
                victim = [v for v in running if v.known > v.admitted_at][-1]
                running.remove(victim)
                free, num_preemptions = free + victim.blocks, num_preemptions + 1
                victim.blocks = victim.computed = 0
                victim.was_preempted = True
                waiting = sorted([*waiting, victim], key=lambda w: w.index)
            if r in running:
                step.append((r, r.known))
                budget -= 1
        for r in partial:
            if budget:
                stop = min(r.known, r.computed + budget)
                step.append((r, stop))
                budget -= stop - r.computed
        while waiting and budget and len(running) < max_num_seqs:
            r = waiting[0]
            need = -(-r.known // BLOCK)
            if need + (len(running) if r.was_preempted else 0) > free:
                break
            waiting.remove(r)
            running = sorted([*running, r], key=lambda x: x.index)
            r.blocks, r.admitted_at, free = need, r.known, free - need
            stop = min(r.known, budget)
            step.append((r, stop))
            budget -= stop
        trace.append(sorted((r.index, r.computed, stop) for r, stop in step))
        for r, stop in step:
            r.computed = stop
            r.known += stop == r.known
            if r.known == r.end:
                running.remove(r)
                free += r.blocks
    return trace, num_preemptions


@pytest.mark.parametrize(
    ("max_num_seqs", "budget", "num_blocks", "preempts"),
    [(64, 512, 4096, False), (64, 64, 4096, False), (256, 1024, 400, True), (32, 100, 60, True)],
    ids=["roomy", "small chunks", "a small pool", "a tiny pool"],
)
def test_every_step_is_the_one_that_the_rules_give(
    max_num_seqs: int, budget: int, num_blocks: int, preempts: bool
) -> None:
    preset = PRESETS["nano-vllm"]
    eighth = Drawn(num_requests=preset.num_requests, input_len=(12, 128), output_len=(12, 128), num_ids=125)
    jobs = eighth.workload(125, 512).jobs
    runner = Recorder(max_num_seqs=max_num_seqs, block_size=BLOCK, num_blocks=num_blocks)
    engine = Engine(
        runner, SimpleBPETokenizer(), max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, prefix_caching=False
    )
    run = EngineBench(engine).run(jobs)
    trace, num_preemptions = naive(jobs, max_num_seqs, budget, num_blocks)
    assert (num_preemptions > 0) == preempts
    assert run.stats.num_preemptions == num_preemptions
    assert len(runner.trace) == len(trace)
    for number, (ours, theirs) in enumerate(zip(runner.trace, trace, strict=True), 1):
        assert ours == theirs, f"step {number}"
