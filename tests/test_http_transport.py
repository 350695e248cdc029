"""The transport over real sockets: what goes out, what comes back, and how each failure is told."""

from __future__ import annotations

import email.utils
import json
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from http_support import Asked, ScriptedServer, Wire, nothing_left, unused_port, wait_until
from nanovllm.errors import ConfigError
from nanovllm_runner_http.backoff import Backoff
from nanovllm_runner_http.call import Call
from nanovllm_runner_http.errors import UpstreamError
from nanovllm_runner_http.options import ConnectionOptions
from nanovllm_runner_http.transport import Transport


class Open:
    """Transports of one test, closed at its end; naps are counted, not taken."""

    def __init__(self) -> None:
        self.naps: list[float] = []
        self.opened: list[Transport] = []

    def __call__(self, url: str, environment: dict[str, str] | None = None, **options: Any) -> Transport:
        transport = Transport(
            url,
            ConnectionOptions.model_validate(options),
            pause=lambda call, seconds: self.naps.append(seconds),
            jitter=lambda: 0.0,
            environment=environment or {},
        )
        self.opened.append(transport)
        return transport


@pytest.fixture
def connect() -> Iterator[Open]:
    with nothing_left():
        opened = Open()
        yield opened
        for transport in opened.opened:
            transport.close()


def failure(call: Callable[[], Any]) -> UpstreamError:
    with pytest.raises(UpstreamError) as caught:
        call()
    return caught.value


def drop(asked: Asked, wire: Wire) -> None:
    wire.close()


# -------------------------------------------------------------------------------------- what goes out


def test_a_hundred_calls_share_one_connection_that_close_ends(connect: Open) -> None:
    with ScriptedServer(lambda asked, wire: wire.json({"got": asked.json})) as server:
        transport = connect(server.url)
        for i in range(100):
            assert transport.post("/echo", {"i": i}) == {"got": {"i": i}}
        assert server.num_connections == 1
        assert server.num_open == 1
        transport.close()
        server.wait_for(lambda s: s.num_open == 0)


def test_a_request_carries_json_the_key_and_nothing_of_the_environment(
    connect: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{unused_port()}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{unused_port()}")
    netrc = tmp_path / "netrc"
    netrc.write_text("default login me password netrc-secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with ScriptedServer(lambda asked, wire: wire.json({})) as server:
        connect(server.url + "/base", {"KEY": " k-123\n"}, api_key_env="KEY").post("/x", {"text": "é", "n": None})
        connect(server.url).get("/y")
    first, second = server.asked
    assert (first.method, first.path, first.json) == ("POST", "/base/x", {"text": "é", "n": None})
    assert first.headers["authorization"] == "Bearer k-123"
    assert first.headers["content-type"] == "application/json"
    assert first.headers["accept-encoding"] == "identity"
    assert "authorization" not in second.headers


def test_a_configured_proxy_is_used(connect: Open) -> None:
    with ScriptedServer(lambda asked, wire: wire.json({"asked for": asked.path})) as proxy:
        transport = connect("http://model.invalid:80", proxy=proxy.url)
        assert transport.get("/health")["asked for"].replace(":80", "") == "http://model.invalid/health"


@pytest.mark.parametrize(
    ("content", "words"), [("", "holds no key"), ("two words", "holds no key"), ("a\r\nX: y", "holds no key")]
)
def test_a_key_that_is_none_is_refused_without_being_shown(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(content)
    for options, environment in (({"api_key_file": str(file)}, {}), ({"api_key_env": "KEY"}, {"KEY": content})):
        with pytest.raises(ConfigError, match=words) as caught:
            Transport("http://h", ConnectionOptions.model_validate(options), environment=environment)
        assert not content or content not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Transport("http://h", ConnectionOptions.model_validate({"api_key_file": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match="variable KEY is not set, which api_key_env names; export KEY=KEY"):
        Transport("http://h", ConnectionOptions.model_validate({"api_key_env": "KEY"}), environment={})


def test_a_key_that_the_server_repeats_is_not_shown(connect: Open) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        wire.raw(f"bad key: {asked.headers['authorization']}".encode(), 401)

    with ScriptedServer(handler) as server:
        error = failure(lambda: connect(server.url, {"KEY": "sk-hunter2"}, api_key_env="KEY").get("/x"))
    assert "status 401: bad key: Bearer ***;" in str(error)


# ------------------------------------------------------------------------------- failures in words


def test_nobody_listens(connect: Open) -> None:
    url = f"http://127.0.0.1:{unused_port()}"
    error = failure(lambda: connect(url).get("/health"))
    assert error.can_retry
    assert url in str(error)
    assert "Connection refused" in str(error)
    assert "requests" not in str(error)  # a sentence, not a repr


def test_a_name_that_does_not_exist(connect: Open) -> None:
    assert "name is not known" in str(failure(lambda: connect("http://model.invalid").get("/")))


@pytest.mark.parametrize("num_bytes", [*range(60), 75, 82, 83, 84])
def test_an_answer_cut_at_any_byte_is_an_error_that_may_be_tried_again(connect: Open, num_bytes: int) -> None:
    body = b'{"a": "' + b"x" * 10 + b'"}'
    whole = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    assert num_bytes < len(whole)

    def handler(asked: Asked, wire: Wire) -> None:
        wire.send(whole[:num_bytes])
        (wire.reset if num_bytes % 2 else wire.close)()

    with ScriptedServer(handler) as server:
        error = failure(lambda: connect(server.url, retries=0).get("/x"))
    assert error.can_retry
    assert str(error).startswith(f"{server.url} broke off its answer to /x")


@pytest.mark.parametrize(
    ("status", "body", "headers", "words", "can_retry"),
    [
        (400, b'{"error": {"message": "too\\nlong"}}', {}, "status 400: too long", False),
        (401, b'{"error": "no key"}', {}, "status 401: no key; set api_key_env or api_key_file to a key", False),
        (404, b"", {}, "status 404", False),
        (422, b'{"detail": "\\u0000bad"}', {}, "status 422: bad", False),
        (429, b"{}", {"Retry-After": "7"}, "status 429", True),
        (500, b"<html>" + b"x" * 5000, {}, "status 500: <html>xxx", True),
        (503, b'{"error": {"code": 503, "message": "Loading model"}}', {}, "status 503: Loading model", True),
        (501, b"[" * 50000, {}, "status 501", False),
        (302, b"", {"Location": "http://evil.invalid/"}, "redirect \\(302\\), which is not followed", False),
        (204, b"", {}, "status 204", False),
        (200, b"no json", {}, "not JSON", False),
        (200, b'{"a": \xff}', {}, "not JSON", False),
        (200, b"[" * 100000, {}, "not JSON", False),
        (200, b"", {}, "nothing came", True),
        (200, b"x", {"Content-Encoding": "gzip"}, "compressed", False),
    ],
)  # fmt: skip
def test_a_status_or_body_that_is_not_an_answer(
    connect: Open, status: int, body: bytes, headers: dict[str, str], words: str, can_retry: bool
) -> None:
    with ScriptedServer(lambda asked, wire: wire.raw(body, status, headers)) as server:
        transport = connect(server.url, retries=0)
        with pytest.raises(UpstreamError, match=words) as caught:
            transport.get("/x")
    assert caught.value.can_retry is can_retry
    assert caught.value.status == (None if words in ("nothing came", "compressed") else status)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert len(server.asked) == 1


def test_a_body_without_end_stops_at_the_limit(connect: Open) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        wire.start_events("application/json")
        while True:  # until the client hangs up
            wire.chunk(b"[" * 10000)

    with ScriptedServer(handler) as server:
        transport = connect(server.url, retries=0)
        assert "more than 100000 bytes" in str(failure(lambda: transport.get("/x", max_bytes=100_000)))
        server.wait_for(lambda s: s.num_open == 0)


def test_headers_without_end_are_an_error(connect: Open) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        wire.send(b"HTTP/1.1 200 OK\r\n")
        for i in range(10_000):
            wire.send(b"X-%d: y\r\n" % i)

    with ScriptedServer(handler) as server:
        assert "broke off" in str(failure(lambda: connect(server.url, retries=0).get("/x")))


@pytest.mark.parametrize("where", ["nowhere", "headers", "body"])
def test_a_server_that_is_silent_or_slow_is_given_up_on(connect: Open, where: str) -> None:
    is_over = threading.Event()

    def handler(asked: Asked, wire: Wire) -> None:
        if where == "body":
            wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while where != "nowhere" and not is_over.wait(0.01):  # a byte now and then: no single read times out
            wire.send(b"H" if where == "headers" else b" ")
        is_over.wait()

    with ScriptedServer(handler) as server:
        error = failure(lambda: connect(server.url, retries=5, timeouts={"read": 0.2}).get("/x"))
        is_over.set()
    assert "0.2 s" in str(error)
    assert not error.can_retry  # it has cost its time
    assert len(server.asked) == 1


# -------------------------------------------------------------------------------------------- TLS


@pytest.fixture
def tls_server() -> Iterator[tuple[str, Path]]:
    """A server for `localhost`, and the certificate that signs itself."""
    certificate = Path(__file__).with_name("tls_localhost.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ScriptedServer(lambda asked, wire: wire.json({"ok": True}), context=context) as server:
        yield f"https://localhost:{server.port}", certificate


def test_no_thread_stays_where_nothing_is_asked_any_more(connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanovllm_runner_http.watchdog.IDLE_SECONDS", 0.02)

    before, silent = set(threading.enumerate()), threading.Event()

    def watching() -> bool:
        return any(thread.name == "nanovllm-watchdog" for thread in set(threading.enumerate()) - before)

    def handler(asked: Asked, wire: Wire) -> None:
        if asked.path == "/silent":
            silent.wait(10)
        wire.json({})

    with ScriptedServer(handler) as server:
        transport = connect(server.url, retries=0)
        for _ in range(3):
            transport.get("/x")
            wait_until(lambda: not watching())
        assert "within 0.1 s" in str(failure(lambda: transport.get("/silent", timeout=0.1)))
        silent.set()


def test_a_certificate_that_nobody_vouches_for_is_refused(connect: Open, tls_server: tuple[str, Path]) -> None:
    url, _ = tls_server
    error = failure(lambda: connect(url).get("/x"))
    assert not error.can_retry
    assert "its certificate is not trusted: self-signed certificate" in str(error).replace("self signed", "self-signed")
    assert "set ca_file" in str(error)


def test_a_certificate_is_trusted_by_name_and_only_for_its_host(connect: Open, tls_server: tuple[str, Path]) -> None:
    url, certificate = tls_server
    assert connect(url, ca_file=str(certificate)).get("/x") == {"ok": True}
    other = connect(url.replace("localhost", "127.0.0.1"), ca_file=str(certificate))
    assert "not trusted" in str(failure(lambda: other.get("/x")))


def test_without_verification_any_certificate_will_do_and_the_log_says_so_once(
    connect: Open, tls_server: tuple[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    transport = connect(tls_server[0], verify=False)
    assert [transport.get("/x") for _ in range(3)] == [{"ok": True}] * 3
    assert [r.message for r in caplog.records if r.levelno == logging.WARNING] == [
        f"{tls_server[0]}: certificates are not checked (verify: false)"
    ]


def test_a_ca_file_that_is_none_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=r"ca_file .* cannot be used"):
            Transport("https://h", ConnectionOptions.model_validate({"ca_file": str(tmp_path / name)}))


# ---------------------------------------------------------------------------------------- retries


def test_what_can_be_tried_again_is_with_growing_pauses(connect: Open) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        if len(server.asked) < 4:
            return wire.json({}, 503)
        return wire.json({"attempt": len(server.asked)})

    with ScriptedServer(handler) as server:
        assert connect(server.url, retries=3).get("/x") == {"attempt": 4}
        assert connect.naps == [0.125, 0.25, 0.5]  # half of 0.25, 0.5, 1: the jitter of this test is 0


def test_the_number_of_attempts_is_bounded(connect: Open) -> None:
    with ScriptedServer(drop) as server:
        assert failure(lambda: connect(server.url, retries=2).post("/x", {})).can_retry
        assert len(server.asked) == 3
        failure(lambda: connect(server.url, retries=2).post("/x", {}, retries=0))
        assert len(server.asked) == 4


def test_retry_after_is_honoured_in_both_its_forms(connect: Open) -> None:
    in_half_a_minute = email.utils.formatdate(time.time() + 30, usegmt=True)

    def handler(asked: Asked, wire: Wire) -> None:
        wire.json({}, 429, {"Retry-After": ["3", in_half_a_minute, "-1", "soon"][len(server.asked) - 1]})

    with ScriptedServer(handler) as server:
        assert failure(lambda: connect(server.url, retries=3).get("/x")).status == 429
    as_number, as_date, negative, _ = *connect.naps, None
    assert as_number == 3.0
    assert as_date is not None
    assert 25 < as_date <= 30
    assert negative == 0.5  # nonsense counts as none


def test_a_server_that_asks_for_too_much_patience_is_given_up_on(connect: Open) -> None:
    with ScriptedServer(lambda asked, wire: wire.json({}, 503, {"Retry-After": "3600"})) as server:
        assert failure(lambda: connect(server.url).get("/x")).retry_after == 3600
        assert len(server.asked) == 1


def test_pauses_grow_to_a_limit_and_are_never_the_same_for_all() -> None:
    error = UpstreamError("busy", can_retry=True)
    for jitter in (0.0, 0.999):
        backoff = Backoff(20, lambda jitter=jitter: jitter)
        pauses = [backoff.delay(i, error) for i in range(1, 21)]
        assert pauses[0] == 0.25 * (0.5 + jitter / 2)
        assert pauses[-1] == 8.0 * (0.5 + jitter / 2)
        assert pauses == sorted(pauses, key=lambda p: p or 0)
        assert backoff.delay(21, error) is None


def test_a_connection_that_the_server_closed_meanwhile_is_replaced(connect: Open) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        wire.json({})
        wire.close()  # without saying so

    with ScriptedServer(handler) as server:
        transport = connect(server.url, retries=0)
        for _ in range(5):
            transport.get("/x")
            server.wait_for(lambda s: s.num_open == 0)
        assert server.num_connections == 5


# ---------------------------------------------------------------------------------------- streams


def read_all(transport: Transport, call: Call | None = None) -> bytes:
    with transport.stream("/s", {}, call or Call()) as answer:
        return b"".join(iter(answer.read, b""))


def test_a_stream_gives_each_piece_when_it_comes(connect: Open) -> None:
    seen = threading.Semaphore(0)

    def handler(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        for i in range(50):
            wire.event(i)
            assert seen.acquire(timeout=10), "an event was held back"
        wire.end_events()

    with ScriptedServer(handler) as server, connect(server.url).stream("/s", {}, Call()) as answer:
        assert answer.status == 200
        for i in range(50):
            assert answer.read() == f"data: {i}\n\n".encode()
            seen.release()
        assert answer.read() == b""


def test_a_stream_that_was_read_to_its_last_event_leaves_its_connection_for_the_next(connect: Open) -> None:
    with ScriptedServer(lambda asked, wire: wire.events("one", "[DONE]")) as server:
        transport = connect(server.url)
        for _ in range(10):
            with transport.stream("/s", {}, Call()) as answer:
                assert answer.read() == b"data: one\n\n"  # the rest is drained
        assert server.num_connections == 1


def test_a_stream_that_goes_on_after_its_last_event_is_hung_up_on(connect: Open) -> None:
    def handler(asked: Asked, wire: Wire) -> None:
        wire.start_events()
        while True:
            wire.event("more")

    with ScriptedServer(handler) as server:
        with connect(server.url).stream("/s", {}, Call()) as answer:
            answer.read()
        server.wait_for(lambda s: s.num_open == 0)


@pytest.mark.parametrize("where", ["before the headers", "in the headers", "before an event", "in an event"])
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_abort_ends_a_blocked_read_at_once_and_the_server_sees_it(connect: Open, where: str, tls: bool) -> None:
    is_there = threading.Event()

    def handler(asked: Asked, wire: Wire) -> None:
        if where == "in the headers":
            wire.send(b"HTTP/1.1 200 OK\r\nX: ")
        elif where != "before the headers":
            wire.start_events()
            if where == "in an event":
                wire.send(b"20\r\ndata: ")
        is_there.set()
        wire.wait_for_hang_up()

    certificate = Path(__file__).with_name("tls_localhost.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with ScriptedServer(handler, context=context if tls else None) as server:
        url = f"https://localhost:{server.port}" if tls else server.url
        transport, call = connect(url, ca_file=str(certificate)), Call()
        errors: list[UpstreamError] = []
        reader = threading.Thread(target=lambda: errors.append(failure(lambda: read_all(transport, call))))
        reader.start()
        assert is_there.wait(10)
        time.sleep(0.02)  # so that it blocks, most likely; the outcome does not depend on it
        call.abort()
        reader.join(10)
        assert not reader.is_alive()
        assert "aborted" in str(errors[0])
        server.wait_for(lambda s: s.num_open == 0)


def test_abort_before_the_call_and_after_it_hurts_nobody(connect: Open) -> None:
    with ScriptedServer(lambda asked, wire: wire.events("x")) as server:
        transport = connect(server.url)
        early = Call()
        early.abort()
        assert "aborted" in str(failure(lambda: read_all(transport, early)))
        assert server.asked == []
        for _ in range(20):
            late = Call()
            assert read_all(transport, late) == b"data: x\n\n"
            late.abort()  # its connection is another's by now, or nobody's
        assert server.num_connections == 1


def test_abort_wakes_a_pause() -> None:
    call = Call()
    threading.Timer(0.05, call.abort).start()
    call.sleep(60)
    assert call.is_aborted


def test_calls_from_many_threads_do_not_mix(connect: Open) -> None:
    with ScriptedServer(lambda asked, wire: wire.json(asked.json)) as server:
        transport = connect(server.url)
        wrong: list[Any] = []

        def work(number: int) -> None:
            for i in range(30):
                if transport.post("/x", {"n": number, "i": i}) != {"n": number, "i": i}:
                    wrong.append((number, i))

        threads = [threading.Thread(target=work, args=[n]) for n in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong
        assert server.num_connections <= 8
        wait_until(lambda: len(server.asked) == 240)
        assert json.loads(server.asked[0].body)["i"] == 0
