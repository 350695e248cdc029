"""What the scheduler decides, step by step, and that it never stops deciding."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nanovllm.batch import Batch, ScheduledSeq
from nanovllm.builtin.mock import Script, expected
from nanovllm.engine import Engine
from nanovllm.errors import ConfigError, EngineDead, RequestError
from nanovllm.request import Finish, Request, SamplingParams
from nanovllm.scheduler import MIN_ROWS
from nanovllm.testing import ChainRunner
from programs import Digits


class Spy(ChainRunner):
    """Remembers what each step computed: (request number, start, stop) triples."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[list[tuple[int, int, int]]] = []

    def check(self, batch: Batch) -> None:
        super().check(batch)
        self.steps.append([(s.seq_id, s.start, s.stop) for s in batch.seqs])


def make(runner_options: dict[str, Any] | None = None, **options: Any) -> tuple[Engine, Spy]:
    runner = Spy(11, **{"block_size": 4, "num_blocks": 64, "max_model_len": 128, **(runner_options or {})})
    return Engine(runner, Digits(), **{"max_num_seqs": 4, "max_num_batched_tokens": 16, **options}), runner


def greedy(prompt: list[int], max_tokens: int, **options: Any) -> Request:
    return Request(
        prompt=prompt, params=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True), **options
    )


def finish_all(engine: Engine) -> dict[int, Any]:
    done = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.output is not None:
                done[delta.request_id] = delta.output
        engine.scheduler.check()
    return done


# ------------------------------------------------------------------------------------- the choices


def test_a_long_prompt_is_computed_in_chunks_while_others_decode() -> None:
    engine, runner = make()
    engine.add(greedy([1] * 4, 5))
    engine.step()
    engine.add(greedy([2] * 33, 2))
    finish_all(engine)
    # One token for the running sequence first, what is left of the budget of 16 for the chunk.
    assert runner.steps[1:5] == [
        [(1, 4, 5), (2, 0, 15)],
        [(1, 5, 6), (2, 15, 30)],
        [(1, 6, 7), (2, 30, 33)],
        [(1, 7, 8), (2, 33, 34)],
    ]


def test_a_request_joins_the_running_batch_and_a_finished_one_leaves_its_slot_at_once() -> None:
    engine, runner = make(max_num_seqs=2)
    for number in range(1, 4):
        engine.add(greedy([number] * 3, number + 1))
    engine.step()
    assert [s for s, _, _ in runner.steps[-1]] == [1, 2]
    engine.step()  # the first one ends here
    engine.step()
    assert [s for s, _, _ in runner.steps[-1]] == [2, 3]


def test_lower_priority_runs_first_and_inside_one_it_is_first_come_first_served() -> None:
    engine, runner = make(max_num_seqs=1)
    for prompt, priority in (([1], 1), ([2], 0), ([3], 1), ([4], 0), ([5], -1)):
        engine.add(greedy(prompt, 1, priority=priority))
    finish_all(engine)
    assert [step[0][0] for step in runner.steps] == [5, 2, 4, 1, 3]


def test_a_large_request_at_the_head_is_not_overtaken() -> None:
    engine, runner = make({"num_blocks": 8}, prefix_caching=False)
    engine.add(greedy([1] * 16, 8))  # 4 of 8 blocks, later 6
    engine.step()
    engine.add(greedy([2] * 20, 2))  # 5 blocks: has to wait
    engine.add(greedy([3], 1))  # would fit, and waits behind it
    engine.step()
    assert [s for s, _, _ in runner.steps[-1]] == [1]
    finish_all(engine)
    first_seen = list(dict.fromkeys(s for step in runner.steps for s, _, _ in step))
    assert first_seen == [1, 2, 3]


def test_the_newest_gives_way_and_pays_with_at_least_one_token_each_time() -> None:
    engine, _ = make({"num_blocks": 6, "block_size": 2}, prefix_caching=False)
    requests = [greedy([i, i], 9) for i in range(1, 4)]
    tickets = [engine.add(r) for r in requests]
    done = finish_all(engine)
    for ticket in tickets:
        output = done[ticket.request_id]
        assert list(output.token_ids) == expected(ticket.prompt_ids, 9, vocab_size=11)
        assert output.stats.num_preemptions <= output.stats.num_output_tokens
    assert done[tickets[0].request_id].stats.num_preemptions == 0, "the first in order never gives way"
    assert engine.stats().num_preemptions > 0


def test_a_cached_prompt_computes_one_token_even_if_all_its_blocks_are_known() -> None:
    engine, runner = make()
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]  # two whole blocks
    engine.add(greedy(prompt, 1))
    finish_all(engine)
    ticket = engine.add(greedy(prompt, 3))
    done = finish_all(engine)
    assert runner.steps[1] == [(2, 4, 8)]
    assert done[ticket.request_id].stats.num_cached_tokens == 4
    assert list(done[ticket.request_id].token_ids) == expected(prompt, 3, vocab_size=11)


def test_siblings_wait_for_the_prompt_and_share_its_full_blocks() -> None:
    engine, runner = make(prefix_caching=False)
    engine.add(greedy(list(range(10)), 2, n=3))
    finish_all(engine)
    assert runner.steps[0] == [(1, 0, 10)]
    assert runner.steps[1] == [(1, 10, 11), (2, 8, 10), (3, 8, 10)]
    # Without prefix caching nobody else shares them.
    engine.add(greedy(list(range(10)), 1))
    engine.step()
    assert runner.steps[-1] == [(4, 0, 10)]


def test_prompt_logprobs_never_ask_for_more_rows_than_a_step_may_have() -> None:
    engine, runner = make(max_num_batched_tokens=1000, runner_options={"num_blocks": 300, "max_model_len": 1000})
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    rows = []
    check = runner.check
    runner.check = lambda batch: (rows.append(sum(s.num_logits for s in batch.seqs)), check(batch))  # type: ignore[method-assign, func-returns-value]
    tickets = [engine.add(Request(prompt=[i] * 150, params=params)) for i in range(2)]
    finish_all(engine)
    assert max(rows) <= MIN_ROWS
    assert [len(t.sequences[0].prompt_logprobs) for t in tickets] == [149, 149]


# -------------------------------------------------------------------------------- limits at the door


def test_a_step_must_have_a_token_for_everybody() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(3\) is smaller than max_num_seqs \(4\)"):
        make(max_num_batched_tokens=3)


def test_a_prompt_larger_than_the_pool_is_refused_with_the_numbers() -> None:
    engine, _ = make({"num_blocks": 4})
    with pytest.raises(RequestError, match=r"17 tokens, but the whole KV cache holds 16"):
        engine.add(greedy([1] * 17, 1))
    ticket = engine.add(greedy([1] * 16, 5))  # exactly full: room for the token that is not cached any more
    output = finish_all(engine)[ticket.request_id]
    assert output.finish is Finish.LENGTH
    assert list(output.token_ids) == expected([1] * 16, 1, vocab_size=11)


def test_a_prompt_as_long_as_the_model_is_refused_with_the_numbers() -> None:
    engine, _ = make()
    with pytest.raises(RequestError, match=r"128 tokens, but the model's length is 128"):
        engine.add(greedy([1] * 128, 1))


def test_a_runner_that_cannot_chunk_takes_only_prompts_that_fit_a_step() -> None:
    for layout in ("paged", "lanes"):
        engine, runner = make({"can_chunk": False, "layout": layout})
        with pytest.raises(RequestError, match=r"17 tokens do not fit max_num_batched_tokens \(16\)"):
            engine.add(greedy([1] * 17, 1))
        engine.add(greedy([1] * 10, 3))
        engine.add(greedy([2] * 10, 3))
        finish_all(engine)
        assert runner.steps[:2] == [[(1, 0, 10)], [(1, 10, 11), (2, 0, 10)]]
    with pytest.raises(RequestError, match="do not fit"):  # once preempted, it could not come back
        make({"can_chunk": False})[0].add(greedy([1] * 10, 20))


# ------------------------------------------------------------------------------------------- packed


@given(st.data())
def test_packed_says_the_same_as_the_sequences(data: st.DataObject) -> None:
    size, num_lanes, width = data.draw(st.integers(1, 5)), 6, 12
    table = np.random.default_rng(0).permutation(num_lanes * width).reshape(num_lanes, width).astype(np.int32)
    seqs = []
    for number, lane in enumerate(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))):
        length = data.draw(st.integers(1, size * width))
        stop = data.draw(st.integers(1, length))
        start = data.draw(st.integers(0, stop - 1)) if data.draw(st.booleans()) else stop - 1
        wanted = data.draw(st.integers(0, stop - start))
        context = np.arange(length, dtype=np.int32) * 7 + number
        blocks = table[lane, : -(-stop // size)]
        seqs.append(ScheduledSeq(number, lane, context, length, start, stop, wanted, blocks, None, None))  # type: ignore[arg-type]
    packed = Batch(tuple(seqs), table, size).packed
    tokens = [(s, p) for s in seqs for p in range(s.start, s.stop)]
    assert packed.input_ids.tolist() == [s.context[p] for s, p in tokens]
    assert packed.positions.tolist() == [p for _, p in tokens]
    assert packed.slots.tolist() == [s.blocks[p // size] * size + p % size for s, p in tokens]
    assert packed.q_start.tolist() == list(np.cumsum([0] + [s.stop - s.start for s in seqs]))
    assert packed.kv_lens.tolist() == [s.stop for s in seqs]
    assert packed.lanes.tolist() == [s.lane for s in seqs]
    longest = max(len(s.blocks) for s in seqs)
    assert packed.tables.tolist() == [s.blocks.tolist() + [-1] * (longest - len(s.blocks)) for s in seqs]
    wanted_rows = [i for i, (s, p) in enumerate(tokens) if p >= s.stop - s.num_logits]
    assert packed.rows.tolist() == wanted_rows
    assert {a.dtype for a in packed} == {np.dtype(np.int32)}


# ------------------------------------------------------------------------------------ state machine


class Machine(RuleBasedStateMachine):
    """Anything may happen in any order; accounts balance after each step and everybody is answered in time."""

    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(3, 24),
        max_num_seqs=st.integers(1, 4),
        budget=st.integers(4, 24),
        layout=st.sampled_from(["paged", "paged", "paged", "lanes"]),
        caching=st.booleans(),
        fail_steps=st.lists(st.integers(1, 30), max_size=3, unique=True),
    )
    def start(self, block_size: int, num_blocks: int, layout: str, fail_steps: list[int], **options: Any) -> None:
        logging.disable(logging.CRITICAL)
        runner = ChainRunner(
            11,
            block_size=block_size,
            num_blocks=num_blocks,
            max_model_len=40,
            max_num_seqs=options["max_num_seqs"],
            layout=layout,
            script=Script(fail_steps=fail_steps),
        )
        self.engine = Engine(
            runner,
            Digits(),
            max_num_seqs=options["max_num_seqs"],
            max_num_batched_tokens=options["budget"],
            prefix_caching=options["caching"],
        )
        self.open: dict[tuple[int, int], Any] = {}
        self.prompts: dict[int, tuple[int, ...]] = {}
        self.may_fail = bool(fail_steps)

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        max_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
        priority=st.integers(-1, 1),
    )
    def add(self, prompt: list[int], max_tokens: int, n: int, priority: int) -> None:
        try:
            ticket = self.engine.add(greedy(prompt, max_tokens, n=n, priority=priority))
        except RequestError:
            assert len(prompt) >= self.engine.max_len
            return
        except EngineDead:
            assert self.may_fail
            return
        self.prompts[ticket.request_id] = ticket.prompt_ids
        self.open |= {(ticket.request_id, i): [] for i in range(n)}

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            for delta in self.engine.step():
                where = (delta.request_id, delta.completion_index)
                self.open[where] += delta.token_ids
                if delta.output is None:
                    continue
                tokens = self.open.pop(where)
                assert tokens == list(delta.output.token_ids)
                assert tokens == expected(self.prompts[where[0]], len(tokens), vocab_size=11)
                assert self.may_fail or delta.finish is not Finish.ERROR

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.sampled_from(sorted(self.open)))[0])

    @invariant()
    def accounts_balance(self) -> None:
        self.engine.scheduler.check()
        health = self.engine.health()
        assert health.num_running + health.num_waiting <= len(self.open)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        # Every token may cost a whole recomputation of a context of at most 40 tokens, 4 a step: a generous bound.
        bound = 50 + 12 * 12 * len(self.open)
        while self.engine.has_work:
            self.step(1)
            self.engine.scheduler.check()
            bound -= 1
            assert bound > 0, "no end in sight"
        assert not self.open, "somebody was never answered"
        logging.disable(logging.NOTSET)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
