"""Sequences that their caller leads: the same tokens at any pace, from any place, and in nobody's way."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.engine import Engine
from nanovllm.errors import RequestError
from nanovllm.intake import Ticket
from nanovllm.request import Finish, PacedRequest, Request, SamplingParams
from nanovllm.testing import ChainRunner, alone
from programs import EOS, VOCAB, Digits

MAX_LEN = 40  # tokens


class Case:
    """One request of a program, and the whole answer that it must give."""

    def __init__(self, draw: Any) -> None:
        self.prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
        self.index = draw(st.integers(0, 2))
        self.params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
            max_tokens=draw(st.integers(1, 14)),
            min_tokens=draw(st.integers(0, 1)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            presence_penalty=draw(st.sampled_from([0.0, 1.5])),
        )
        self.answer = alone(
            self.prompt, self.params, completion_index=self.index, vocab_size=VOCAB, eos_ids=(EOS,), max_len=MAX_LEN
        )
        self.is_paced = draw(st.booleans())
        # What was generated elsewhere, before this engine saw it; the end is not.
        self.done = draw(st.integers(0, len(self.answer) - 1)) if self.is_paced else 0
        self.granted = 0
        self.tokens = self.answer[: self.done]
        self.finish: Finish | None = None
        self.is_aborted = False

    def request(self) -> Request:
        if not self.is_paced:  # index 0 is all that a request of one completion can have
            return Request(prompt=self.prompt, params=self.params)
        return PacedRequest(
            prompt=[*self.prompt, *self.answer[: self.done]],
            params=self.params,
            num_prompt=len(self.prompt),
            completion_index=self.index,
            eos_ids=(EOS,),
        )


def take(engine: Engine, cases: dict[int, Case]) -> None:
    """One step, everything accounted for after it."""
    for delta in engine.step():
        case = cases[delta.request_id]
        assert case.finish is None, "something came after the end"
        case.tokens += delta.token_ids
        case.finish = delta.finish
        if case.is_paced:
            assert len(case.tokens) <= max(case.granted, case.done), "it went further than was granted"
        assert case.tokens == case.answer[: len(case.tokens)]
    engine.scheduler.check()


def settle(engine: Engine, cases: dict[int, Case]) -> None:
    for _ in range(1500):
        if not engine.has_work:
            return
        take(engine, cases)
    raise AssertionError("no end in sight: somebody is blocked")


@given(st.data())
def test_any_pace_gives_the_tokens_of_an_undisturbed_answer_and_delays_nobody_for_ever(data: st.DataObject) -> None:
    draw = data.draw
    block_size, max_num_seqs = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 4))
    runner = ChainRunner(
        VOCAB,
        max_model_len=MAX_LEN,
        max_num_seqs=max_num_seqs,
        block_size=block_size,
        num_blocks=-(-MAX_LEN // block_size) + draw(st.integers(0, 6)),  # any one fits, hardly two
        layout=draw(st.sampled_from(["paged", "paged", "lanes"])),
    )
    engine = Engine(
        runner,
        Digits(),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=draw(st.sampled_from([max_num_seqs, 8, 64])),
        prefix_caching=draw(st.booleans()),
    )
    cases: dict[int, Case] = {}
    todo = [Case(draw) for _ in range(draw(st.integers(1, 6)))]
    for case in todo:
        if not case.is_paced:
            case.index = 0
            case.answer = alone(case.prompt, case.params, vocab_size=VOCAB, eos_ids=(EOS,), max_len=MAX_LEN)

    # 1. Requests, grants, aborts and steps in any order.
    for _ in range(draw(st.integers(5, 60))):
        what = draw(st.sampled_from(["add", "grant", "grant", "step", "step", "abort"]))
        paced = [i for i, c in cases.items() if c.is_paced]
        if what == "add" and todo:
            case = todo.pop()
            cases[engine.add(case.request()).request_id] = case
        elif what == "grant" and paced:
            number = draw(st.sampled_from(paced))
            case = cases[number]
            case.granted = max(case.granted, len(case.tokens) + draw(st.integers(0, 3)))
            engine.grant(number, case.granted)
        elif what == "abort" and cases and draw(st.integers(0, 4)) == 0:
            number = draw(st.sampled_from(list(cases)))
            cases[number].is_aborted = True
            engine.abort(number)
        else:
            take(engine, cases)
        engine.scheduler.check()

    # 2. Without another grant: everybody else ends, and a paced one has exactly what was granted.
    settle(engine, cases)
    for case in cases.values():
        if case.is_aborted:
            continue
        if case.is_paced:
            assert case.tokens == case.answer[: max(case.granted, case.done)]
        else:
            assert case.finish is not None, "it waits behind one that rests"
        assert (case.finish is not None) == (case.tokens == case.answer)

    # 3. With all that they may want, the paced ones end too.
    for number, case in cases.items():
        case.granted = len(case.answer)
        engine.grant(number, case.granted) if case.is_paced else None
    settle(engine, cases)
    assert all(c.tokens == c.answer or c.is_aborted for c in cases.values())
    assert engine.scheduler.manager is None or engine.scheduler.manager.num_used == 0, "blocks outlive their request"
    assert not engine.scheduler.resting
    engine.close()


# ------------------------------------------------------------------------------------- the details


def engine_of(max_num_seqs: int = 2, num_blocks: int = 64) -> tuple[Engine, ChainRunner]:
    runner = ChainRunner(VOCAB, max_model_len=128, max_num_seqs=max_num_seqs, block_size=4, num_blocks=num_blocks)
    return Engine(runner, Digits(), max_num_seqs=max_num_seqs, max_num_batched_tokens=64), runner


def paced(engine: Engine, prompt: list[int], max_tokens: int | None = None, **options: Any) -> Ticket:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return engine.add(PacedRequest(prompt=prompt, params=params, **{"num_prompt": len(prompt), **options}))


def test_without_a_grant_there_is_no_work_and_an_idle_engine_is_no_stalled_one() -> None:
    now = 0.0
    runner = ChainRunner(VOCAB)
    engine = Engine(runner, Digits(), clock=lambda: now, stall_seconds=10)
    ticket = paced(engine, [1, 2, 3])
    assert not engine.has_work
    assert engine.step() == []
    now = 100.0
    assert engine.health().is_ready, "nobody waits for it"
    engine.grant(ticket.request_id, 1)
    assert engine.has_work
    assert engine.health().is_ready, "the work has only just come"
    now = 111.0
    assert not engine.health().is_ready
    assert len(engine.step()) == 1
    assert not engine.has_work
    assert engine.health().is_ready


def test_one_that_rests_keeps_its_cache_while_nobody_wants_it() -> None:
    engine, runner = engine_of()
    ticket = paced(engine, [1, 2, 3, 4, 5])
    for count in range(1, 6):
        engine.grant(ticket.request_id, count)
        engine.step()
    assert runner.num_computed == 5 + 4, "the prompt once, then a token a step"
    assert ticket.sequences[0].num_preemptions == 0


def test_the_one_that_has_rested_longest_gives_way_first_and_goes_on_from_the_prefix_cache() -> None:
    engine, _ = engine_of(max_num_seqs=2)
    first, second = paced(engine, [1] * 9), paced(engine, [2] * 9)
    engine.grant(first.request_id, 1)
    engine.step()
    engine.grant(second.request_id, 1)
    engine.step()
    third = engine.add(Request(prompt=[3], params=SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)))
    engine.step()
    lanes = [t.sequences[0].lane for t in (first, second, third)]
    assert lanes[0] is None
    assert lanes[1] is not None
    assert lanes[2] is not None
    engine.grant(first.request_id, 2)
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    assert list(first.sequences[0].output_ids) == alone([1] * 9, params, vocab_size=VOCAB)
    assert first.sequences[0].num_preemptions == 1


def test_nothing_is_preempted_while_one_that_rests_holds_blocks() -> None:
    engine, _ = engine_of(max_num_seqs=3, num_blocks=8)
    rests = paced(engine, [1] * 12)
    engine.grant(rests.request_id, 1)
    engine.step()
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    busy = [engine.add(Request(prompt=[i] * 4, params=params)) for i in (2, 3)]
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    assert [t.sequences[0].num_preemptions for t in busy] == [0, 0]
    assert rests.sequences[0].num_preemptions == 1


def test_an_abort_while_it_rests_frees_everything_and_is_answered() -> None:
    engine, _ = engine_of()
    warm, cold = paced(engine, [1] * 6), paced(engine, [2] * 6)
    engine.grant(warm.request_id, 1)
    engine.step()
    for ticket in (warm, cold):
        engine.abort(ticket.request_id)
        assert [d.finish for d in engine.step()] == [Finish.ABORT]
    engine.grant(warm.request_id, 5)  # late, and of no use
    assert not engine.has_work
    manager = engine.scheduler.manager
    assert manager is not None
    assert manager.num_used == 0
    engine.scheduler.check()


def test_a_resumed_prompt_is_scored_by_whoever_saw_it_first() -> None:
    engine, _ = engine_of()
    params = SamplingParams(temperature=0, max_tokens=None, prompt_logprobs=0, ignore_eos=True)
    fresh = engine.add(PacedRequest(prompt=[1, 2, 3, 4], params=params, num_prompt=4))
    resumed = engine.add(PacedRequest(prompt=[1, 2, 3, 4], params=params, num_prompt=3))
    for ticket in (fresh, resumed):
        engine.grant(ticket.request_id, 2)
    while engine.has_work:
        engine.step()
    assert [lp.token_id for lp in fresh.sequences[0].prompt_logprobs] == [2, 3, 4]
    assert resumed.sequences[0].prompt_logprobs == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_prompt": 0}, "num_prompt must be between 1 and 3"),
        ({"num_prompt": 4}, "num_prompt must be between 1 and 3"),
        ({"num_prompt": 3, "completion_index": -1}, "completion_index"),
        ({"num_prompt": 3, "n": 2}, "one sequence of token ids"),
        ({"num_prompt": 3, "params": SamplingParams(stop="x")}, "without stop strings"),
        ({"num_prompt": 3, "prompt": "abc"}, "of token ids"),
    ],
)
def test_what_cannot_be_paced_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        PacedRequest(**{"prompt": [1, 2, 3], **options})
