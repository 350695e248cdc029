"""The numbers of a step: the pipeline's five stages on a time line, and sums that agree with the answers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from nanovllm import LLM, SamplingParams
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.stats import KvBlocks, StepStats


class Recorder:
    def __init__(self) -> None:
        self.tickets: list[Any] = []
        self.steps: list[StepStats] = []

    def on_request(self, ticket: Any) -> None:
        self.tickets.append(ticket)

    def on_step(self, stats: StepStats) -> None:
        self.steps.append(stats)


def run() -> tuple[Recorder, LLM, list[Any]]:
    """Two prompts of which one is computed in chunks, by a clock that goes one second further at every look."""
    recorder, ticks = Recorder(), itertools.count()
    llm = LLM.from_components(
        MockRunner(), SimpleBPETokenizer(), max_num_seqs=4, max_num_batched_tokens=8, eos_ids=(), observers=[recorder],
        clock=lambda: float(next(ticks)),
    )  # fmt: skip
    outputs = llm.generate(["what can you do with a zebra", "hello"], SamplingParams(temperature=0, max_tokens=6))
    return recorder, llm, outputs


def test_the_five_stages_lie_on_a_time_line() -> None:
    recorder, _, outputs = run()
    first = [ticket.tokenize for ticket in recorder.tickets]  # belongs to the request; the others to a step
    assert [(p.name, p.num_tokens) for p in first] == [("tokenize", len(o.prompt_token_ids)) for o in outputs]
    assert all(p.duration > 0 for p in first)
    names = set()
    for step in recorder.steps:
        assert all(phase.num_tokens > 0 for phase in step.phases)
        ends = [step.start + step.schedule_seconds, *(phase.start + phase.duration for phase in step.phases)]
        assert [phase.start for phase in step.phases] == pytest.approx(ends[:-1])
        assert ends[-1] == pytest.approx(ends[0] + step.forward_seconds + step.sample_seconds + step.advance_seconds)
        names.add(tuple(phase.name for phase in step.phases))
    assert {n for some in names for n in some} == {"prefill", "decode", "sample", "detokenize"}
    assert all(list(some) == [n for n in ("prefill", "decode", "sample", "detokenize") if n in some] for some in names)


def test_every_prompt_token_is_prefilled_once_and_every_other_decoded_once() -> None:
    recorder, llm, outputs = run()
    prompts = sum(len(o.prompt_token_ids) for o in outputs)
    # The first token of an answer comes with the prompt's last step, the last one's KV is never computed.
    decoded = sum(len(o.token_ids) - 1 for o in outputs)
    assert sum(s.num_prefill_tokens for s in recorder.steps) == llm.stats().num_prefill_tokens == prompts
    assert sum(s.num_decode_tokens for s in recorder.steps) == llm.stats().num_decode_tokens == decoded
    assert len([s for s in recorder.steps if s.num_prefill_tokens]) > 1, "the prompts came in one chunk"


def test_the_parts_of_the_total_are_those_of_the_steps() -> None:
    recorder, llm, _ = run()
    total = llm.stats()
    assert total.num_steps == len(recorder.steps) == recorder.steps[-1].step
    for name in ("schedule_seconds", "prefill_seconds", "decode_seconds", "sample_seconds", "advance_seconds"):
        assert getattr(total, name) == pytest.approx(sum(getattr(s, name) for s in recorder.steps))
    assert total.prefill_tokens_per_second == pytest.approx(total.num_prefill_tokens / total.prefill_seconds)
    before = total
    llm.generate("hello", SamplingParams(temperature=0, max_tokens=2))
    assert llm.stats().since(before).num_requests == 1


def test_blocks_in_use_are_reported_and_come_back() -> None:
    recorder, _, _ = run()
    assert max(s.kv_blocks_used or 0 for s in recorder.steps) > 0
    assert recorder.steps[-1].kv_blocks_used == 0
    assert recorder.steps[-1].kv_blocks_total == 4096


def test_the_pool_is_counted_while_it_is_used_and_after() -> None:
    llm = LLM.from_components(MockRunner(num_blocks=64, block_size=4), SimpleBPETokenizer(), eos_ids=())
    counts: list[KvBlocks | None] = []

    class Watcher:
        def on_step(self, stats: StepStats) -> None:
            counts.append(llm.engine.kv_blocks())

    llm.engine.observe(Watcher())  # an engine that exists already
    prompt, params = list(range(1, 15)), SamplingParams(temperature=0, max_tokens=4)
    llm.generate([prompt], params)
    llm.generate([prompt] * 2, params)
    assert {c.shared for c in counts if c} == {0, 3}  # the three full blocks of the prompt, by both of the second call
    assert all(c is not None and c.used + c.cached <= c.total == 64 for c in counts)
    # 14 + 3 tokens had their KV computed: four full blocks each, of which the answers' are equal too.
    assert llm.engine.kv_blocks() == KvBlocks(total=64, used=0, shared=0, cached=4)
    assert LLM.from_components(MockRunner(layout="lanes"), SimpleBPETokenizer()).engine.kv_blocks() is None
