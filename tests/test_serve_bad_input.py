"""Bad input over raw sockets: each gets a 4xx in OpenAI's shape or a closed connection, and nobody else notices.

A witness asks for the same seeded answers all the while: they stay the same to the token.
"""

from __future__ import annotations

import gc
import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from http_support import PATIENCE, wait_until
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm_server.keys import Keys
from nanovllm_server.options import ServerOptions
from serve_support import Served, Witness, serving, witnessing

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
POSTS = (CHAT, TEXT, "/v1/chat", "/v1/chat/stream", "/v1/tokenize", "/v1/detokenize")
GETS = ("/v1/models", "/healthz", "/metrics", "/openapi.json", "/v1/engine/live")
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "temperature": 0}
CLOSED = 0  # instead of a status: no answer, the connection is closed
KEY = "a-key-of-the-tests"


def raw(
    body: bytes = b"",
    *headers: str,
    method: str = "POST",
    target: str = CHAT,
    version: str = "1.1",
    length: bool = True,
) -> bytes:
    """One request, byte for byte; headers given replace those that it would have."""
    own = ["Host: localhost", "Connection: close"]
    if body or method == "POST":
        own += ["Content-Type: application/json"] + [f"Content-Length: {len(body)}"] * length
    given = {header.partition(":")[0].lower() for header in headers}
    lines = [
        f"{method} {target} HTTP/{version}",
        *(h for h in own if h.partition(":")[0].lower() not in given),
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(body: bytes, *headers: str, size: int = 1, end: bytes = b"0\r\n\r\n", **options: Any) -> bytes:
    head = raw(b"", "Transfer-Encoding: chunked", *headers, length=False, **options)
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + end


def get(target: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return raw(b"", *headers, method=method, target=target, version=version)


def send(server: Served, data: bytes) -> tuple[int, bytes]:
    """The status and the body of the first answer, or CLOSED; whatever follows until the connection ends is read."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
        with suppress(OSError):  # the server need not read to the end
            sock.sendall(data)
        response = http.client.HTTPResponse(sock, method=data.partition(b" ")[0].decode("latin-1"))
        try:
            response.begin()
        except (http.client.BadStatusLine, ConnectionResetError):
            return CLOSED, b""
        return response.status, response.read()


def check_refused(status: int, body: bytes, wanted: int) -> None:
    assert status == wanted, body
    if status == CLOSED:
        return
    assert 400 <= status < 500
    error = json.loads(body)["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(error["message"]) < 1000, "an error repeats what was sent"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with serving(MockRunner(script=Script(delay=0.001))) as server:
        yield server


@pytest.fixture(scope="module")
def witness(server: Served) -> Iterator[Witness]:
    with witnessing(server) as witness:
        yield witness


# ------------------------------------------------------------------------------------------ bad bodies

WELL = json.dumps(HI).encode()
BODIES: dict[str, bytes] = {
    "nothing": b"",
    "100,000 brackets": b"[" * 100_000,
    "100,000 brackets that close": b"[" * 100_000 + b"]" * 100_000,
    "100,000 braces": b'{"messages":' * 100_000,
    "100,000 brackets in a field": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a number of a million digits": b'{"max_tokens": ' + b"9" * 1_000_000 + b"}",
    "NaN": b'{"messages": [], "temperature": NaN}',
    "Infinity": b'{"messages": [], "temperature": Infinity}',
    "-Infinity": b'{"messages": [], "temperature": -Infinity}',
    "1e400": b'{"messages": [], "temperature": 1e400}',
    "-1e400": b'{"messages": [], "top_p": -1e400}',
    "a lone surrogate in a text": WELL.replace(b'"hi"', rb'"\ud83d"'),
    "surrogates the wrong way round": WELL.replace(b'"hi"', rb'"\ude00\ud83d"'),
    "a lone surrogate in a name": b'{"\\udfff": 1}',
    "a surrogate as bytes": WELL.replace(b"hi", b"\xed\xa0\x80"),
    "bytes that are no UTF-8": WELL.replace(b"hi", b"\xff\xfe"),
    "an overlong character": WELL.replace(b"hi", b"\xc0\xaf"),
    "UTF-16": json.dumps(HI).encode("utf-16"),
    "UTF-16 with a lone surrogate": json.dumps(HI).replace("hi", "\\ud800").encode("utf-16-le"),
    "UTF-32": json.dumps(HI).encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + WELL,
    "a key twice": WELL.replace(b'"max_tokens": 2', b'"max_tokens": 2, "max_tokens": 3'),
    "a key twice inside": WELL.replace(b'"role": "user"', b'"role": "user", "role": "system"'),
    "a key twice, once escaped": WELL.replace(b'"max_tokens": 2', b'"max_tokens": 2, "max\\u005ftokens": 3'),
    "a list": b"[]",
    "null": b"null",
    "a text": b'"hi"',
    "a number": b"1",
    "two objects": b"{}{}",
    "an end too early": WELL[:-1],
    "a remark": b"{} // hi",
    "a trailing comma": b'{"messages": [],}',
    "control characters in a text": b'{"model": "\x00"}',
    "a form": b"messages=hi",
    "YAML": b"messages: [hi]",
    "a field that nobody has": b'{"__proto__": {"n": 1}}',
    "a gzip file": b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused_on_every_route(server: Served, witness: Witness, name: str) -> None:
    with witness.undisturbed():
        for target in POSTS:
            check_refused(*send(server, raw(BODIES[name], target=target)), wanted=400)


TYPES = [
    "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "json",
    "", "application/json-patch+json", "text/json", "application/octet-stream", "application/json/", "*/*",
]  # fmt: skip


@pytest.mark.parametrize("content_type", TYPES)
def test_a_body_of_another_type_is_refused(server: Served, witness: Witness, content_type: str) -> None:
    with witness.undisturbed():
        for target in POSTS:
            check_refused(*send(server, raw(WELL, f"Content-Type: {content_type}", target=target)), wanted=415)


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON ; charset=utf-8"])
def test_the_right_type_is_taken_as_it_is_written(server: Served, content_type: str) -> None:
    assert send(server, raw(WELL, f"Content-Type: {content_type}"))[0] == 200


# ----------------------------------------------------------------------------------------- bad framing


def test_chunks_of_one_byte_are_a_body_like_any_other(server: Served, witness: Witness) -> None:
    whole = json.loads(send(server, raw(WELL))[1])
    with witness.undisturbed():
        status, body = send(server, chunked(WELL))
    assert (status, json.loads(body)["choices"]) == (200, whole["choices"])


FRAMES: dict[str, tuple[bytes, int]] = {
    "a chunk without a size": (chunked(b"", end=b"zz\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk of a negative size": (chunked(b"", end=b"-1\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk larger than memory": (chunked(b"", end=b"fffffffffffffffffffff\r\n"), 400),
    "a chunk longer than its size": (chunked(b"", end=b"1\r\n{}\r\n0\r\n\r\n"), 400),
    "a chunk with 100,000 bytes of extension": (chunked(b"", end=b"2;" + b"x" * 100_000 + b"\r\n{}\r\n0\r\n\r\n"), 400),
    "100,000 bytes of trailers": (chunked(b"{}", end=b"0\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"), 400),
    "too much in small chunks": (chunked(b" " * 40_000, target=TEXT), 413),
    "too much at once": (raw(b" " * 40_000), 413),
    "too much, as announced": (raw(b"", "Content-Length: 9999999999"), 413),
    "a length that is none": (raw(b"", "Content-Length: five"), 400),
    "a negative length": (raw(b"", "Content-Length: -1"), 400),
    "a length with a sign": (raw(b"", "Content-Length: +2") + b"{}", 400),
    "a length of many digits": (raw(b"", "Content-Length: " + "9" * 40), 400),
    "two lengths": (raw(WELL, "Content-Length: 3", f"Content-Length: {len(WELL)}"), 400),
    "two lengths in one": (raw(WELL, f"Content-Length: 3, {len(WELL)}"), 400),
    "a length and chunks": (chunked(WELL, "Content-Length: 3"), 400),
    "an unknown coding": (raw(WELL, "Transfer-Encoding: gzip, chunked", length=False), 400),
    "chunks in HTTP/1.0": (chunked(WELL, version="1.0"), 400),
    "half a body, and then nothing": (raw(WELL[:5], f"Content-Length: {len(WELL)}"), 408),
}


@pytest.fixture(scope="module")
def small() -> Iterator[Served]:
    """A server that takes little and waits for nobody."""
    options = ServerOptions(max_body_bytes=20_000, max_header_bytes=4096, head_seconds=0.3, body_seconds=0.3)
    with serving(MockRunner(script=Script(delay=0.001)), options=options) as server:
        yield server


@pytest.fixture(scope="module")
def small_witness(small: Served) -> Iterator[Witness]:
    with witnessing(small) as witness:
        yield witness


@pytest.mark.parametrize("name", FRAMES)
def test_a_body_that_does_not_say_where_it_ends_is_refused(small: Served, small_witness: Witness, name: str) -> None:
    data, wanted = FRAMES[name]
    with small_witness.undisturbed():
        check_refused(*send(small, data), wanted=wanted)


# ------------------------------------------------------------------------------------------- bad heads

HEADS: dict[str, tuple[bytes, int]] = {
    "a header of 100,000 bytes": (get("/livez", "X: " + "a" * 100_000), 431),
    "a name of 100,000 bytes": (get("/livez", "a" * 100_000 + ": x"), 431),
    "10,000 headers": (get("/livez", *["X: y"] * 10_000), 431),
    "a target of 100,000 bytes": (get("/livez?" + "a" * 100_000), 431),
    "a method of 100,000 bytes": (get("/livez", method="G" * 100_000), 431),
    "a head that never ends": (b"GET /livez HTTP/1.1\r\nX: " + b"a" * 300_000, 431),
    "a header without a colon": (get("/livez", "nonsense"), 400),
    "a header without a name": (get("/livez", ": x"), 400),
    "a space before the colon": (get("/livez", "X : y"), 400),
    "a zero byte in a header": (get("/livez", "X: a\0b"), 400),
    "a zero byte in the target": (get("/liv\0ez"), 400),
    "a bare line end in a header": (get("/livez", "X: a\rb"), 400),
    "bytes outside of ASCII in the target": (get("/\xff\xfe"), 400),
    "a space in the target": (get("/livez x"), 400),
    "two hosts": (get("/v1/models", "Host: localhost", "Host: localhost"), 400),
    "no host": (b"GET /livez HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    "two types": (raw(WELL, "Content-Type: application/json", "Content-Type: text/plain"), 400),
    "two keys": (get("/v1/models", "Authorization: Bearer x", "Authorization: Bearer y"), 400),
    "HTTP/0.9": (b"GET /livez\r\n\r\n", 400),
    "HTTP/1.2": (get("/nowhere", version="1.2"), 404),
    "HTTP/2": (get("/nowhere", version="2.0"), 404),
    "HTTP/3 and more": (get("/nowhere", version="99.99"), 400),
    "HTTP/2's first words": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 404),
    "a TLS greeting": (bytes.fromhex("1603010200010001fc0303") + bytes(64) + b"\r\n\r\n", 400),
    "an answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 400),
    "nothing but line ends": (b"\r\n" * 50_000, 400),
    "noise": (bytes(range(256)) * 400 + b"\r\n\r\n", 400),
    "an upgrade to a WebSocket": (
        get(CHAT, "Upgrade: websocket", "Connection: Upgrade, close", "Sec-WebSocket-Version: 13"),
        405,
    ),
    "an upgrade to HTTP/2": (
        get(CHAT, "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings, close", "HTTP2-Settings: AAMAAABkAAQAAP__"),
        405,
    ),
    "a tunnel": (get("localhost:22", method="CONNECT"), 404),
    "a proxy's request": (get("http://example.com/v1/models"), 404),
    "a proxy's request to itself": (get("http://localhost/v1/models"), 404),
    "a host that steers the path": (get("/nowhere", "Host: localhost/v1/models?"), 403),
    "a host of 2,000 bytes": (get("/v1/models", "Host: " + "a" * 2000), 403),
    "a path up and out": (get("/static/../../../etc/passwd"), 404),
    "a path up and out, escaped": (get("/static/%2e%2e/%2e%2e/etc/passwd"), 404),
    "two slashes": (get("//v1/models"), 404),
    "a slash behind": (get("/v1/models/"), 404),
    "capitals": (get("/V1/MODELS"), 404),
    "a zero byte, escaped": (get("/v1/models%00"), 404),
    "half an escape": (get("/v1/models%"), 404),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_no_request_is_refused(small: Served, small_witness: Witness, name: str) -> None:
    data, wanted = HEADS[name]
    with small_witness.undisturbed():
        check_refused(*send(small, data), wanted=wanted)


@pytest.mark.parametrize("method", ["OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "BREW", "get", "post"])
def test_methods_that_a_route_has_not_are_refused(server: Served, method: str) -> None:
    for target in (*POSTS, *GETS):
        status, body = send(server, get(target, method=method))
        check_refused(status, body, wanted=405)


def test_HEAD_has_no_body_and_never_generates(server: Served) -> None:
    before = server.llm.stats().num_requests
    assert [send(server, get(target, method="HEAD")) for target in POSTS] == [(405, b"")] * len(POSTS)
    assert [send(server, get(target, method="HEAD")) for target in ("/livez", "/v1/models")] == [(200, b"")] * 2
    assert server.llm.stats().num_requests - before <= 1  # the witness's, if it is about


def test_HTTP_1_0_is_served_and_its_stream_ends_with_the_connection(server: Served) -> None:
    status, body = send(server, raw(json.dumps({**HI, "stream": True}).encode(), version="1.0"))
    assert status == 200
    assert body.endswith(b"data: [DONE]\n\n")
    assert send(server, b"GET /livez HTTP/1.0\r\n\r\n")[0] == 200


def test_a_connection_serves_on_after_an_error(server: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    for body, wanted in ((b"[]", 400), (WELL, 200), (b"\xff", 400), (b"{", 400), (WELL, 200)):
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (wanted, True)
    connection.close()


# ------------------------------------------------------------------------------------------------ slow


@pytest.mark.parametrize(
    ("begun", "wanted"),
    [
        (b"", CLOSED),
        (b"GET /livez HT", CLOSED),
        (b"GET /livez HTTP/1.1\r\nHost: localhost\r\n", CLOSED),
        (raw(b"", f"Content-Length: {len(WELL)}"), 408),
        (chunked(b"", end=b""), 408),
    ],
    ids=["nothing", "half a line", "half a head", "no body", "no chunk"],
)
def test_who_never_ends_a_request_is_sent_away(
    small: Served, small_witness: Witness, begun: bytes, wanted: int
) -> None:
    """A byte now and then does not help."""
    drip = b"1\r\n \r\n" if b"chunked" in begun else b" " if wanted else b"X: y\r\n" if b"\r\n" in begun else b"a"
    with (
        small_witness.undisturbed(),
        socket.create_connection(("127.0.0.1", small.port), timeout=PATIENCE) as sock,
    ):
        sock.sendall(begun)
        sock.settimeout(0.05)
        answer = b""
        with suppress(ConnectionError):
            while True:
                try:
                    data = sock.recv(4096)
                except TimeoutError:
                    sock.sendall(drip if begun else b"")
                    continue
                if not data:
                    break
                answer += data
    assert (int(answer.split()[1]) if answer else CLOSED) == wanted


# ---------------------------------------------------------------------------------------- without a key

STEERED = [
    get("/v1/models", "Host: localhost/livez?"),
    get("/v1/models", "Host: localhost/livez#"),
    get("/v1/models", "Host: /livez"),
    get("/v1/models", "Host: localhost:80@x/livez"),
    get("/v1/models", "X-Forwarded-Host: localhost/livez?", "X-Forwarded-Prefix: /livez", "X-Original-URL: /livez"),
    get("/v1/models", "X-HTTP-Method-Override: GET", "X-Rewrite-URL: /livez", "Forwarded: host=localhost"),
    get("http://localhost/livez/../v1/models"),
    get("http://localhost/livez"),
    get("http:///livez"),
    get("//livez"),
    get("//v1/models"),
    get("///v1/models"),
    get("/livez/"),
    get("/livez/../v1/models"),
    get("/livez/..%2fv1%2fmodels"),
    get("/livez%2f..%2fv1/models"),
    get("/livez;/../v1/models"),
    get("/livez%00/v1/models"),
    get("/livez%0a"),
    get("/livez%20"),
    get("/LIVEZ"),
    get("/Livez"),
    get("/V1/Models"),
    get("/v1/models/"),
    get("/v1/models?/livez"),
    get("/v1/models%3f/livez"),
    get("/v1//models"),
    get("/./v1/models"),
    get("/%76%31/models"),
    get("/static/"),
    get("/static/../v1/models"),
    get("/nowhere"),
    get("*"),
    get("/v1/models", method="HEAD"),
    get("/v1/models", method="OPTIONS"),
    get("/v1/models", "Upgrade: websocket", "Connection: Upgrade, close", "Sec-WebSocket-Version: 13"),
    raw(WELL, "Upgrade: websocket", "Connection: Upgrade, close"),
    get("/v1/models", version="1.0"),
    raw(WELL),
    raw(WELL, target="/livez/../v1/chat"),
    raw(b"[" * 100_000),
]
WRONG_KEYS = [
    "Bearer",
    "Bearer ",
    "Bearer x",
    f"Bearer {KEY[:-1]}",
    f"Bearer {KEY}x",
    f"Bearer {KEY.upper()}",
    f"Bearer {KEY},{KEY}",
    f"Bearer Bearer {KEY}",
    f"Basic {KEY}",
    KEY,
    f"Bearer \xff{KEY}",
    "Bearer " + "a" * 8000,
    f"Bearer\x0b{KEY}",
]


@pytest.fixture(scope="module")
def gated() -> Iterator[Served]:
    with serving(keys=Keys([KEY])) as server:
        yield server


@pytest.mark.parametrize("data", STEERED, ids=lambda data: data[:60].decode("latin-1").partition("\r\n")[0])
def test_no_way_of_writing_a_request_gets_past_the_gate(gated: Served, data: bytes) -> None:
    status, body = send(gated, data)
    assert status in (400, 401), body
    if not data.startswith(b"HEAD"):
        check_refused(status, body, wanted=status)
    assert b"max_model_len" not in body


@pytest.mark.parametrize("given", WRONG_KEYS)
def test_what_is_nearly_a_key_is_none(gated: Served, given: str) -> None:
    status, body = send(gated, get("/v1/models", f"Authorization: {given}"))
    check_refused(status, body, wanted=status)
    assert status in (400, 401)
    assert KEY not in body.decode()


def test_no_route_but_the_open_ones_answers_without_a_key(gated: Served) -> None:
    paths = json.loads(send(gated, get("/openapi.json", f"Authorization: Bearer {KEY}"))[1])["paths"]
    assert len(paths) > 10
    for path, operations in paths.items():
        for method, operation in operations.items():
            status, _ = send(gated, get(path.replace("{name}", "x"), method=method.upper()))
            assert (status == 401) == ("security" in operation), path


# ------------------------------------------------------------------------------------------- and flat


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads what Linux says of a process")
def test_bad_input_leaves_nothing_behind() -> None:
    """No file, no task, no thread; and no memory that grows."""
    options = ServerOptions(max_body_bytes=300_000, max_header_bytes=4096, head_seconds=0.3, body_seconds=0.3)
    rows = [raw(body) for body in BODIES.values()]
    rows += [data for data, wanted in (*FRAMES.values(), *HEADS.values()) if wanted != 408]
    with serving(options=options) as server:

        def storm(times: int) -> None:
            for _ in range(times):
                for data in rows:
                    assert 400 <= (send(server, data)[0] or 400) < 500
            gc.collect()

        storm(2)
        before = (num_fds(), threading.active_count(), resident())
        storm(8)
        wait_until(lambda: num_fds() <= before[0])
        assert threading.active_count() <= before[1]
        assert resident() - before[2] < 8 << 20
        assert server.post(CHAT, HI)[0] == 200
        assert server.llm.stats().num_requests == 1
