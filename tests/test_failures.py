"""Failures, at every place and every time: who ends, who does not notice, and that nothing is lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from engine_support import (
    Answers,
    RemoteRunner,
    SpyRunner,
    ask,
    assert_idle,
    drive,
    greedy,
    make_engine,
)
from nanovllm.batch import Batch, Packed, Sampled, SeqOutput
from nanovllm.builtin.mock import MockRunner, Script, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import MAX_FAILED_STEPS, Engine
from nanovllm.errors import EngineClosed, EngineDead, RunnerDead, RunnerError
from nanovllm.request import Finish, SamplingParams
from nanovllm.sampler import NumpySampler

PROMPT = list(range(10, 30))
OTHERS = [PROMPT[:3], PROMPT[5:], [40] * 17]
POISON = 99  # the token that makes the mock runner return NaN


class FailingSampler(NumpySampler):
    """Raises in the given calls, or for the rows of sequences whose prompt begins with a token."""

    def __init__(self, calls: tuple[int, ...] = (), first_token: int | None = None) -> None:
        self.calls, self.first_token, self.num_calls = calls, first_token, 0

    def sample(self, logits: Any, rows: Any) -> Sampled:
        self.num_calls += 1
        if self.num_calls in self.calls or any(row.context[0] == self.first_token for row in rows):
            raise ZeroDivisionError("the sampler is broken")
        return super().sample(logits, rows)


class FailingTokenizer(SimpleBPETokenizer):
    """Raises in the given calls of token_bytes, or for one token."""

    def __init__(self, calls: tuple[int, ...] = (), token: int | None = None) -> None:
        super().__init__()
        self.calls, self.token, self.num_calls = calls, token, 0

    def token_bytes(self, token_id: int) -> bytes:
        self.num_calls += 1
        if self.num_calls in self.calls or token_id == self.token:
            raise LookupError("the tokenizer is broken")
        return super().token_bytes(token_id)


class Observer:
    """Counts what it sees, and raises in the n-th call."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at, self.seen = fails_at, []

    def _see(self, hook: str) -> None:
        self.seen.append(hook)
        if len(self.seen) == self.fails_at:
            raise RuntimeError("the observer is broken")

    def on_request(self, event: object) -> None:
        self._see("request")

    def on_step(self, stats: object) -> None:
        self._see("step")

    def on_output(self, output: object) -> None:
        self._see("output")


# ------------------------------------------------------------------------------- one sequence fails


@pytest.mark.parametrize("layout", ["paged", "lanes"])
def test_nan_ends_only_its_own_sequence(layout: str) -> None:
    engine = make_engine(MockRunner(layout=layout, script=Script(nan_token=POISON)))
    bad = ask(engine, [*PROMPT, POISON])
    good = [ask(engine, p) for p in OTHERS]
    answers = drive(engine)
    assert answers.of(bad).finish is Finish.ERROR
    assert "NaN" in (answers.of(bad).error or "")
    assert [answers.ids(t) for t in good] == [expected(p, 8) for p in OTHERS]


def test_nan_in_a_freed_block_reaches_nobody() -> None:
    """A pool of a few blocks, so that every later request is computed in blocks that held NaN."""
    engine = make_engine(MockRunner(block_size=4, num_blocks=8, script=Script(nan_token=POISON)))
    for _ in range(3):
        bad = ask(engine, [POISON] * 30)
        assert drive(engine).of(bad).finish is Finish.ERROR
        good = [ask(engine, p) for p in OTHERS]
        answers = drive(engine)
        assert [answers.ids(t) for t in good] == [expected(p, 8) for p in OTHERS]


def test_the_blocks_of_a_failed_sequence_are_shared_with_nobody() -> None:
    prompt = PROMPT[:16]
    engine = make_engine(MockRunner(block_size=4, script=Script(nan_steps=[1])))
    bad = ask(engine, prompt)
    assert drive(engine).of(bad).finish is Finish.ERROR
    again = ask(engine, prompt)
    answers = drive(engine)
    assert answers.of(again).stats.num_cached_tokens == 0
    assert answers.ids(again) == expected(prompt, 8)


def test_the_blocks_of_a_failed_step_are_shared_with_nobody() -> None:
    prompt = PROMPT[:16]
    engine = make_engine(MockRunner(block_size=4, script=Script(fail_steps=[3])))
    bad = ask(engine, prompt)
    assert len(drive(engine).of(bad).token_ids) == 2, "its blocks were sealed before it failed"
    again = ask(engine, prompt)
    answers = drive(engine)
    assert answers.of(again).stats.num_cached_tokens == 0
    assert answers.ids(again) == expected(prompt, 8)


def test_a_sampler_that_raises_for_one_row_ends_that_sequence(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(sampler=FailingSampler(first_token=77))
    bad = ask(engine, [77, 5], SamplingParams(temperature=1.0, logprobs=2))
    good = [ask(engine, p, greedy(logprobs=1)) for p in OTHERS]
    answers = drive(engine)
    assert "ZeroDivisionError: the sampler is broken" in (answers.of(bad).error or "")
    assert [answers.ids(t) for t in good] == [expected(p, 8) for p in OTHERS]
    assert all(len(answers.of(t).logprobs or ()) == 8 for t in good)
    assert engine.health().is_ready


def test_a_tokenizer_that_raises_ends_that_sequence() -> None:
    victim = expected(PROMPT, 3)[-1]
    engine = make_engine(tokenizer=FailingTokenizer(token=victim))
    bad = ask(engine, PROMPT)
    good = ask(engine, [4], greedy(2))
    assert victim not in expected([4], 2)
    answers = drive(engine)
    assert "LookupError: the tokenizer is broken" in (answers.of(bad).error or "")
    assert answers.ids(good) == expected([4], 2)


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, "7", None], ids=["too large", "too small", "a text", "nothing"])
def test_a_token_that_is_none_ends_that_sequence(token: Any) -> None:
    engine = make_engine(RemoteRunner([SeqOutput((token,))], [SeqOutput((5,)), SeqOutput((6,), Finish.STOP)]))
    bad, good = ask(engine, PROMPT), ask(engine, PROMPT)
    answers = drive(engine)
    assert answers.of(bad).finish is Finish.ERROR
    assert answers.ids(good) == [5, 6]


def test_a_remote_error_ends_that_sequence() -> None:
    outputs = [SeqOutput((5,)), SeqOutput(error="gone")], [SeqOutput((5,), Finish.STOP)], [SeqOutput((), Finish.ERROR)]
    engine = make_engine(RemoteRunner(*outputs))
    bad, good, silent = (ask(engine, PROMPT) for _ in range(3))
    answers = drive(engine)
    assert (answers.of(bad).error, answers.of(bad).token_ids) == ("gone", (5,))
    assert "without a reason" in (answers.of(silent).error or "")
    assert answers.ids(good) == [5]


# ------------------------------------------------------------------------------------ a step fails


def broken_execute(runner: MockRunner, how: str) -> None:
    """Have the second step of this runner fail in a way that no script has."""
    execute, steps = runner.execute, []

    def once(batch: Batch) -> list[SeqOutput]:
        steps.append(batch)
        outputs = execute(batch)
        if len(steps) != 2:
            return outputs
        if how == "raises":
            raise OSError("the device is on fire\nsecond line")
        return {"one output too many": [*outputs, SeqOutput()], "no outputs": []}[how]

    runner.execute = once  # type: ignore[method-assign]


@pytest.mark.parametrize("how", ["raises", "one output too many", "no outputs"])
def test_a_step_that_fails_ends_its_sequences_and_no_other(how: str) -> None:
    runner = MockRunner(block_size=4)
    broken_execute(runner, how)
    engine = make_engine(runner, max_num_seqs=2)
    hit = [ask(engine, p) for p in OTHERS[:2]]
    waits = ask(engine, OTHERS[2])
    answers = drive(engine)
    for ticket in hit:
        assert answers.of(ticket).finish is Finish.ERROR
        assert "\n" not in (answers.of(ticket).error or "")
    if how == "raises":
        assert answers.of(hit[0]).error == "the runner failed: OSError: the device is on fire"
    assert answers.ids(waits) == expected(OTHERS[2], 8)
    assert engine.health().is_ready
    again = [ask(engine, p) for p in OTHERS]
    answers = drive(engine)
    assert [answers.ids(t) for t in again] == [expected(p, 8) for p in OTHERS]
    assert engine.stats().num_failed_steps == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda logits: logits[:-1], "logits of shape (2, 125) where 3 rows of 125 were asked for"),
        (lambda logits: logits[:, 1:], "logits of shape (3, 124) where 3 rows of 125 were asked for"),
        (lambda logits: logits[0], "logits of shape (125,) where 3 rows of 125 were asked for"),
        (lambda logits: logits[None], "logits of shape (1, 3, 125) where 3 rows of 125 were asked for"),
        (lambda logits: logits.astype(np.int32), "logits of type int32, which is not a floating-point type"),
        (lambda logits: logits.tolist(), "returned a list, not an array of logits"),
        (lambda logits: None, "returned a NoneType, not an array of logits"),
    ],
)
def test_what_are_no_logits_of_the_step_fail_it_with_the_numbers(change: Callable[[Any], Any], says: str) -> None:
    class Changed(MockRunner):
        is_right = False

        def forward(self, packed: Packed) -> Any:
            logits = super().forward(packed)
            return logits if self.is_right else change(logits)

    runner = Changed()
    engine = make_engine(runner)
    tickets = [ask(engine, p) for p in OTHERS]
    answers = drive(engine)
    assert all((answers.of(t).error or "").endswith(says) for t in tickets)
    runner.is_right = True
    again = ask(engine, PROMPT)
    assert drive(engine).ids(again) == expected(PROMPT, 8)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_logits_of_any_floating_point_type_are_taken(dtype: Any) -> None:
    class Other(MockRunner):
        def forward(self, packed: Packed) -> Any:
            return super().forward(packed).astype(dtype)

    engine = make_engine(Other())
    ticket = ask(engine, PROMPT)
    done = drive(engine).of(ticket)
    assert (done.error, len(done.token_ids)) == (None, 8)


def test_failures_in_a_row_kill_the_engine_and_others_do_not() -> None:
    engine = make_engine(MockRunner(script=Script(fail_steps=[1, 2, 4, 5, 6])), max_num_seqs=1)
    tickets = [ask(engine, PROMPT, greedy(1)) for _ in range(8)]
    answers = drive(engine)
    ends = [answers.of(t) for t in tickets]
    assert [done.finish is Finish.ERROR for done in ends] == [True, True, False, True, True, True, True, True]
    assert MAX_FAILED_STEPS == 3
    assert "3 steps failed in a row" in (ends[-1].error or "")
    health = engine.health()
    assert not health.is_live
    assert not health.is_ready
    assert "the script fails step 6" in (health.reason or "")
    with pytest.raises(EngineDead, match="restart it"):
        ask(engine, PROMPT)
    assert engine.step() == []


def test_a_dead_runner_kills_the_engine_at_once() -> None:
    engine = make_engine(MockRunner(script=Script(dead_step=2)), max_num_seqs=1)
    runs, waits = ask(engine, PROMPT), ask(engine, PROMPT)
    answers = drive(engine)
    assert {answers.of(t).finish for t in (runs, waits)} == {Finish.ERROR}
    assert "the runner died" in (answers.of(waits).error or "")
    assert "the runner died" in (engine.health().reason or "")
    engine.close()
    with pytest.raises(EngineClosed):
        ask(engine, PROMPT)


# --------------------------------------------------------------------- bystanders: observers, release


def test_an_observer_that_raises_is_detached_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    broken, fine = Observer(fails_at=2), Observer()
    engine = make_engine(observers=[broken, fine])
    ticket = ask(engine, PROMPT)
    assert drive(engine).ids(ticket) == expected(PROMPT, 8)
    assert broken.seen == ["request", "step"]
    assert fine.seen == ["request", *["step"] * 7, "output", "step"]
    assert [r.getMessage().count("is detached") for r in caplog.records] == [1]


def test_a_release_and_a_wake_that_raise_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Clumsy(MockRunner):
        def release(self, seq_id: int, lane: int) -> None:
            raise RuntimeError("cannot let go")

        def wake(self) -> None:
            raise RuntimeError("cannot wake")

    engine = make_engine(Clumsy())
    ticket, gone = ask(engine, PROMPT), ask(engine, PROMPT)
    answers = Answers()
    answers.take(engine.step())
    engine.abort(gone.request_id)
    assert drive(engine, answers).ids(ticket) == expected(PROMPT, 8)
    assert {r.levelno for r in caplog.records} == {logging.ERROR}
    assert "lane 1" in caplog.text


def test_an_observer_may_abort_from_inside_a_step() -> None:
    class Impatient:
        def on_step(self, stats: Any) -> None:
            if stats.step == 3:
                engine.abort(slow.request_id)
                engine.abort(12345)

    engine = make_engine(observers=[Impatient()])
    slow, other = ask(engine, PROMPT, greedy(50)), ask(engine, PROMPT)
    answers = drive(engine)
    assert (answers.of(slow).finish, len(answers.of(slow).token_ids)) == (Finish.ABORT, 3)
    assert answers.ids(other) == expected(PROMPT, 8)


# ------------------------------------------------------------------------------- the n-th call fails


class FailingRunner(SpyRunner):
    """Raises in the n-th call of execute or release."""

    def __init__(self, execute_at: int | None, release_at: int | None) -> None:
        super().__init__(block_size=4, num_blocks=16)
        self.execute_at, self.release_at = execute_at, release_at

    def execute(self, batch: Batch) -> list[SeqOutput]:
        outputs = super().execute(batch)
        if len(self.steps) == self.execute_at:
            raise RuntimeError("the n-th step")
        return outputs

    def release(self, seq_id: int, lane: int) -> None:
        super().release(seq_id, lane)
        if len(self.released) == self.release_at:
            raise RuntimeError("the n-th release")


def program(place: str, n: int | None) -> tuple[int, Answers, list[tuple[Any, list[int]]]]:
    """A run with chunks, prefix hits, siblings, preemptions, samples and an abort; the n-th call at `place` fails.

    Returns how many calls there were, and what became of (ticket, wanted tokens).
    """
    at = {name: n if name == place else None for name in ("execute", "release", "sample", "token_bytes", "observer")}
    runner = FailingRunner(at["execute"], at["release"])
    sampler = FailingSampler(calls=() if at["sample"] is None else (at["sample"],))
    tokenizer = FailingTokenizer(calls=() if at["token_bytes"] is None else (at["token_bytes"],))
    observer = Observer(at["observer"])
    engine = Engine(runner, tokenizer, sampler=sampler, observers=[observer], max_num_seqs=4, max_num_batched_tokens=16)
    answers, requests = Answers(), []
    for round_number in range(2):
        for prompt in ([9] * 30, [9] * 30, [9] * 25 + [8], PROMPT[:5]):
            requests.append((ask(engine, prompt, greedy(10)), expected(prompt, 10)))
        requests.append((ask(engine, PROMPT[:9], greedy(5), n=2), expected(PROMPT[:9], 5)))
        answers.take(engine.step())
        engine.scheduler.check()
        if round_number:
            gone = ask(engine, PROMPT, greedy(30))
            for _ in range(4):
                answers.take(engine.step())
            engine.abort(gone.request_id)
        drive(engine, answers)
    assert_idle(engine)
    assert answers.of(gone).finish in (Finish.ABORT, Finish.ERROR)
    assert engine.health().is_ready, "one failure is no reason to give up"
    assert engine.stats().num_preemptions > 0
    assert len(runner.released) == len(set(runner.released)) + engine.stats().num_preemptions
    num_calls = {
        "execute": len(runner.steps),
        "release": len(runner.released),
        "sample": sampler.num_calls,
        "token_bytes": tokenizer.num_calls,
        "observer": len(observer.seen),
    }
    return num_calls[place], answers, requests


# What one failure may cost: a step its sequences, a token its own sequence, the rest nobody anything.
MAX_HURT = {"execute": 4, "token_bytes": 1, "sample": 0, "release": 0, "observer": 0}


@pytest.mark.parametrize("place", MAX_HURT)
def test_whichever_call_fails_everybody_gets_an_answer(place: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "nanovllm")
    num_calls, answers, requests = program(place, None)
    assert num_calls > 10
    assert all(answers.ids(t, s.index) == want for t, want in requests for s in t.sequences)
    for n in range(1, num_calls + 1):
        _, answers, requests = program(place, n)
        hurt = 0
        for ticket, want in requests:
            assert answers.has_ended(ticket)
            for seq in ticket.sequences:
                done = answers.of(ticket, seq.index)
                if done.finish is Finish.ERROR:
                    hurt += 1
                else:
                    assert list(done.token_ids) == want
        assert hurt <= MAX_HURT[place], f"{hurt} sequences failed when call {n} did"


# --------------------------------------------------------------------------------------- interrupts


def interrupt_once(owner: Any, name: str, when: Callable[[], bool] = lambda: True) -> None:
    """Have the next call of `owner.name` raise KeyboardInterrupt, as Ctrl-C may anywhere."""
    real = getattr(owner, name)
    done = []

    def call(*args: Any, **options: Any) -> Any:
        if not done and when():
            done.append(1)
            raise KeyboardInterrupt
        return real(*args, **options)

    setattr(owner, name, call)


def test_an_interrupt_in_the_runner_undoes_the_step() -> None:
    runner = MockRunner(block_size=4)
    engine = make_engine(runner)
    tickets = [ask(engine, p) for p in OTHERS]
    answers = Answers()
    answers.take(engine.step())
    interrupt_once(runner, "forward")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    engine.scheduler.check()
    drive(engine, answers)
    assert [answers.ids(t) for t in tickets] == [expected(p, 8) for p in OTHERS]


PLACES = {
    "schedule": lambda e, t: (e.scheduler, "_choose"),
    "admit": lambda e, t: (e.scheduler, "_scheduled"),
    "grow": lambda e, t: (e.scheduler, "_grow"),
    "advance": lambda e, t: (e, "_accept"),
    "finish": lambda e, t: (e, "_finish"),
    "commit": lambda e, t: (e.scheduler, "commit"),
    "seal": lambda e, t: (e.scheduler, "_seal"),
    "remove": lambda e, t: (e.scheduler, "remove"),
    "count": lambda e, t: (e, "_count"),
    "clock": lambda e, t: (e, "_clock"),
    "tokenizer": lambda e, t: (t, "token_bytes"),
}


@pytest.mark.parametrize("num_steps", [0, 1, 3, 7])
@pytest.mark.parametrize("place", PLACES)
def test_an_interrupt_anywhere_leaves_an_engine_that_works(place: str, num_steps: int) -> None:
    tokenizer = SimpleBPETokenizer()
    runner = SpyRunner(block_size=4)
    engine = make_engine(runner, tokenizer, max_num_seqs=2)
    # Patch before the requests come: their streams hold the tokenizer's method.
    is_armed = []
    owner, name = PLACES[place](engine, tokenizer)
    interrupt_once(owner, name, lambda: bool(is_armed))
    tickets = [ask(engine, p) for p in OTHERS]
    answers = Answers()
    for _ in range(num_steps):
        answers.take(engine.step())
    is_armed.append(1)
    interrupts = 0
    for _ in range(200):
        if not engine.has_work:
            break
        try:
            answers.take(engine.step())
        except KeyboardInterrupt:
            interrupts += 1
            assert_idle(engine)  # what was live has failed, and nothing is held
    assert interrupts == 1
    assert_idle(engine)
    for ticket, prompt in zip(tickets, OTHERS, strict=True):
        done = answers.of(ticket)
        assert answers.has_ended(ticket)
        assert done.finish is Finish.ERROR or list(done.token_ids) == expected(prompt, 8)
    seen = {seq_id for step in runner.steps for seq_id in step}
    assert len(runner.released) == len(set(runner.released))
    assert set(runner.released) >= seen, "the runner was not told that a sequence has left"
    again = [ask(engine, p) for p in OTHERS]
    answers = drive(engine)
    assert [answers.ids(t) for t in again] == [expected(p, 8) for p in OTHERS]
    assert engine.health().is_ready


def test_an_interrupt_of_the_recovery_itself_is_recovered_from() -> None:
    engine = make_engine(MockRunner(block_size=4))
    tickets = [ask(engine, p) for p in OTHERS]
    engine.step()
    interrupt_once(engine.scheduler, "commit")
    interrupt_once(engine, "_end_all")
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    answers = drive(engine)
    assert all(answers.of(t).finish is Finish.ERROR for t in tickets)
    again = ask(engine, PROMPT)
    assert drive(engine).ids(again) == expected(PROMPT, 8)


# --------------------------------------------------------------------------------------------- hangs


def test_a_hang_is_reported_as_not_ready() -> None:
    now = [100.0]
    runner = MockRunner(script=Script(hang_step=2))
    engine = make_engine(runner, stall_seconds=30.0, clock=lambda: now[0])
    now[0] = 1000.0
    assert engine.health().is_ready, "no work, no stall"
    ticket = ask(engine, PROMPT)
    answers = Answers()
    answers.take(engine.step())
    thread = threading.Thread(target=lambda: answers.take(engine.step()), daemon=True)
    thread.start()
    now[0] += 29
    assert engine.health().is_ready
    assert engine.health().seconds_without_progress == 29
    now[0] += 2
    health = engine.health()
    assert (health.is_live, health.is_ready, health.num_running) == (True, False, 1)
    assert "31 s" in (health.reason or "")
    runner.close()  # ends the hang
    thread.join(10)
    assert not thread.is_alive()
    assert engine.health().is_ready
    engine.abort(ticket.request_id)
    drive(engine, answers)


def test_an_idle_engine_with_an_old_step_is_ready_when_work_comes() -> None:
    now = [0.0]
    engine = make_engine(stall_seconds=30.0, clock=lambda: now[0])
    ask(engine, PROMPT)
    drive(engine)
    now[0] += 1000
    ask(engine, PROMPT)
    assert engine.health().seconds_without_progress == 0
    assert engine.health().is_ready


def test_close_ends_what_lives_even_if_the_runner_cannot() -> None:
    class Stuck(MockRunner):
        def close(self) -> None:
            raise RuntimeError("cannot close")

    engine = make_engine(Stuck())
    ticket = ask(engine, PROMPT)
    answers = Answers()
    answers.take(engine.step())
    with pytest.raises(RunnerError, match="the runner failed to close: RuntimeError: cannot close"):
        engine.close()
    answers.take(engine.take_deltas())
    assert answers.of(ticket).finish is Finish.ABORT
    engine.close()
    with pytest.raises(EngineClosed):
        engine.step()


def test_close_closes_the_runner_even_if_it_is_interrupted() -> None:
    runner = SpyRunner()
    engine = make_engine(runner)
    ask(engine, PROMPT)
    engine.step()
    interrupt_once(engine.scheduler, "remove")
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert runner.num_closed == 1
    engine.close()
    assert runner.num_closed == 1


def test_errors_of_ours_are_runner_errors_with_their_own_text() -> None:
    class Dying(MockRunner):
        def execute(self, batch: Batch) -> list[SeqOutput]:
            raise RunnerDead("the GPU fell off the bus")

    engine = make_engine(Dying())
    ticket = ask(engine, PROMPT)
    assert drive(engine).of(ticket).error == "the runner failed: the GPU fell off the bus"
    assert not np.isnan(engine.stats().num_failed_steps)
