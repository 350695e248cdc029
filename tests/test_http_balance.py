"""Several servers of one model: who gets the next stream, who is left out, and what is lost when one dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine_support import Answers, ask, drive, greedy
from faulty_server import NUM_TOKENS, VICTIM, FaultyModel, LlamaWords, OpenAIWords, engine_on
from http_support import Asked, ScriptedServer, Wire, nothing_left
from nanovllm.builtin.mock import expected
from nanovllm.errors import ConfigError
from nanovllm_runner_http.backoff import Backoff
from nanovllm_runner_http.dialects import Dialect, Facts
from nanovllm_runner_http.errors import UpstreamError
from nanovllm_runner_http.options import HttpOptions
from nanovllm_runner_http.servers import BACKOFFS, Servers
from nanovllm_runner_http.transport import Transport

PROGRAM = Path(__file__).with_name("faulty_server.py")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Farm:
    """Servers that answer /health, or do not; and what `Servers` makes of them, by a clock of our own."""

    def __init__(self, num: int) -> None:
        self.is_up = [True] * num
        self.num_asked = [0] * num
        self.clock = Clock()
        self.scripted = [ScriptedServer(self._handler(i)) for i in range(num)]
        self.facts = [
            Facts(dialect="llamacpp", vocab_size=125, eos_ids=(2,), max_model_len=100 + i) for i in range(num)
        ]
        options = HttpOptions(servers=tuple(s.url for s in self.scripted), retries=0)
        self.transports = [Transport(s.url, options) for s in self.scripted]
        self.servers = Servers(self.transports, clock=self.clock)

    def _handler(self, i: int) -> Callable[[Asked, Wire], None]:
        def handler(asked: Asked, wire: Wire) -> None:
            self.num_asked[i] += 1
            wire.json({}, 200 if self.is_up[i] else 503)

        return handler

    def ask(self, transport: Transport, patience: float = 0.0) -> tuple[Dialect, Facts]:
        i = self.transports.index(transport)
        if not self.is_up[i]:
            raise UpstreamError(f"{transport.url} is down", can_retry=True)
        return None, self.facts[i]  # type: ignore[return-value]

    def take(self, num: int, head: bytes = b"", tried: Sequence[int] = ()) -> list[int]:
        """Acquire so many times; which servers came."""
        skipped = [self.transports[i] for i in tried]
        return [self.transports.index(self.servers.acquire(skipped, head)) for _ in range(num)]

    def give(self, i: int, failure: UpstreamError | None = None) -> None:
        self.servers.release(self.transports[i], failure)


BROKEN = UpstreamError("it broke off", can_retry=True)


@pytest.fixture
def farm() -> Iterator[Callable[[int], Farm]]:
    made: list[Farm] = []

    def make(num: int) -> Farm:
        made.append(Farm(num))
        return made[-1]

    with nothing_left():
        yield make
        for one in made:
            one.servers.close()
            for server in one.scripted:
                server.close()


# ------------------------------------------------------------------------------------------- who is next


def test_the_one_with_the_fewest_streams_is_next(farm: Callable[[int], Farm]) -> None:
    f = farm(3)
    came = f.take(9)
    assert sorted(came) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(set(came[i : i + 3]) == {0, 1, 2} for i in (0, 3, 6)), "never two ahead of another"
    f.give(1)
    f.give(1)
    assert f.take(2) == [1, 1]


def test_prompts_that_begin_alike_go_to_the_same_server(farm: Callable[[int], Farm]) -> None:
    f = farm(3)
    home = {}
    for head in range(60):
        (home[head],) = f.take(1, bytes([head]))
        f.give(home[head])
    assert min(list(home.values()).count(i) for i in range(3)) > 5, "all to one"
    for head in reversed(range(60)):
        assert f.take(1, bytes([head])) == [home[head]]
        f.give(home[head])
    (first,) = f.take(1, b"\0")
    assert f.take(1, b"\0") != [first], "but never at the price of a queue"


def test_a_retry_goes_elsewhere_if_there_is_an_elsewhere(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    assert f.take(3, tried=[0]) == [1, 1, 1]
    assert f.take(3, tried=[0, 1]) == [0, 0, 0], "all were tried: then as always"


# ------------------------------------------------------------------------------------- out and back again


def test_one_that_breaks_gets_nothing_until_it_answers_again(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    f.servers.agree(f.ask)
    first, longest = BACKOFFS
    pause, now = first, 0.0
    f.is_up[0] = False
    f.take(2)
    f.give(0, BROKEN)
    while pause < longest:
        f.clock.now = now + pause * 0.99
        assert f.take(3) == [1, 1, 1]
        assert f.num_asked[0] == 0, "it was asked before its time"
        now = f.clock.now = now + pause
        assert f.take(1) == [1]
        assert f.num_asked[0] == 1, "it was not asked in time"
        f.num_asked[0] = 0
        pause = min(2 * pause, longest)
    f.is_up[0] = True
    f.clock.now = now + longest
    assert f.take(1) == [0], "it is back, and has the fewest streams"


@pytest.mark.parametrize(
    ("failure", "is_out"),
    [
        (UpstreamError("reset", can_retry=True), True),
        (UpstreamError("busy", can_retry=True, status=429), True),
        (UpstreamError("loading", can_retry=True, status=503), True),
        (UpstreamError("boom", can_retry=True, status=500), False),
        (UpstreamError("no such field", status=400), False),
        (UpstreamError("no JSON"), False),
        (None, False),
    ],
    ids=["reset", "429", "503", "500", "400", "garbage", "well"],
)
def test_only_what_says_something_about_the_server_counts(
    farm: Callable[[int], Farm], failure: UpstreamError | None, is_out: bool
) -> None:
    f = farm(2)
    f.take(2)
    f.give(0, failure)
    assert f.take(1) == ([1] if is_out else [0])


def test_retry_after_is_the_least_that_it_is_left_alone(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    f.take(2)
    f.give(0, UpstreamError("busy", can_retry=True, status=429, retry_after=20.0))
    f.clock.now = 19.9
    assert f.take(1) == [1]
    f.clock.now = 20.0
    assert f.take(1) == [0]


def test_many_streams_that_break_together_are_one_failure(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    f.take(20)
    for _ in range(10):
        f.give(0, BROKEN)
    f.clock.now = BACKOFFS[0]
    assert f.take(1) == [0]


def test_with_one_server_there_is_nothing_to_choose(farm: Callable[[int], Farm]) -> None:
    f = farm(1)
    f.take(1)
    f.give(0, BROKEN)
    assert f.take(1) == [0]
    assert f.num_asked == [0], "its next stream will tell"


def test_when_all_are_out_they_are_asked_at_once(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    f.take(2)
    f.is_up = [False, False]
    for i in (0, 1):
        f.give(i, BROKEN)
    with pytest.raises(UpstreamError, match=r"none of the 2 servers can be reached: .*; .*") as caught:
        f.take(1)
    assert caught.value.can_retry, "the next attempt may find one"
    f.is_up = [False, True]
    assert f.take(1) == [1]


def test_threads_that_find_all_out_wait_for_the_one_who_asks(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    f.take(2)
    for i in (0, 1):
        f.give(i, BROKEN)
    came: list[int] = []
    threads = [threading.Thread(target=lambda: came.extend(f.take(1))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(came) == 16
    assert f.num_asked == [1, 1], "one question for all"


# ---------------------------------------------------------------------------------------- one model


def test_servers_that_agree_are_one(farm: Callable[[int], Farm]) -> None:
    f = farm(3)
    _, facts = f.servers.agree(f.ask)
    assert facts.max_model_len == 100, "what all of them can do"
    assert facts.vocab_size == 125


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": 999}, "vocab_size 125 against 999"),
        ({"max_model_len": 99}, "max_model_len 101 against 99"),
        ({"lacks": frozenset({"seed"})}, "it lacks seed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_one_that_comes_back_as_another_gets_nothing(
    farm: Callable[[int], Farm], change: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    f = farm(2)
    f.is_up[0] = False
    f.servers.agree(f.ask)
    assert f.take(2) == [1, 1]
    f.is_up[0], former = True, f.facts[0]
    f.facts[0] = replace(f.facts[1], **change)
    f.clock.now = BACKOFFS[0]
    assert f.take(2) == [1, 1]
    assert f"{f.transports[0].url} does not serve what the others do: {words}" in caplog.text
    f.facts[0] = replace(former, max_model_len=200)
    f.clock.now += 2 * BACKOFFS[0]
    assert f.take(1) == [0]


@pytest.mark.parametrize(
    "change", [{"vocab_size": 126}, {"dialect": "openai"}, {"eos_ids": (3,)}, {"takes_ids": False}]
)
def test_two_that_differ_are_named(farm: Callable[[int], Farm], change: dict[str, Any]) -> None:
    f = farm(3)
    f.facts[1] = Facts(**{"dialect": "llamacpp", "vocab_size": 125, "eos_ids": (2,), **change})
    with pytest.raises(ConfigError) as caught:
        f.servers.agree(f.ask)
    assert f"{f.transports[0].url} and {f.transports[1].url} do not serve the same: {next(iter(change))}" in str(
        caught.value
    )


def test_none_at_all_at_the_start(farm: Callable[[int], Farm]) -> None:
    f = farm(2)
    f.is_up = [False, False]
    with pytest.raises(UpstreamError, match="none of the 2 servers can be reached"):
        f.servers.agree(f.ask)


# ---------------------------------------------------------------------------------- with an engine


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "first", 0.001)


def prompt(i: int) -> list[int]:
    return [i, 8, 9]


def test_two_models_are_refused_at_the_start() -> None:
    with FaultyModel(LlamaWords()).serve() as a, FaultyModel(OpenAIWords()).serve() as b:
        with pytest.raises(ConfigError) as caught, engine_on(a.url, b.url, dialect="auto"):
            pass
        assert a.url in str(caught.value)
        assert b.url in str(caught.value)


def test_work_is_shared_and_a_broken_server_costs_nothing() -> None:
    """One of three resets every stream before its first token."""
    models = [FaultyModel(LlamaWords()) for _ in range(3)]
    with (
        models[0].serve() as a,
        models[1].serve() as b,
        models[2].serve() as c,
        engine_on(a.url, b.url, c.url, dialect="llamacpp", retries=2) as engine,
    ):
        for model in models:
            model.go_on.clear()
        tickets = [ask(engine, prompt(i), greedy(NUM_TOKENS)) for i in range(12)]
        answers = Answers()
        answers.take(engine.step())
        for server in (a, b, c):  # a question of the probe, and a third of the streams
            server.wait_for(lambda s: sum(r.path == "/completion" for r in s.asked) == 1 + 4)
        for model in models:
            model.go_on.set()
        drive(engine, answers)
        assert all(answers.ids(t) == expected(prompt(i), NUM_TOKENS) for i, t in enumerate(tickets))

        models[1].fault = lambda answer: answer.wire.reset()
        tickets = [ask(engine, [VICTIM, i, 9], greedy(NUM_TOKENS)) for i in range(12)]
        answers = drive(engine)
        assert all(answers.ids(t) == expected([VICTIM, i, 9], NUM_TOKENS) for i, t in enumerate(tickets))
        assert models[1].num_victims >= 1


def launched(*flags: str) -> tuple[subprocess.Popen[bytes], str]:
    """A llama-server of our model as a process of its own: only such a one can be killed."""
    process = subprocess.Popen([sys.executable, str(PROGRAM), *flags], stdout=subprocess.PIPE)
    assert process.stdout is not None
    return process, process.stdout.readline().decode().strip()


@pytest.mark.parametrize("mode", ["completion", "step"])
def test_one_of_three_is_killed_under_load(mode: str) -> None:
    """No request that had not begun is lost; one that had ends with a sentence, or, in step mode, goes on elsewhere."""
    three = [
        launched("--dialect", "llamacpp" if mode == "completion" else "nanovllm", "--pause", "0.01") for _ in range(3)
    ]
    try:
        urls = [url for _, url in three]
        with engine_on(*urls, mode=mode, retries=2) as engine:
            answers = Answers()
            num, tickets = 24, {}
            for i in range(num):
                tickets[i] = ask(engine, prompt(i), greedy(NUM_TOKENS))
            for _ in range(6):
                answers.take(engine.step())
            begun = {i for i, t in tickets.items() if (t.request_id, 0) in answers.deltas}
            for i in range(num, 2 * num):  # not one of these has a token when it happens
                tickets[i] = ask(engine, prompt(i), greedy(NUM_TOKENS))
            used = three if mode == "completion" else [three[urls.index(engine.runner._transport.url)]]  # type: ignore[attr-defined]
            os.kill(used[0][0].pid, signal.SIGKILL)
            drive(engine, answers)

            failed = set()
            for i, ticket in tickets.items():
                done = answers.of(ticket)
                assert list(done.token_ids) == expected(prompt(i), NUM_TOKENS)[: len(done.token_ids)]
                if done.error is not None:
                    failed.add(i)
                    assert used[0][1] in done.error
                    assert done.token_ids, "a request that had not begun was lost"
                else:
                    assert len(done.token_ids) == NUM_TOKENS
            assert begun, "the kill came too early to mean anything"
            if mode == "step":
                assert not failed, "the others know the whole sequence"
    finally:
        for process, _ in three:
            process.kill()
            process.communicate()
