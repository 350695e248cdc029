"""Completion mode under a real engine, over real sockets: a scripted server says the answers in the plain dialect."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_support import Answers, ByteTokenizer, ask, drive, greedy
from http_support import (
    Asked,
    Handler,
    ScriptedServer,
    Wire,
    completion_runner,
    nothing_left,
    unused_port,
    wait_until,
)
from nanovllm.aio import AsyncLLM
from nanovllm.batch import Batch, Sampling, ScheduledSeq, SeqOutput
from nanovllm.engine import Engine
from nanovllm.errors import EngineDead, RunnerDead
from nanovllm.request import Completion, Finish, Request, SamplingParams

Make = Callable[..., Engine]


@pytest.fixture
def engine_at() -> Iterator[Make]:
    """Makes engines in front of servers; at the end each is closed, and no thread is left of it."""
    with nothing_left():
        engines: list[Engine] = []

        def make(urls: str | list[str], **options: Any) -> Engine:
            tokenizer = options.setdefault("tokenizer", ByteTokenizer())
            engines.append(Engine(completion_runner(urls, **options), tokenizer))
            return engines[-1]

        yield make
        for engine in engines:
            engine.close()


def answering(*events: Any) -> Handler:
    return lambda asked, wire: wire.events(*events)


def one(engine: Engine, prompt: Any = "hi", params: SamplingParams | None = None) -> Completion:
    answers = Answers()
    ticket = ask(engine, prompt, params or greedy(64))
    drive(engine, answers)
    return answers.of(ticket)


def by_prompt(scripts: dict[str, Handler]) -> Handler:
    """Each prompt, in bytes that are its tokens, has a script of its own."""
    return lambda asked, wire: scripts[bytes(asked.json["prompt"]).decode()](asked, wire)


# ----------------------------------------------------------------------------------- what is handed back


def test_tokens_become_the_answer(engine_at: Make) -> None:
    events = [{"ids": list(b"He")}, {"ids": list(b"llo")}, {"finish": "stop"}, "[DONE]"]
    with ScriptedServer(answering(*events)) as server:
        done = one(engine_at(server.url))
        assert (done.text, done.token_ids, done.finish, done.error) == ("Hello", tuple(b"Hello"), Finish.STOP, None)
        assert server.asked[0].json["prompt"] == list(b"hi")


def test_text_of_the_server_goes_before_that_of_its_tokens(engine_at: Make) -> None:
    with ScriptedServer(answering({"ids": [72, 105], "text": "Grüezi"}, {"text": "!", "finish": "stop"})) as server:
        done = one(engine_at(server.url))
        assert (done.text, done.token_ids) == ("Grüezi!", (72, 105))


def test_a_text_and_tokens_without_text_never_share_an_output(engine_at: Make) -> None:
    events = [{"ids": [65]}, {"ids": [66], "text": "[B]"}, {"ids": [67]}, {"ids": [68]}, {"finish": "stop"}]
    with ScriptedServer(answering(*events)) as server:
        assert one(engine_at(server.url)).text == "A[B]CD"


def test_a_server_that_only_speaks_text_needs_no_tokenizer(engine_at: Make) -> None:
    with ScriptedServer(answering({"text": "Bern"}, {"text": "e"}, {"finish": "length"})) as server:
        engine = engine_at(server.url, tokenizer=None, about={"takes_ids": False, "vocab_size": None})
        assert engine.info.tokenizes
        done = one(engine, "The capital?")
        assert (done.text, done.token_ids, done.finish) == ("Berne", (), Finish.LENGTH)
        conversation = [{"role": "user", "content": "The capital?"}]
        one(engine, conversation)
        assert [a.json["prompt"] for a in server.asked] == ["The capital?", conversation]


def test_the_engine_still_decides_ends_by_itself(engine_at: Make) -> None:
    """A server that goes on after a stop string, a stop id or max_tokens is hung up on."""

    def babble(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        for byte in b"ab END and so on, for ever and ever":
            wire.event({"ids": [byte]})
        wire.wait_for_hang_up()

    with ScriptedServer(babble) as server:
        engine = engine_at(server.url)
        assert one(engine, params=greedy(64, stop="END")).text == "ab "
        assert one(engine, params=greedy(64, stop_token_ids=[ord("b")])).token_ids == tuple(b"ab")
        by_length = one(engine, params=greedy(5))
        assert (by_length.text, by_length.finish) == ("ab EN", Finish.LENGTH)
        server.wait_for(lambda s: s.num_open <= 1)  # one connection may go back to the pool


@pytest.mark.parametrize("end", ["length", "stop"])
def test_answers_that_the_server_ends_as_the_engine_does_share_one_connection(engine_at: Make, end: str) -> None:
    ids = [*range(65, 73), *([3] if end == "stop" else [])]
    with ScriptedServer(answering(*({"ids": [i]} for i in ids), {"finish": end}, "[DONE]")) as server:
        engine = engine_at(server.url, about={"eos_ids": (3,)})
        for _ in range(10):
            done = one(engine, params=SamplingParams(temperature=0, max_tokens=8 if end == "length" else 20))
            assert (done.token_ids, done.finish) == (tuple(ids), Finish(end))
            wait_until(lambda: not any(t.name.startswith("nanovllm-stream") for t in threading.enumerate()))
        assert server.num_connections == 1


def test_an_end_before_min_tokens_is_none(engine_at: Make) -> None:
    events = [{"ids": [3]}, {"ids": [65, 3]}, {"ids": [66, 3]}, {"ids": [67]}]
    with ScriptedServer(answering(*events)) as server:
        engine = engine_at(server.url, about={"eos_ids": (3,)})
        done = one(engine, params=SamplingParams(temperature=0, max_tokens=20, min_tokens=4))
        assert (done.token_ids, done.finish) == ((3, 65, 3, 66, 3), Finish.STOP)


def test_logprobs_come_through(engine_at: Make) -> None:
    events = [{"ids": [65, 66], "logprobs": [-0.5, -1.5]}, {"ids": [67], "logprobs": [0.0]}, {"finish": "stop"}]
    with ScriptedServer(answering(*events)) as server:
        done = one(engine_at(server.url), params=greedy(logprobs=1))
        assert done.logprobs is not None
        assert [(lp.token_id, lp.logprob) for lp in done.logprobs] == [(65, -0.5), (66, -1.5), (67, 0.0)]


def test_each_completion_has_a_stream_and_a_seed_of_its_own(engine_at: Make) -> None:
    def echo_seed(asked: Asked, wire: Wire) -> None:
        wire.events({"ids": [asked.json["seed"]]}, {"finish": "stop"})

    with ScriptedServer(echo_seed) as server:
        engine, answers = engine_at(server.url), Answers()
        ticket = ask(engine, "hi", SamplingParams(seed=40, ignore_eos=True), n=3)
        drive(engine, answers)
        assert [answers.ids(ticket, i) for i in range(3)] == [[40], [41], [42]]


@settings(max_examples=30)
@given(
    plans=st.lists(
        st.tuples(st.lists(st.lists(st.integers(0, 127), max_size=3), max_size=6), st.sampled_from(["stop", "length"])),
        min_size=1,
        max_size=6,
    ),
    data=st.data(),
)
def test_many_streams_at_once_never_mix(plans: list[tuple[list[list[int]], str]], data: st.DataObject) -> None:
    """Whatever the order in which the bytes of all streams come, each answer is what its own stream said."""
    cuts = [data.draw(st.integers(1, 40), label="bytes at a time") for _ in plans]

    def handler(asked: Asked, wire: Wire) -> None:
        index = asked.json["prompt"][0]
        pieces, finish = plans[index]
        wire.start_events()
        stream = b"".join(b"data: {%s}\n\n" % (b'"ids": ' + str(ids).encode()) for ids in pieces)
        stream += b'data: {"finish": "%s"}\r\n\r\n' % finish.encode()
        for i in range(0, len(stream), cuts[index]):
            wire.chunk(stream[i : i + cuts[index]])
        wire.end_events()

    with nothing_left(), ScriptedServer(handler) as server:
        engine, answers = Engine(completion_runner(server.url, tokenizer=ByteTokenizer()), ByteTokenizer()), Answers()
        tickets = [ask(engine, [i], greedy(64)) for i in range(len(plans))]
        drive(engine, answers)
        for ticket, (pieces, finish) in zip(tickets, plans, strict=True):
            assert answers.ids(ticket) == [token for ids in pieces for token in ids]
            assert answers.of(ticket).finish is Finish(finish)
        engine.close()


# ---------------------------------------------------------------------------------- faults of one sequence

FAULTS: dict[str, tuple[Handler, str]] = {
    "an id beyond the vocabulary": (answering({"ids": [256], "logprobs": [-1.0]}), "token id 256, outside its vocab"),
    "a negative id": (answering({"ids": [-1], "logprobs": [-1.0]}), "token id -1"),
    "a probability that is no number": (answering({"ids": [65], "logprobs": [float("nan")]}), "log-probability nan"),
    "a positive log-probability": (answering({"ids": [65], "logprobs": [2.0]}), "log-probability 2.0"),
    "too few probabilities": (answering({"ids": [65, 66], "logprobs": [-1.0]}), "1 log-probabilities for 2 tokens"),
    "too many probabilities": (answering({"ids": [65], "logprobs": [-1.0, -2.0]}), "2 log-probabilities for 1 tokens"),
    "no probabilities": (answering({"ids": [65]}), "0 log-probabilities for 1 tokens"),
    "its own error": (answering({"error": "out of slots"}), "out of slots"),
    "an event that is not JSON": (answering("{nonsense"), "an event that is not JSON"),
    "not a stream": (lambda asked, wire: wire.json({"ids": [65]}), "application/json, not with events"),
    "a refusal": (lambda asked, wire: wire.json({"error": "bad seed"}, 400), "status 400: bad seed"),
    "an end in the middle": (answering({"ids": [65], "logprobs": [-1.0]}), "ended its answer in the middle"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_ends_the_request_it_belongs_to_and_no_other(engine_at: Make, name: str) -> None:
    faulty, words = FAULTS[name]
    is_over = threading.Event()

    def good(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        wire.event({"ids": [71], "logprobs": [-1.0]})
        assert is_over.wait(10)
        wire.event({"ids": [72], "logprobs": [-1.0], "finish": "stop"})
        wire.end_events()

    with ScriptedServer(by_prompt({"good": good, "bad": faulty})) as server:
        engine, answers = engine_at(server.url, retries=0), Answers()
        fine, broken = (ask(engine, prompt, greedy(64, logprobs=0)) for prompt in ("good", "bad"))
        while not answers.has_ended(broken):
            answers.take(engine.step())
        is_over.set()
        drive(engine, answers)
        error = str(answers.of(broken).error)
        assert words in error
        assert error.startswith(server.url)  # one of several servers must be found
        assert answers.ids(fine) == [71, 72]
        assert one(engine, "good", greedy(64, logprobs=0)).error is None  # and the engine lives


def test_what_came_before_a_fault_is_kept(engine_at: Make) -> None:
    with ScriptedServer(answering({"ids": list(b"good")}, {"ids": [999]})) as server:
        done = one(engine_at(server.url))
        assert (done.text, done.finish) == ("good", Finish.ERROR)


def test_a_text_that_never_ends_is_cut_off(engine_at: Make) -> None:
    def babble(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        while True:
            wire.event({"text": "x"})

    with ScriptedServer(babble) as server:
        engine = engine_at(server.url, tokenizer=None, about={"takes_ids": False, "vocab_size": None})
        assert "more than the 8 tokens" in str(one(engine, params=greedy(8)).error)
        server.wait_for(lambda s: s.num_open == 0)


def test_a_dead_server_fails_its_requests_and_not_the_engine(engine_at: Make) -> None:
    port = unused_port()
    engine = engine_at(f"http://127.0.0.1:{port}", retries=1)
    for _ in range(4):  # more than the steps in a row that an engine survives
        assert "cannot be reached" in str(one(engine).error)
    assert engine.health().is_live
    with ScriptedServer(answering({"ids": [65], "finish": "stop"}), port=port):
        assert one(engine).token_ids == (65,)


def test_a_runner_that_is_dead_for_good_takes_the_engine_with_it(engine_at: Make, monkeypatch: Any) -> None:
    engine = engine_at("http://127.0.0.1:1")

    def dead(*args: object) -> None:
        raise RunnerDead("the server died 4 times")

    monkeypatch.setattr(engine.runner._servers, "acquire", dead)  # type: ignore[attr-defined]
    assert "died 4 times" in str(one(engine).error)
    with pytest.raises(EngineDead, match="died 4 times"):
        ask(engine, "hi")


# ---------------------------------------------------------------------------------------------- retries


def test_before_the_first_token_an_attempt_is_repeated(engine_at: Make) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        match len(server.asked):
            case 1:
                wire.reset()
            case 2:
                wire.json({"error": "loading"}, 503)
            case 3:
                wire.events({"ids": []})  # an end without a token
            case 4:
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Ty")  # which http.client takes for a whole head
                wire.close()
            case 5:
                wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: t")
                wire.close()
            case _:
                wire.events({"ids": [65], "finish": "stop"})

    with ScriptedServer(handler) as server:
        assert one(engine_at(server.url, retries=5)).token_ids == (65,)
        assert len(server.asked) == 6


@pytest.mark.parametrize("cut", ["reset", "close", "end_events"])
def test_after_a_token_nothing_is_repeated(engine_at: Make, cut: str) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        wire.event({"ids": [65]})
        wire.event({"ids": [66]})
        time.sleep(0.05)  # a reset may overtake what it follows
        getattr(wire, cut)()

    with ScriptedServer(handler) as server:
        done = one(engine_at(server.url, retries=5))
        assert (done.text, done.finish) == ("AB", Finish.ERROR)
        assert len(server.asked) == 1


def test_another_server_takes_what_the_first_one_has_not_begun(engine_at: Make) -> None:
    with (
        ScriptedServer(lambda asked, wire: wire.reset()) as broken,
        ScriptedServer(answering({"ids": [65], "finish": "stop"})) as good,
    ):
        engine = engine_at([broken.url, good.url], retries=1)
        for i in range(20):
            assert one(engine, [i]).token_ids == (65,)
        assert len(good.asked) == 20


# --------------------------------------------------------------------------------- waiting and ending


def silent(asked: Asked, wire: Wire) -> None:
    wire.start_events()
    wire.wait_for_hang_up()


def begun(asked: Asked, wire: Wire) -> None:
    wire.start_events()
    wire.event({"ids": [65]})
    wire.wait_for_hang_up()


def pinging(asked: Asked, wire: Wire) -> None:
    wire.start_events()
    while True:
        wire.chunk(b": ping\n\n")
        wire.event({"ids": []})
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("handler", "timeouts", "words"),
    [
        (silent, {"queue": 10}, "no token within 10 s (timeouts.queue)"),
        (pinging, {"queue": 10}, "no token within 10 s (timeouts.queue)"),
        (begun, {"read": 10}, "in the middle of its answer for 10 s (timeouts.read)"),
        (silent, {"total": 10}, "did not complete its answer within 10 s (timeouts.total)"),
        (begun, {"total": 10, "read": 30}, "did not complete its answer within 10 s (timeouts.total)"),
    ],
)
def test_each_timeout_ends_its_stream_by_the_engines_clock(
    engine_at: Make, handler: Handler, timeouts: dict[str, float], words: str
) -> None:
    now = 1000.0
    with ScriptedServer(handler) as server:
        engine, answers = engine_at(server.url, timeouts=timeouts, clock=lambda: now), Answers()
        ticket = ask(engine, "hi")
        server.wait_for(lambda s: _step(engine, answers) and len(s.asked) == 1)
        if handler is begun:
            wait_until(lambda: _step(engine, answers) and bool(answers.deltas))
        now += 9.9
        _step(engine, answers)
        assert not answers.has_ended(ticket)
        now += 0.1
        _step(engine, answers)
        assert words in str(answers.of(ticket).error)
        assert str(answers.of(ticket).error).startswith(server.url)
        server.wait_for(lambda s: s.num_open == 0)  # hung up on


def _step(engine: Engine, answers: Answers) -> bool:
    """One that does not wait."""
    engine.wake()
    answers.take(engine.step())
    return True


def test_execute_waits_for_the_first_event_or_for_wake(engine_at: Make) -> None:
    go = threading.Event()

    def handler(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        assert go.wait(10)
        wire.event({"ids": [65], "finish": "stop"})
        wire.end_events()

    with ScriptedServer(handler) as server:
        runner = completion_runner(server.url)
        batch = Batch((scheduled(1),))
        assert _timed(runner.execute, batch, after=runner.wake) == [SeqOutput()]
        assert _timed(runner.execute, batch, after=go.set) == [SeqOutput((65,), Finish.STOP)]
        runner.release(1, 0)
        runner.close()


def _timed(execute: Callable[[Batch], list[SeqOutput]], batch: Batch, after: Callable[[], None]) -> list[SeqOutput]:
    """What `execute` returns, which must not be before `after` was called, from another thread."""
    is_called = threading.Event()

    def call() -> None:
        time.sleep(0.05)
        is_called.set()
        after()

    thread = threading.Thread(target=call)
    thread.start()
    outputs = execute(batch)
    assert is_called.is_set(), "execute returned with nothing"
    thread.join()
    return outputs


def scheduled(seq_id: int) -> ScheduledSeq:
    context = np.array([104, 105], np.int32)
    sampling = Sampling(SamplingParams(), (), frozenset(), 0, 0, False)
    return ScheduledSeq(seq_id, 0, context, 2, 0, 2, 1, np.empty(0, np.int32), sampling, None)


def test_a_stream_that_waits_takes_no_processor_time(engine_at: Make) -> None:
    with ScriptedServer(silent) as server:
        engine = engine_at(server.url, max_num_seqs=16)
        for i in range(16):
            ask(engine, [i])
        thread = threading.Thread(target=lambda: [engine.step() for _ in range(20)], daemon=True)
        thread.start()
        server.wait_for(lambda s: len(s.asked) == 16)
        time.sleep(0.05)
        for _ in range(40):  # each of the steps before woke at most once for an add
            steps = engine.stats().num_steps
            time.sleep(0.005)
            if engine.stats().num_steps == steps:
                break
        before, steps = time.process_time(), engine.stats().num_steps
        time.sleep(0.3)
        assert engine.stats().num_steps == steps  # it sleeps in one and the same step
        assert time.process_time() - before < 0.15  # of 0.3 s; a loop that spins takes all of it
        while thread.is_alive():
            engine.wake()
            thread.join(0.001)


@pytest.mark.parametrize("handler", [silent, begun, lambda asked, wire: wire.wait_for_hang_up()])
def test_abort_hangs_up(engine_at: Make, handler: Handler) -> None:
    with ScriptedServer(handler) as server:
        engine, answers = engine_at(server.url), Answers()
        ticket = ask(engine, "hi")
        server.wait_for(lambda s: _step(engine, answers) and len(s.asked) == 1)
        engine.abort(ticket.request_id)
        answers.take(engine.take_deltas())
        assert answers.of(ticket).finish is Finish.ABORT
        server.wait_for(lambda s: s.num_open == 0)


def test_close_hangs_up_on_all_and_leaves_no_thread() -> None:
    with nothing_left(), ScriptedServer(silent) as server:
        engine = Engine(completion_runner(server.url), ByteTokenizer())
        for i in range(8):
            ask(engine, [i])
        server.wait_for(lambda s: _step(engine, Answers()) and len(s.asked) == 8)
        engine.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("nanovllm-stream")]
        server.wait_for(lambda s: s.num_open == 0)


def test_a_consumer_that_leaves_ends_its_stream_and_a_later_one_is_served() -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        if asked.json["prompt"] == [1]:
            return begun(asked, wire)
        return wire.events({"ids": [66], "finish": "stop"})

    async def run(url: str) -> tuple[int, ...]:
        async with AsyncLLM.from_components(completion_runner(url), ByteTokenizer()) as llm:
            stream = llm.stream(Request(prompt=[1]))
            assert (await anext(stream)).token_ids == (65,)
            await stream.aclose()
            await asyncio.to_thread(server.wait_for, lambda s: s.num_open == 0)
            return (await llm.generate(Request(prompt=[2]))).completions[0].token_ids

    with nothing_left(), ScriptedServer(handler) as server:
        assert asyncio.run(run(server.url)) == (66,)
