"""What `nanovllm serve` takes, at each limit and one beyond it; limits of a key; the bound of its queue."""

from __future__ import annotations

import json
import socket
import threading
import tracemalloc
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http_support import wait_until
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.errors import ConfigError
from nanovllm_server.admission import Admission
from nanovllm_server.errors import ApiError
from nanovllm_server.keys import Key, Keys, load_keys
from nanovllm_server.openai_schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    checked,
)
from nanovllm_server.options import ServerOptions
from nanovllm_server.ratelimit import Bucket, RateLimits
from nanovllm_server.seeds import SeedsChat
from serve_support import Served, serving

KEY, OTHER = "k" * 20, "o" * 20
ASK = {"model": "model", "prompt": [1, 2, 3], "max_tokens": 1, "temperature": 0, "ignore_eos": True}
CHAT = {"model": "model", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---------------------------------------------------------------------------------- caps of one call

CAPS = ServerOptions(
    max_prompts=3,
    max_choices=6,
    max_prompt_tokens=16,
    max_tokens=5,
    max_text_chars=50,
    max_ids=9,
    max_body_bytes=20_000,
)


@pytest.fixture(scope="module")
def capped() -> Any:
    with serving(options=CAPS) as served:
        yield served


@pytest.mark.parametrize(
    ("path", "at", "beyond", "param"),
    [
        ("completions", {"prompt": [1] * 16}, {"prompt": [1] * 17}, None),
        ("completions", {"prompt": [[1]] * 3}, {"prompt": [[1]] * 4}, "prompt"),
        ("completions", {"n": 6}, {"n": 7}, "n"),
        ("completions", {"prompt": [[1]] * 3, "n": 2}, {"prompt": [[1]] * 3, "n": 3}, "n"),
        ("completions", {"max_tokens": 5}, {"max_tokens": 6}, "max_tokens"),
        ("chat/completions", {"max_tokens": 5}, {"max_tokens": 6}, None),
        ("completions", {"stop": ["x"] * 64}, {"stop": ["x"] * 65}, "stop"),
        ("completions", {"stop": "x" * 1024}, {"stop": "x" * 1025}, "stop"),
        ("completions", {"stop_token_ids": [1] * 256}, {"stop_token_ids": [1] * 257}, "stop_token_ids"),
        ("completions", {"logit_bias": dict.fromkeys(map(str, range(125)), 1)},
         {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
        ("completions", {"logprobs": 20}, {"logprobs": 21}, "logprobs"),
        ("completions", {"temperature": 100}, {"temperature": 100.5}, "temperature"),
        ("completions", {"cache_salt": "s" * 256}, {"cache_salt": "s" * 257}, "cache_salt"),
        ("completions", {"priority": 1}, {"priority": -1}, "priority"),
        ("tokenize", {"text": "x" * 50}, {"text": "x" * 51}, None),
        ("detokenize", {"token_ids": [1] * 9}, {"token_ids": [1] * 10}, None),
    ],
)  # fmt: skip
def test_at_the_limit_and_beyond(
    capped: Served, path: str, at: dict[str, Any], beyond: dict[str, Any], param: str | None
) -> None:
    base: dict[str, Any] = {"completions": ASK, "chat/completions": CHAT}.get(path, {})
    status, answer = capped.post(f"/v1/{path}", {**base, **at})
    assert status == 200, answer
    status, answer = capped.post(f"/v1/{path}", {**base, **beyond})
    assert 400 <= status < 500, answer
    assert answer["error"]["type"] == "invalid_request_error"
    assert param is None or answer["error"]["param"].partition(".")[0] == param


def test_characters_to_tokenize_count_together(capped: Served) -> None:
    for num_chars, expected in ((48, 200), (51, 400)):  # each is within max_prompt_tokens and max_body_bytes
        texts = [" " * (num_chars // 3)] * 3
        assert capped.post("/v1/completions", {**ASK, "prompt": texts})[0] == expected
        messages = [{"role": "user", "content": text} for text in texts]
        status, answer = capped.post("/v1/chat/completions", {**CHAT, "messages": messages})
        assert (status == 400 and "characters" in answer["error"]["message"]) == (expected == 400)


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatRequest, {"messages": [1] * 100_000}),
        (ChatRequest, {"messages": [{}] * 100_000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 100_000}]}),
        (ChatRequest, {**CHAT, "stop": [1] * 100_000}),
        (ChatRequest, {**CHAT, "logit_bias": dict.fromkeys(map(str, range(100_000)), "x")}),
        (ChatRequest, {**CHAT, "metadata": dict.fromkeys(map(str, range(100_000)), 1)}),
        (ChatRequest, dict.fromkeys(map(str, range(100_000)), 1)),
        (CompletionRequest, {"prompt": [1.5] * 100_000}),
        (CompletionRequest, {"prompt": [{}] * 100_000}),
        (CompletionRequest, {"prompt": [[]] * 100_000}),
        (CompletionRequest, {**ASK, "stop_token_ids": [-1] * 100_000}),
        (DetokenizeRequest, {"token_ids": [-1] * 100_000}),
        (TokenizeRequest, {"messages": [1] * 100_000}),
        (SeedsChat, {"messages": [1] * 100_000}),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else value.__name__,
)
def test_what_is_wrong_a_hundred_thousand_times_is_said_once(model: type[Body], body: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as caught:
            checked(model, body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert caught.value.status == 400
    assert len(caught.value.message) < 300
    assert peak < 1 << 20  # a complaint for each would be tens of megabytes, and seconds on the event loop


def test_bytes_of_a_body(capped: Served) -> None:
    for num_bytes, expected in ((20_000, 200), (20_001, 413)):
        body = json.dumps(ASK).encode()
        body += b" " * (num_bytes - len(body))
        assert capped.call("POST", "/v1/completions", body)[0] == expected
        chunks = b"".join(
            b"%x\r\n%s\r\n" % (len(body[i : i + 999]), body[i : i + 999]) for i in range(0, len(body), 999)
        )
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        answer = raw(
            capped.port, head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunks + b"0\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 %d " % expected)


@pytest.mark.parametrize("whole", [True, False], ids=["in one piece", "in pieces"])
def test_bytes_of_a_head(whole: bool) -> None:
    with serving(options=ServerOptions(max_header_bytes=2000)) as served:
        for num_bytes, statuses in ((1998, (200,)), (2001, (431, 400)), (70_000, (431, 400))):
            head = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Long: "
            head += b"x" * (num_bytes - len(head) - 2) + b"\r\n\r\n"
            answer = raw(served.port, head, 0 if whole else 500)
            assert answer == b"" or int(answer.split()[1]) in statuses, answer[:100]
            assert answer or num_bytes == 70_000  # closed while more came
            if statuses != (200,) and answer:
                assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["Authorization", "Host", "Content-Type", "X-Request-ID", "Content-Length"])
def test_a_header_that_counts_is_there_once(capped: Served, name: str) -> None:
    values = {"Authorization": ("Bearer a", "Bearer b"), "Content-Length": ("2", "3")}.get(name, ("localhost", "b"))
    others = b"" if name == "Host" else b"Host: localhost\r\n"
    head = b"GET /livez HTTP/1.1\r\n" + others + b"".join(f"{name}: {v}\r\n".encode() for v in values)
    assert raw(capped.port, head + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX-A: b"])
def test_a_head_that_does_not_come_to_an_end_is_closed(sent: bytes) -> None:
    with serving(options=ServerOptions(head_seconds=0.2)) as served:
        assert raw(served.port, sent) == b""
        # And after a good one on the same connection, in its own time.
        good = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert raw(served.port, good + b"GET /li").count(b"HTTP/1.1 ") == 1


def test_a_head_that_took_its_time_does_not_end_its_answer() -> None:
    with serving(MockRunner(script=Script(delay=0.05)), options=ServerOptions(head_seconds=0.2)) as served:
        assert len(served.events("/v1/completions", {**ASK, "max_tokens": 10})) >= 10


def test_connections_beyond_the_limit_are_closed_while_all_are_busy() -> None:
    with (
        serving(MockRunner(script=Script(hang_step=1)), options=ServerOptions(max_connections=3)) as served,
        ExitStack() as stack,
    ):
        held = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10)) for _ in range(3)]
        body = json.dumps(ASK).encode()
        for sock in held:
            sock.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
            )
        wait_until(lambda: served.state.admission.num_calls == 3)
        assert _is_closed(stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10)))
        held[0].close()
        wait_until(lambda: served.state.admission.num_calls == 2)
        assert served.call("GET", "/livez")[0] == 200


def test_who_asks_for_nothing_keeps_nobody_out() -> None:
    with serving(options=ServerOptions(max_connections=3)) as served, ExitStack() as stack:
        held = []
        for _ in range(3):  # each is taken before the next one comes, and has its answer
            held.append(stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10)))
            _ask(held[-1])
        stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 10))  # says nothing
        assert _is_closed(held[0])  # idle for longest
        assert served.call("GET", "/livez")[0] == 200
        assert _is_closed(held[1])
        _ask(held[2])


def _ask(sock: socket.socket) -> None:
    sock.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += (part := sock.recv(4096))
        assert part, answer


def _is_closed(sock: socket.socket) -> bool:
    try:
        return not sock.recv(1)
    except ConnectionError:
        return True


def raw(port: int, data: bytes, piece: int = 0) -> bytes:
    """Send bytes, return what comes until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as sock:
        answer = b""
        try:
            for i in range(0, len(data), piece or len(data) or 1):
                sock.sendall(data[i : i + (piece or len(data))])
            while part := sock.recv(65536):
                answer += part
        except ConnectionError:
            pass
        return answer


# ----------------------------------------------------------------------------------- limits of a key


@given(st.lists(st.tuples(st.floats(0, 90), st.integers(0, 40)), max_size=60), st.sampled_from([0.5, 1, 7, 60, 1000]))
def test_a_bucket_gives_no_more_than_its_rate_allows(calls: list[tuple[float, int]], per_minute: float) -> None:
    """Over any span, what was let through without debt is at most a full bucket and what flowed in."""
    clock = Clock()
    bucket, taken, start = Bucket(per_minute, clock), 0, clock.now
    for pause, amount in calls:
        clock.now += pause
        if bucket.seconds_until(amount) == 0:
            bucket.take(amount)
            taken += amount
        assert taken <= max(per_minute, 1) + (clock.now - start) * per_minute / 60 + 1e-6


@given(st.integers(0, 500), st.sampled_from([1, 60, 600]))
def test_after_the_wait_that_it_names_it_has_enough(debt: int, per_minute: int) -> None:
    clock = Clock()
    bucket = Bucket(per_minute, clock)
    bucket.take(debt)
    clock.now += bucket.seconds_until(1) + 1e-6
    assert bucket.seconds_until(1) == 0


def limited(clock: Clock, keys: Keys, **options: Any) -> RateLimits:
    return RateLimits(ServerOptions(**options), keys, clock)


def test_requests_of_one_key_are_counted_apart_from_anothers() -> None:
    clock = Clock()
    limits = limited(clock, Keys([Key(KEY, "a"), Key(OTHER, "b")]), requests_per_minute=2)
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(ApiError) as e:
        limits.enter("a")
    assert (e.value.status, e.value.code, e.value.retry_after) == (429, "rate_limit_exceeded", 30.0)
    limits.enter("b")
    clock.now += 29.9
    with pytest.raises(ApiError):
        limits.enter("a")
    clock.now += 0.1
    limits.enter("a")


def test_tokens_are_charged_afterwards_and_the_debt_is_waited_for() -> None:
    clock = Clock()
    limits = limited(clock, Keys(), tokens_per_minute=60)
    limits.enter("")
    limits.charge("", 100)  # 60 were there
    with pytest.raises(ApiError) as e:
        limits.enter("")
    assert e.value.retry_after == pytest.approx(40)
    assert e.value.response().headers["retry-after"] == "40"
    clock.now += 40.01
    limits.enter("")


def test_a_key_with_limits_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY} name=acme requests_per_minute=1  # a customer\n{OTHER}\n")
    keys = load_keys(file, {})
    assert keys.owner(f"Bearer {KEY}".encode()) == "acme"
    with serving(keys=keys, options=ServerOptions(requests_per_minute=3)) as served:
        ask = json.dumps(ASK).encode()
        mine = [served.call("POST", "/v1/completions", ask, Authorization=f"Bearer {KEY}")[0] for _ in range(3)]
        others = [served.call("POST", "/v1/completions", ask, Authorization=f"Bearer {OTHER}")[0] for _ in range(4)]
        wrong = [served.call("POST", "/v1/completions", ask, Authorization="Bearer no")[0] for _ in range(5)]
        assert served.call("GET", "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200  # costs nothing
    assert mine == [200, 429, 429]
    assert others == [200, 200, 200, 429]
    assert wrong == [401] * 5


def test_the_429_says_when_to_come_again_in_openais_shape() -> None:
    import openai

    with serving(options=ServerOptions(tokens_per_minute=10)) as served, served.client() as client:
        client.completions.create(model="model", prompt=[1] * 20, max_tokens=10, extra_body={"ignore_eos": True})
        with pytest.raises(openai.RateLimitError) as e:
            client.completions.create(model="model", prompt="x", max_tokens=1)
    assert 100 < float(e.value.response.headers["retry-after"]) <= 120
    assert e.value.code == "rate_limit_exceeded"


@pytest.mark.parametrize(
    "line",
    [f"{KEY} name=", f"{KEY} name=a/b", f"{KEY} requests_per_minute=0", f"{KEY} requests_per_minute=-1",
     f"{KEY} requests_per_minute=nan", f"{KEY} burst=1", f"{KEY} {OTHER}", "short name=a",
     f"{KEY} name=a\n{OTHER} name=a"],
)  # fmt: skip
def test_a_wrong_line_of_the_key_file_is_named_and_no_key_is_shown(line: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line)
    with pytest.raises(ConfigError, match=r"line 1|two keys with the name a") as e:
        load_keys(tmp_path / "keys", {})
    assert KEY not in str(e.value)
    assert OTHER not in str(e.value)


# ------------------------------------------------------------------------------ admission to the queue


def test_a_full_queue_answers_at_once_and_what_runs_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(max_queue=1)
    with serving(MockRunner(script=Script(delay=0.01)), max_num_seqs=2, options=options) as served:
        body = {**ASK, "max_tokens": 80}
        statuses: list[int] = []
        asking = [
            threading.Thread(target=lambda: statuses.append(served.post("/v1/completions", body)[0])) for _ in range(3)
        ]
        for thread in asking:
            thread.start()
        wait_until(lambda: served.state.admission.num_answers == 3)
        with monkeypatch.context() as m:
            m.delattr(type(served.llm.engine), "prepare")  # so that tokenizing would be seen
            status, answer = served.post("/v1/completions", body)
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert not statuses, "it did not wait for the others"
        for thread in asking:
            thread.join()
        assert statuses == [200, 200, 200]
        assert served.post("/v1/completions", {**ASK, "n": 3})[0] == 200
        status, answer = served.post("/v1/completions", {**ASK, "n": 4})  # never, so do not try again
        assert (status, "3 answers, not 4" in answer["error"]["message"]) == (400, True)


def test_streams_beyond_their_number_are_refused_and_others_are_not() -> None:
    with serving(MockRunner(script=Script(delay=0.01)), options=ServerOptions(max_streams=1)) as served:
        stream = threading.Thread(target=served.events, args=("/v1/completions", {**ASK, "max_tokens": 60}))
        stream.start()
        wait_until(lambda: served.state.admission.num_streams == 1)
        status, answer = served.post("/v1/completions", {**ASK, "stream": True})
        assert (status, answer["error"]["code"]) == (503, "overloaded")
        assert served.post("/v1/completions", ASK)[0] == 200
        stream.join()
        wait_until(lambda: served.state.admission.num_streams == 0)
        assert served.events("/v1/completions", ASK)[-1] == "[DONE]"


def tickets(num_answers: int = 1) -> Any:
    return [SimpleNamespace(sequences=[SimpleNamespace(num_prompt=1, num_output=1)] * num_answers, request=None)]


def admission(clock: Clock, **options: Any) -> Admission:
    chosen = ServerOptions(**options)
    found = Admission(chosen, RateLimits(chosen, Keys(), clock), clock)
    found.num_slots = 2
    return found


def test_one_key_does_not_fill_the_queue_for_the_others() -> None:
    options, clock = ServerOptions(answers_at_once=3, max_queue=100), Clock()
    keys = Keys([Key(KEY, "a"), Key(OTHER, "b", {"answers_at_once": 5})])
    door = Admission(options, RateLimits(options, keys, clock), clock)
    door.num_slots = 2
    with door.enter("a", tickets(2), True):
        with pytest.raises(ApiError) as caught, door.enter("a", tickets(2), False):
            pass
        assert (caught.value.status, caught.value.code) == (429, "rate_limit_exceeded")
        with door.enter("a", tickets(1), False), door.enter("b", tickets(5), False):
            assert door.num_answers == 8
    with door.enter("a", tickets(3), False):  # what has ended counts no more
        pass
    with pytest.raises(ApiError) as caught, door.enter("a", tickets(4), False):
        pass
    assert caught.value.status == 400, "it would never fit"


def test_the_expected_wait_is_measured_and_bounds_the_queue() -> None:
    clock = Clock()
    door = admission(clock, max_queue_seconds=10, max_queue=100)
    held = [door.enter("", tickets(), False) for _ in range(4)]
    for call in held:
        call.__enter__()
    assert door.expected_wait() == 0, "nothing is known yet"
    for call in held[:2]:  # one ends every 4 s, with both slots taken
        clock.now += 4
        call.__exit__(None, None, None)
    assert door.num_answers == 2
    assert door.expected_wait() == pytest.approx(4)
    with door.enter("", tickets(), False):
        assert door.expected_wait() == pytest.approx(8)
        with door.enter("", tickets(), False), pytest.raises(ApiError) as e, door.enter("", tickets(), False):
            pass
    assert (e.value.status, e.value.code, e.value.retry_after) == (503, "overloaded", pytest.approx(12))
    for call in held[2:]:
        call.__exit__(None, None, None)
    assert (door.num_calls, door.num_answers, door.expected_wait()) == (0, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4), st.booleans(), st.floats(0, 3)), max_size=40))
def test_what_admission_counts_is_what_is_inside(program: list[tuple[int, int, bool, float]]) -> None:
    clock = Clock()
    door = admission(clock, max_queue=5, max_streams=3)
    inside: list[tuple[int, bool, Any]] = []
    for choice, num_answers, is_stream, pause in program:
        clock.now += pause
        if choice < 3 and inside:
            inside.pop(choice % len(inside))[2].__exit__(None, None, None)
        else:
            call = door.enter("", tickets(num_answers), is_stream)
            fits = sum(n for n, *_ in inside) + num_answers <= 7
            fits = fits and not (is_stream and sum(s for _, s, _ in inside) >= 3)
            fits = fits and door.expected_wait() <= 60
            if fits:
                call.__enter__()
                inside.append((num_answers, is_stream, call))
            else:
                with pytest.raises(ApiError):
                    call.__enter__()
        assert door.num_calls == len(inside)
        assert door.num_answers == sum(n for n, *_ in inside)
        assert door.num_streams == sum(s for _, s, _ in inside)
