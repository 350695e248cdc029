"""The fault matrix: whatever a server does, the request it does it to ends with a sentence, and nothing else changes.

Each row is one way to fail, on a real socket. In each, two other requests are in the middle of their answers when
it happens; afterwards the same request is asked again of a server that has recovered.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from engine_support import Answers, ask, drive, greedy
from faulty_server import (
    NUM_TOKENS,
    TOKENIZER,
    VICTIM,
    Answer,
    Fault,
    FaultyModel,
    LlamaWords,
    OpenAIWords,
    StepAnswer,
    StepFault,
    StepModel,
    Tape,
    Words,
    context_of,
    engine_on,
)
from http_support import Asked, ScriptedServer, Wire, unused_port
from nanovllm.builtin.mock import expected
from nanovllm.errors import ConfigError, NanoVLLMError
from nanovllm_runner_http.backoff import Backoff
from nanovllm_runner_http.create import create_runner
from nanovllm_runner_http.errors import UpstreamError

CERTIFICATE = Path(__file__).with_name("tls_localhost.pem")
LLAMA, OPENAI = LlamaWords(), OpenAIWords()
PATIENT = {"connect": 5.0, "read": 5.0, "queue": 5.0}
HASTY = {"connect": 5.0, "read": 0.5, "queue": 0.5}


class Row(NamedTuple):
    name: str
    fault: Fault
    error: str  # a pattern that the sentence holds
    times: dict[str, float] = PATIENT  # seconds


def send(*parts: bytes) -> Fault:
    def fault(answer: Answer) -> None:
        answer.wire.send(*parts)
        answer.wire.close()

    return fault


def head(*lines: str) -> bytes:
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def say(status: int, body: Any = b"", **headers: str) -> Fault:
    def fault(answer: Answer) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer.wire.raw(data, status, {name.replace("_", "-"): value for name, value in headers.items()})

    return fault


def then(act: Callable[[Answer], None]) -> Fault:
    """Two good events, and then."""

    def fault(answer: Answer) -> None:
        answer.begin()
        act(answer)

    return fault


def event(value: Any) -> Fault:
    """Two good events, then this one, then the rest as if nothing had been."""

    def fault(answer: Answer) -> None:
        answer.begin()
        answer.wire.event(value)
        answer.end()

    return fault


def chunk(data: bytes) -> Fault:
    def fault(answer: Answer) -> None:
        answer.begin()
        answer.wire.chunk(data)
        answer.end()

    return fault


def for_ever(what: Callable[[Answer], bytes], every: float = 0.02) -> Callable[[Answer], None]:
    """Until the other side hangs up."""

    def act(answer: Answer) -> None:
        while True:
            answer.wire.send(what(answer))
            time.sleep(every)

    return act


def hang(answer: Answer) -> None:
    answer.wire.wait_for_hang_up()


def begin_and(act: Callable[[Answer], None]) -> Fault:
    """The head of a stream, and then."""

    def fault(answer: Answer) -> None:
        answer.wire.start_events()
        act(answer)

    return fault


def unfinished(answer: Answer) -> None:
    answer.wire.chunk(b"data: {}")
    answer.wire.end_events()


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


OK = "HTTP/1.1 200 OK"
EVENTS = "Content-Type: text/event-stream"
LONG = "x" * 2000

ANY_DIALECT = [
    # ------------------------------------------------------------------- no answer, or none in HTTP
    Row("reset at once", lambda a: a.wire.reset(), "broke off its answer"),
    Row("closed at once", lambda a: a.wire.close(), "broke off its answer"),
    Row("not HTTP", send(b"\x00\xff\x80 hello\r\n\r\n"), "broke off its answer"),
    Row("an endless first line", send(b"HTTP/1.1 " + b"2" * 100_000), "broke off its answer|call of .* failed"),
    Row("too many header lines", send(head(OK, EVENTS, *(f"X-{i}: y" for i in range(200)))), "headers"),
    Row("an endless header line", send(head(OK, EVENTS, "X: " + "y" * 100_000)), "header line"),
    Row("a head of which a byte comes now and then", for_ever(lambda a: b"H"), "no token within 0.5 s", HASTY),
    Row("no answer, and the connection stays", hang, "no token within 0.5 s", HASTY),
    # ------------------------------------------------------------------------------------ refusals
    Row("400", say(400, {"error": {"message": "too\nlong\x1b[2J" + LONG}}), r"status 400: too long \[2Jx+\.\.\."),
    Row("401", say(401, {"detail": "who are you?"}), "status 401: who are you.*api_key"),
    Row("404", say(404, b"<html>no</html>"), "status 404: <html>no</html>"),
    Row("413 without a word", say(413), "status 413$"),
    Row("429 with Retry-After", say(429, {"error": "slow down"}, Retry_After="1"), "status 429: slow down"),
    Row("429 with a Retry-After that is none", say(429, b"", Retry_After="soon, \xe9"), "status 429"),
    Row("500", say(500, {"error": {"code": 500, "message": "boom"}}), "status 500: boom"),
    Row("500 with a megabyte", say(500, b"<" * (1 << 20)), "status 500"),
    Row("500 with broken UTF-8", say(500, b'{"error": "\xff\xfe"}'), "status 500"),
    Row("503 while it loads", say(503, {"error": {"message": "Loading model"}}), "status 503: Loading model"),
    Row("a redirect", say(307, b"", Location="/health"), "redirect .307., which is not followed"),
    Row("204", send(head("HTTP/1.1 204 No Content")), "status 204"),
    Row("101", send(head("HTTP/1.1 101 Switching Protocols", "Upgrade: x")), "status 101"),
    Row("JSON instead of events", say(200, {}, Content_Type="application/json"), "application/json, not with events"),
    Row("a web page instead of events", say(200, b"<html>", Content_Type="text/html"), "text/html, not with events"),
    Row("compressed", say(200, b"\x1f\x8b", Content_Type="text/event-stream", Content_Encoding="gzip"), "compressed"),
    # ------------------------------------------------------------------------- an answer that stops
    Row("reset in the middle", then(lambda a: a.wire.reset()), "broke off its answer"),
    Row("closed in the middle", then(lambda a: a.wire.close()), "broke off its answer"),
    Row("shorter than it said", send(head(OK, EVENTS, "Content-Length: 999"), b"data: "), "broke off its answer"),
    Row("no final event", then(lambda a: a.wire.end_events()), "ended its answer in the middle"),
    Row("no event at all", begin_and(lambda a: a.wire.end_events()), "ended its answer in the middle"),
    Row("only the end mark", begin_and(lambda a: (a.wire.event("[DONE]"), a.wire.end_events())), "in the middle"),
    Row("a final event without its blank line", then(unfinished), "in the middle"),
    Row("silence in the middle", then(hang), "stopped in the middle of its answer for 0.5 s", HASTY),
    Row("silence after the head", begin_and(hang), "no token within 0.5 s", HASTY),
    Row("an event of which a byte comes now and then", then(for_ever(lambda a: chunked(b"d"))), "stopped in", HASTY),
    # ---------------------------------------------------------------------- an answer without an end
    Row("comments for ever", begin_and(for_ever(lambda a: chunked(b": ping\n\n"))), "no token within 0.5 s", HASTY),
    Row("comments for ever, in the middle", then(for_ever(lambda a: chunked(b":\n\n"))), "stopped in", HASTY),
    Row("a line without an end", then(for_ever(lambda a: chunked(b"x" * 65536), 0.0)), "line of more than"),
    Row("an event without an end", then(for_ever(lambda a: chunked(b"data: x\n" * 8192), 0.0)), "event of more than"),
    Row("a line of two megabytes", event("x" * (2 << 20)), "line of more than"),
    # --------------------------------------------------------------------------- nonsense in between
    Row("a chunk size that is none", then(lambda a: a.wire.send(b"zz\r\n")), "broke off its answer|call of"),
    Row("a negative chunk size", then(lambda a: a.wire.send(b"-5\r\n")), "stopped in the middle", HASTY),
    Row("a huge chunk", then(lambda a: (a.wire.send(b"ffffffffffff\r\nx"), a.wire.close())), "broke off its answer"),
    Row("invalid UTF-8", chunk(b'data: {"content": "\xff"}\n\n'), "not UTF-8"),
    Row("half a character", chunk("data: é".encode()[:-1] + b"\n\n"), "not UTF-8"),
    Row("truncated JSON", event('{"index": 0, "content": "x'), "no JSON"),
    Row("no JSON", event("hello \x1b[2J\x00 there"), "no JSON"),
    Row("a JSON array", event([1, 2]), "no JSON object"),
    Row("a JSON number", event(7), "no JSON object"),
    Row("null", event(None), "no JSON object"),
    Row("100,000 brackets", event("[" * 100_000), "no JSON"),
    Row("a number of 10,000 digits", event('{"index": ' + "9" * 10_000 + "}"), "no JSON"),
    Row("an empty object", event({}), "an event w"),
    Row("an error in the stream", event({"error": {"message": "out\nof \x07memory", "code": 500}}), "out of memory"),
    Row("an event of type error", chunk(b'event: error\ndata: {"message": "no more"}\n\n'), "no more"),
]  # fmt: skip


def llama(**changes: Any) -> Fault:
    """Two good events, then one with these changes."""
    return event(LLAMA.event([7], 2) | changes)


def openai(**changes: Any) -> Fault:
    good = OPENAI.event([7], 2)
    return event(good | {"choices": [good["choices"][0] | changes]})


def without(value: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: v for key, v in value.items() if key != name}


def wrong_tokens(change: Callable[..., Fault], name: str) -> list[Row]:
    outside = "outside its vocabulary of 125"
    return [
        Row("a negative id", change(**{name: [-1]}), outside),
        Row("the first id after the vocabulary", change(**{name: [125]}), outside),
        Row("an id of 32 bits", change(**{name: [1 << 31]}), outside),
        Row("an id of 64 bits", change(**{name: [1 << 63]}), outside),
        Row("one id of two outside", change(**{name: [7, 125]}), outside),
        Row("an id that is a fraction", change(**{name: [7.5]}), "whole numbers"),
        Row("an id that is text", change(**{name: ["7"]}), "whole numbers"),
        Row("an id that is true", change(**{name: [True]}), "whole numbers"),
        Row("an id that is null", change(**{name: [None]}), "whole numbers"),
        Row("ids in a list too many", change(**{name: [[7]]}), "whole numbers"),
        Row("ids that are no list", change(**{name: {"0": 7}}), "whole numbers"),
    ]


LLAMA_ONLY = [
    *wrong_tokens(llama, "tokens"),
    Row("another sequence's answer", llama(index=1), "answered for sequence 1"),
    Row("no sequence's answer", llama(index=None), "answered for sequence None"),
    Row("text that is none", llama(content=7), "'content' is 7"),
    Row("no text", event(without(LLAMA.event([7], 2), "content")), "'content' is None"),
    Row("is it the end? perhaps", llama(stop="yes"), "'stop' is 'yes'"),
    Row("a count of tokens that is none", llama(tokens_predicted="3"), "'tokens_predicted'"),
    Row("an end without a reason", llama(stop=True), "ended the answer without a reason"),
    Row("an end for a reason that nobody knows", llama(stop=True, stop_type="magic"), "without a reason"),
    Row("an end for a reason that is none", llama(stop=True, stop_type=["eos"]), "ended the answer without a reason"),
]  # fmt: skip

OPENAI_ONLY = [
    *wrong_tokens(openai, "token_ids"),
    Row("another sequence's answer", openai(index=1), "answered for sequence 1"),
    Row("two choices", event({"choices": OPENAI.event([7], 2)["choices"] * 2}), "choices .* where there is one"),
    Row("a choice that is none", event({"choices": ["x"]}), "choices .* where there is one"),
    Row("text that is none", openai(text=7), "'text' is 7"),
    Row("text without ids", openai(token_ids=[]), "text without its token ids"),
    Row("an end for a reason that nobody knows", openai(finish_reason="filter"), "ended the answer with 'filter'"),
    Row("an end for a reason that is none", openai(finish_reason={"x": 1}), "ended the answer with"),
]  # fmt: skip

MATRIX = [
    pytest.param(words, row, id=f"{words.name}: {row.name}")
    for words, own in ((LLAMA, LLAMA_ONLY), (OPENAI, OPENAI_ONLY))
    for row in (*ANY_DIALECT, *own)
]


# ----------------------------------------------------------------------------------------- the engine


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Backoff, "first", 0.001)


def prompt(first: int) -> list[int]:
    return [first, 8, 9]


def right(first: int) -> list[int]:
    return expected(prompt(first), NUM_TOKENS)


def assert_sentence(text: str | None, pattern: str, server: ScriptedServer) -> None:
    assert text is not None, "it passed for an answer"
    assert re.search(pattern, text), text
    assert text.isprintable(), "it holds what a terminal would obey"
    assert len(text) < 400
    assert server.url in text, "it does not say which server"


@pytest.mark.parametrize(("words", "row"), MATRIX)
def test_a_fault_ends_its_request_and_nothing_else(words: Words, row: Row) -> None:
    model = FaultyModel(words)

    def fault(answer: Answer) -> None:
        model.go_on.set()
        row.fault(answer)

    with model.serve() as server, engine_on(server.url, dialect=words.name, timeouts=row.times) as engine:
        model.fault = fault
        model.go_on.clear()
        others = [ask(engine, prompt(i), greedy(NUM_TOKENS)) for i in (5, 6)]
        victim = ask(engine, prompt(VICTIM), greedy(NUM_TOKENS))
        answers = drive(engine)

        done = answers.of(victim)
        assert_sentence(done.error, row.error, server)
        assert list(done.token_ids) == right(VICTIM)[: len(done.token_ids)]
        for i, other in zip((5, 6), others, strict=True):
            assert answers.ids(other) == right(i), "another request's tokens changed"
        assert model.num_victims == 1

        model.fault = None
        again = ask(engine, prompt(VICTIM), greedy(NUM_TOKENS))
        assert drive(engine).ids(again) == right(VICTIM), "the engine does not live on"
        engine.close()
        server.wait_for(lambda s: s.num_open == 0)


# ------------------------------------------------------------------------------------------ step mode


class StepRow(NamedTuple):
    name: str
    fault: StepFault
    error: str
    takes_all: bool = True  # one call is for all sequences of the step
    read: float = 5.0  # seconds


def said(change: Callable[[StepAnswer], Any], **options: Any) -> StepFault:
    """An answer with a body of its own: bytes as they are, anything else as JSON."""

    def fault(answer: StepAnswer) -> None:
        body = change(answer)
        answer.wire.raw(body if isinstance(body, bytes) else json.dumps(body).encode(), **options)

    return fault


def token(value: Any) -> StepFault:
    return said(lambda a: a.with_token(value))


def cut_short(answer: StepAnswer) -> None:
    body = json.dumps(answer.good).encode()
    answer.wire.raw(body[:-5], headers={"Content-Length": str(len(body))})
    answer.wire.close()


def drip(answer: StepAnswer) -> None:
    answer.wire.send(head("HTTP/1.1 200 OK", "Content-Length: 999"))
    while True:
        answer.wire.send(b" ")
        time.sleep(0.02)


def flood(answer: StepAnswer) -> None:
    answer.wire.send(head("HTTP/1.1 200 OK", "Content-Type: application/json"))
    while True:
        answer.wire.send(b" " * 65536)


OUTSIDE = "is none of a vocabulary of 125"

STEP_ROWS = [
    # ----------------------------------------------------------------------------- the call as a whole
    StepRow("reset at once", lambda a: a.wire.reset(), "broke off its answer"),
    StepRow("closed at once", lambda a: a.wire.close(), "broke off its answer"),
    StepRow("not HTTP", lambda a: (a.wire.send(b"\x00\xff hello\r\n\r\n"), a.wire.close()), "broke off its answer"),
    StepRow("silence", lambda a: a.wire.wait_for_hang_up(), "did not answer .* within 0.5 s", read=0.5),
    StepRow("a byte now and then", drip, "did not answer .* within 0.5 s", read=0.5),
    StepRow("400", said(lambda a: {"error": {"message": "no"}}, status=400), "status 400: no"),
    StepRow("401", said(lambda a: {}, status=401), "status 401"),
    StepRow("404", said(lambda a: b"<html>", status=404), "status 404"),
    StepRow("429", said(lambda a: {}, status=429, headers={"Retry-After": "1"}), "status 429"),
    StepRow("500", said(lambda a: {"error": "boom"}, status=500), "status 500: boom"),
    StepRow("503", said(lambda a: {"error": "draining"}, status=503), "status 503: draining"),
    StepRow("a redirect", said(lambda a: b"", status=302, headers={"Location": "/health"}), "redirect .302."),
    StepRow("shorter than it said", cut_short, "broke off its answer"),
    StepRow("truncated JSON", said(lambda a: json.dumps(a.good).encode()[:-5]), "not JSON"),
    StepRow("nothing", said(lambda a: b""), "nothing came"),
    StepRow("a web page", said(lambda a: b"<html></html>"), "not JSON"),
    StepRow("invalid UTF-8", said(lambda a: b'{"version": 1, "x": "\xff"}'), "not JSON"),
    StepRow("100,000 brackets", said(lambda a: b"[" * 100_000), "not JSON"),
    StepRow("a number of 10,000 digits", said(lambda a: b"9" * 10_000), "not JSON"),
    StepRow("more than 16 MiB", flood, "more than 16777216 bytes"),
    StepRow("a JSON array", said(lambda a: [a.good]), "none of version 1"),
    StepRow("no version", said(lambda a: a.good | {"version": None}), "none of version 1"),
    StepRow("a token too few", said(lambda a: a.good | {"token_ids": a.good["token_ids"][1:]}), "holds 2 items"),
    StepRow("a token too many", said(lambda a: a.good | {"token_ids": [*a.good["token_ids"], 7]}), "holds 4 items"),
    StepRow("tokens that are no list", said(lambda a: a.good | {"token_ids": "7"}), "token_ids must be a list"),
    StepRow("another call's answer", said(lambda a: a.good | {"call": a.good["call"] - 1}), "to another call"),
    StepRow("other sequences' answer", said(lambda a: a.good | {"ids": a.good["ids"][::-1]}), "to another call"),
    StepRow("errors that are no object", said(lambda a: a.good | {"errors": [1]}), "errors, logprobs"),
    # --------------------------------------------------------------------------------- one sequence of it
    StepRow("a negative id", token(-1), OUTSIDE, takes_all=False),
    StepRow("the first id after the vocabulary", token(125), OUTSIDE, takes_all=False),
    StepRow("an id of 64 bits", token(1 << 63), OUTSIDE, takes_all=False),
    StepRow("NaN", said(lambda a: a.with_token(float("nan"))), OUTSIDE, takes_all=False),
    StepRow("an id that is a fraction", token(7.5), OUTSIDE, takes_all=False),
    StepRow("an id that is text", token("7\x1b[2J"), OUTSIDE, takes_all=False),
    StepRow("an id that is true", token(True), OUTSIDE, takes_all=False),
    StepRow("ids in a list too many", token([7]), OUTSIDE, takes_all=False),
    StepRow("error", said(lambda a: a.good | {"errors": {str(a.victim): "no\nmemory"}}), "no memory", takes_all=False),
]  # fmt: skip


@pytest.mark.parametrize("row", [pytest.param(row, id=f"nanovllm: {row.name}") for row in STEP_ROWS])
def test_a_fault_of_a_step_ends_the_sequences_it_belongs_to(row: StepRow) -> None:
    model = StepModel()
    times = {"connect": 5.0, "read": row.read}
    with model.serve() as server, engine_on(server.url, dialect="nanovllm", timeouts=times) as engine:
        answers = Answers()
        others = [ask(engine, prompt(i), greedy(NUM_TOKENS)) for i in (5, 6)]
        victim = ask(engine, prompt(VICTIM), greedy(NUM_TOKENS))
        for _ in range(2):
            answers.take(engine.step())
        model.fault = row.fault
        drive(engine, answers)

        assert model.num_faults == 1
        for i, ticket in ((VICTIM, victim), (5, others[0]), (6, others[1])):
            if row.takes_all or ticket is victim:
                assert_sentence(answers.of(ticket).error, row.error, server)
                assert list(answers.of(ticket).token_ids) == right(i)[:2], "what had come before is kept"
            else:
                assert answers.ids(ticket) == right(i), "another request's tokens changed"

        again = ask(engine, prompt(VICTIM), greedy(NUM_TOKENS))
        assert drive(engine).ids(again) == right(VICTIM), "the engine does not live on"
        engine.close()
        server.wait_for(lambda s: s.num_open == 0)


# --------------------------------------------------------------------------------------- every position


@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("words", [LLAMA, OPENAI], ids=lambda w: w.name)
def test_an_answer_that_breaks_at_any_byte_is_asked_for_again_or_fails(words: Words, how: str, no_pause: None) -> None:
    """Only before the first token, for after it the same request would be shown twice."""
    num_attempts: dict[int, int] = {}

    def fault(answer: Answer) -> None:
        data, position = answer.bytes, answer.prompt[1] * 100 + answer.prompt[2]
        num_attempts[position] = num_attempts.get(position, 0) + 1
        if num_attempts[position] > 1:
            answer.wire.send(data)
            return
        answer.wire.send(data[:position])
        getattr(answer.wire, how)()

    model = FaultyModel(words, fault)
    outcomes = {"whole at once": 0, "whole the second time": 0, "failed": 0}
    with model.serve() as server, engine_on(server.url, dialect=words.name, retries=1) as engine:
        size = len(Answer(words, [VICTIM, 0, 0], 2, Tape()).bytes)
        for batch in range(0, size, 48):
            positions = range(batch, min(batch + 48, size))
            asked = {p: ask(engine, [VICTIM, p // 100, p % 100], greedy(2)) for p in positions}
            other = ask(engine, prompt(5), greedy(NUM_TOKENS))
            answers = drive(engine)
            assert answers.ids(other) == right(5)
            for position, ticket in asked.items():
                done, all_of_it = answers.of(ticket), expected([VICTIM, position // 100, position % 100], 2)
                if done.error is not None:
                    assert_sentence(done.error, "broke off its answer|ended its answer in the middle", server)
                    assert num_attempts[position] == 1, "asked again after a token was shown"
                    assert 0 < len(done.token_ids) <= 2
                    assert list(done.token_ids) == all_of_it[: len(done.token_ids)]
                    outcomes["failed"] += 1
                else:
                    assert list(done.token_ids) == all_of_it
                    outcomes["whole at once" if num_attempts[position] == 1 else "whole the second time"] += 1
    assert all(outcomes.values()), outcomes


def test_a_step_that_breaks_at_any_byte_is_taken_again(no_pause: None) -> None:
    """A repeated call gives the same tokens, so nobody notices."""
    position = 0
    size: list[int] = []

    def fault(answer: StepAnswer) -> None:
        nonlocal position
        tape = Tape()
        tape.json(answer.good)
        size.append(len(b"".join(tape.sent)))
        answer.wire.send(b"".join(tape.sent)[:position])
        answer.wire.reset() if position % 2 else answer.wire.close()
        position += 1

    model = StepModel()
    with model.serve() as server, engine_on(server.url, dialect="nanovllm", retries=1) as engine:
        answers = Answers()
        tickets = {i: ask(engine, prompt(i), greedy(400)) for i in (VICTIM, 5)}
        while engine.has_work:
            if not size or position < size[-1]:
                model.fault = fault
            answers.take(engine.step())
        assert position == size[-1] > 100, "not every position was tried"
        for i, ticket in tickets.items():
            assert answers.ids(ticket) == expected(prompt(i), 400)


# ---------------------------------------------------------------------------------- log-probabilities


def llama_logprobs(entries: Callable[[list[dict[str, Any]]], Any]) -> dict[str, Any]:
    good = [{"id": 7, "logprob": -0.5, "top_logprobs": [{"id": 7, "logprob": -0.5}]}]
    return LLAMA.event([7], 0) | {"completion_probabilities": entries(good)}


def openai_logprobs(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    good = {"token_logprobs": [-0.5], "top_logprobs": [{"token_id:7": -0.5}], "tokens": ["token_id:7"]}
    answer = OPENAI.event([7], 0)
    return answer | {"choices": [answer["choices"][0] | {"logprobs": change(good)}]}


NAN, NUMBERS = float("nan"), "log-probabilities that are no numbers"
LOGPROBS = [
    (LLAMA, "NaN", llama_logprobs(lambda g: [g[0] | {"logprob": NAN}]), "log-probability nan"),
    (LLAMA, "NaN of another", llama_logprobs(lambda g: [g[0] | {"top_logprobs": [{"id": 8, "logprob": NAN}]}]), "nan"),
    (LLAMA, "more than 0", llama_logprobs(lambda g: [g[0] | {"logprob": 0.5}]), "log-probability 0.5"),
    (LLAMA, "infinite", llama_logprobs(lambda g: [g[0] | {"logprob": float("inf")}]), "log-probability inf"),
    (LLAMA, "text", llama_logprobs(lambda g: [g[0] | {"logprob": "-1"}]), NUMBERS),
    (LLAMA, "null", llama_logprobs(lambda g: [g[0] | {"logprob": None}]), NUMBERS),
    (LLAMA, "an id outside", llama_logprobs(lambda g: [g[0] | {"top_logprobs": [g[0] | {"id": 125}]}]), "id 125"),
    (LLAMA, "an id that is none", llama_logprobs(lambda g: [g[0] | {"top_logprobs": [g[0] | {"id": "x"}]}]), NUMBERS),
    (LLAMA, "one too many", llama_logprobs(lambda g: g * 2), "no log-probabilities for 1 tokens"),
    (LLAMA, "one too few", llama_logprobs(lambda g: []), "no log-probabilities for 1 tokens"),
    (LLAMA, "none", LLAMA.event([7], 0), "no log-probabilities for 1 tokens"),
    (OPENAI, "NaN", openai_logprobs(lambda g: g | {"token_logprobs": [NAN]}), "log-probability nan"),
    (OPENAI, "NaN of another", openai_logprobs(lambda g: g | {"top_logprobs": [{"token_id:8": NAN}]}), "nan"),
    (OPENAI, "more than 0", openai_logprobs(lambda g: g | {"token_logprobs": [0.5]}), "log-probability 0.5"),
    (OPENAI, "text", openai_logprobs(lambda g: g | {"token_logprobs": ["x"]}), NUMBERS),
    (OPENAI, "an id outside", openai_logprobs(lambda g: g | {"top_logprobs": [{"token_id:125": -1}]}), "id 125"),
    (OPENAI, "one too many", openai_logprobs(lambda g: g | {"token_logprobs": [-1, -1]}), "do not belong to 1 tokens"),
    (OPENAI, "none", openai_logprobs(lambda g: None), "no log-probabilities"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "bad", "error"), [pytest.param(w, bad, e, id=f"{w.name}: {name}") for w, name, bad, e in LOGPROBS]
)
def test_log_probabilities_that_are_none(words: Words, bad: dict[str, Any], error: str) -> None:
    def fault(answer: Answer) -> None:
        answer.wire.events(bad, words.last())

    with FaultyModel(words, fault).serve() as server, engine_on(server.url, dialect=words.name) as engine:
        other = ask(engine, prompt(5), greedy(NUM_TOKENS))
        victim = ask(engine, prompt(VICTIM), greedy(NUM_TOKENS, logprobs=1))
        answers = drive(engine)
        assert_sentence(answers.of(victim).error, error, server)
        assert answers.ids(other) == right(5)


# ------------------------------------------------------------------------------- before there is an answer


@pytest.mark.parametrize("words", [LLAMA, OPENAI, None], ids=["llamacpp", "openai", "nanovllm"])
def test_a_server_that_goes_and_comes_back(words: Words | None) -> None:
    """What was being answered ends; what is asked while nobody listens is refused; then all is as before."""
    with ExitStack() as stack:
        model = StepModel(pause=0.02) if words is None else FaultyModel(words, pause=0.02)
        server = stack.enter_context(model.serve())
        engine = stack.enter_context(engine_on(server.url, dialect="nanovllm" if words is None else words.name))
        answers = Answers()
        cut = ask(engine, prompt(5), greedy(NUM_TOKENS))
        while not answers.deltas:
            answers.take(engine.step())
        server.close()
        drive(engine, answers)
        assert_sentence(answers.of(cut).error, "broke off its answer|cannot be reached", server)
        assert list(answers.of(cut).token_ids) == right(5)[: len(answers.of(cut).token_ids)]

        refused = ask(engine, prompt(6), greedy(NUM_TOKENS))
        assert_sentence(drive(engine).of(refused).error, "cannot be reached: Connection refused", server)

        stack.enter_context(model.serve(port=server.port))
        again = ask(engine, prompt(6), greedy(NUM_TOKENS))
        assert drive(engine).ids(again) == right(6)


def test_nobody_listens_at_the_start() -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    with pytest.raises(UpstreamError, match=f"{url} cannot be reached: Connection refused"), engine_on(url):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog drops connections on Linux")
def test_a_server_that_takes_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as held:
        for _ in range(4):  # fill the backlog, so that the next one gets no answer
            one = held.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(UpstreamError, match=f"{url} took no connection within 0.3 s"):
            create_runner(context_of(url, timeouts={"connect": 0.3}))


@pytest.mark.parametrize("words", [LLAMA, OPENAI, None], ids=["llamacpp", "openai", "nanovllm"])
def test_a_certificate_that_does_not_verify(words: Words | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    model = StepModel() if words is None else FaultyModel(words)
    with model.serve(context=context) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        with (
            pytest.raises(UpstreamError, match=f"{url}: its certificate is not trusted: .*; set ca_file"),
            engine_on(url),
        ):
            pass
        with engine_on(url, ca_file=str(CERTIFICATE)) as engine:
            assert drive(engine).deltas == {}
            ticket = ask(engine, prompt(5), greedy(NUM_TOKENS))
            assert drive(engine).ids(ticket) == right(5)


@pytest.mark.parametrize("words", [LLAMA, OPENAI, None], ids=["llamacpp", "openai", "nanovllm"])
def test_a_vocabulary_that_is_not_the_tokenizers(words: Words | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ids are in range, and mean something else there."""

    class Shifted:
        vocab_size = TOKENIZER.vocab_size

        @staticmethod
        def decode(ids: list[int]) -> str:
            return TOKENIZER.decode([(i + 1) % 125 for i in ids])

    monkeypatch.setattr("faulty_server.TOKENIZER", Shifted)
    with (StepModel() if words is None else FaultyModel(words)).serve() as server:
        sentence = f"{server.url} reads the tokenizer's ids of .* its vocabulary is another one"
        with pytest.raises(ConfigError, match=sentence):
            create_runner(context_of(server.url, tokenizer=TOKENIZER))


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b"<html>"], ids=lambda b: repr(b[:9])
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_server_that_answers_every_question_with_nonsense(body: bytes, status: int) -> None:
    with ScriptedServer(lambda asked, wire: wire.raw(body, status)) as server:
        with pytest.raises(NanoVLLMError) as caught:
            create_runner(context_of(server.url))
        assert server.url in str(caught.value)
        assert str(caught.value).isprintable()


NONSENSE = [
    b"[]", b"7", b"null", b'"x"', b"{}",
    b'{"tokens": 7, "data": 7, "choices": 7, "content": 7, "prompt": 7, "text": 7}',
    b'{"data": [7], "choices": [7], "default_generation_settings": 7, "protocol": "nanovllm"}',
    b'{"data": [{}], "choices": [{}], "default_generation_settings": {}, "protocol": "nanovllm", "versions": [1]}',
]  # fmt: skip


@pytest.mark.parametrize("words", [LLAMA, OPENAI, None], ids=["llamacpp", "openai", "nanovllm"])
def test_an_answer_to_the_probe_that_is_nonsense(words: Words | None) -> None:
    """Each question in turn is answered with each nonsense: the engine starts, or says in one sentence why not."""
    model = StepModel() if words is None else FaultyModel(words)
    dialect = "nanovllm" if words is None else words.name
    sentences: list[str] = []
    with model.serve() as server:
        create_runner(context_of(server.url, dialect=dialect)).close()
        questions = list(dict.fromkeys(asked.path for asked in server.asked))
        assert len(questions) > 1
        for question in questions:
            for body in NONSENSE:

                def handler(asked: Asked, wire: Wire, question: str = question, body: bytes = body) -> None:
                    if asked.path == question:
                        wire.raw(body)
                    else:
                        model(asked, wire)

                server.handler = handler
                try:
                    create_runner(context_of(server.url, dialect=dialect)).close()
                except NanoVLLMError as e:
                    sentences.append(str(e))
        assert sentences
        assert [s for s in sentences if server.url not in s or not s.isprintable()] == []
