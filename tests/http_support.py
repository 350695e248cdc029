"""What the HTTP runner's tests share: a server on a real socket that does what a test tells it, byte by byte."""

from __future__ import annotations

import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from nanovllm.batch import ALL_PARAMETERS, ScheduledSeq, TokenLogprob
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm.request import Finish
from nanovllm_runner_http.completion import CompletionRunner
from nanovllm_runner_http.dialects import Exchange, Facts, Piece, upstream_seed
from nanovllm_runner_http.errors import UpstreamError
from nanovllm_runner_http.options import HttpOptions
from nanovllm_runner_http.servers import Servers
from nanovllm_runner_http.sse import Event
from nanovllm_runner_http.transport import Transport

PATIENCE = 10.0  # seconds for what must happen; only a test that fails waits that long


@dataclass(frozen=True, slots=True)
class Asked:
    """One request as the server got it."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """One connection, as its handler sees it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.file = sock.makefile("rb")
        self.is_over = False  # the handler ended the connection

    def send(self, *parts: bytes) -> None:
        """Each part in a packet of its own."""
        for part in parts:
            self.sock.sendall(part)

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.raw(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def raw(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        lines = {"Content-Length": str(len(body)), **(headers or {})}
        self.send(b"HTTP/1.1 %d Said\r\n" % status + _header_lines(lines) + body)

    def start_events(self, content_type: str = "text/event-stream") -> None:
        lines = {"Content-Type": content_type, "Transfer-Encoding": "chunked"}
        self.send(b"HTTP/1.1 200 OK\r\n" + _header_lines(lines))

    def event(self, value: Any) -> None:
        """One `data:` event; a text as it is, anything else as JSON."""
        self.chunk(f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.send(b"%x\r\n" % len(data) + data + b"\r\n")

    def end_events(self) -> None:
        self.send(b"0\r\n\r\n")

    def events(self, *values: Any) -> None:
        """A whole stream."""
        self.start_events()
        for value in values:
            self.event(value)
        self.end_events()

    def close(self) -> None:
        self.is_over = True

    def reset(self) -> None:
        """End the connection as a killed process does: the other side gets ECONNRESET."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.is_over = True

    def wait_for_hang_up(self) -> None:
        """Return when the client has closed its side."""
        self.sock.settimeout(PATIENCE)
        with suppress(ConnectionError):
            assert self.sock.recv(1) == b"", "the client sent something where it should hang up"
        self.is_over = True


Handler = Callable[[Asked, Wire], None]


class ScriptedServer:
    """Answers each request by calling `handler`, in a thread per connection. A context manager.

    What a handler raises fails the test when the server is left.
    """

    def __init__(self, handler: Handler, *, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        self.handler = handler
        self._context = context
        self.asked: list[Asked] = []
        self.num_connections = 0  # ever taken
        self._open: dict[threading.Thread, socket.socket] = {}
        self._failures: list[BaseException] = []
        self._is_closing = False
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, name="scripted-server", daemon=True)
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Connections that neither side has ended."""
        return len(self._open)

    def wait_for(self, condition: Callable[[ScriptedServer], bool]) -> None:
        wait_until(lambda: condition(self))

    def close(self) -> None:
        """Vanish: nothing listens any more, and open connections are cut."""
        self._is_closing = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._listener.close()
        self._thread.join(PATIENCE)
        for thread, sock in list(self._open.items()):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a handler of the scripted server hangs"

    def __enter__(self) -> ScriptedServer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()
        if self._failures and kind is None:
            raise self._failures[0]

    def _accept(self) -> None:
        while not self._is_closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.num_connections += 1
            thread = threading.Thread(target=self._serve, args=[sock], name="scripted-connection", daemon=True)
            self._open[thread] = sock
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        if self._context is not None:
            try:
                sock = self._context.wrap_socket(sock, server_side=True)
                self._open[threading.current_thread()] = sock
            except OSError:  # the client does not trust us
                sock.close()
                del self._open[threading.current_thread()]
                return
        wire = Wire(sock)
        try:
            while not wire.is_over and (asked := _read(wire)) is not None:
                self.asked.append(asked)
                self.handler(asked, wire)
        except OSError:
            pass  # the client went away, or `close` cut the line
        except BaseException as e:
            self._failures.append(e)
        finally:
            wire.file.close()
            sock.close()
            del self._open[threading.current_thread()]


def _read(wire: Wire) -> Asked | None:
    line = wire.file.readline().decode("latin-1")
    if not line:
        return None
    method, path, _ = line.split()
    headers = {}
    while (line := wire.file.readline().decode("latin-1").strip()) != "":
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Asked(method, path, headers, wire.file.read(int(headers.get("content-length", 0))))


def _header_lines(headers: Mapping[str, str]) -> bytes:
    return "".join(f"{k}: {v}\r\n" for k, v in headers.items()).encode("latin-1") + b"\r\n"


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread brings about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


@contextmanager
def nothing_left() -> Iterator[None]:
    """Every thread that begins inside also ends there, soon after."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: all(t in before or not t.is_alive() for t in threading.enumerate()))


def unused_port() -> int:
    """A port where nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


# ------------------------------------------------------------------------------- a dialect for tests


class PlainDialect:
    """As plain as can be: an event is {"ids": [...], "text": ..., "logprobs": [...], "finish": ..., "error": ...}."""

    name = "plain"
    supports = ALL_PARAMETERS
    extra_fields = frozenset({"more"})

    def probe(self, transport: Transport) -> Facts:
        return facts(**transport.get("/facts"))

    def exchange(self, seq: ScheduledSeq, facts: Facts, extra: Mapping[str, Any]) -> Exchange:
        prompt = seq.context.tolist() or seq.prompt
        body = {"prompt": prompt, "seed": upstream_seed(seq.sampling, 2**63), **extra}
        return Exchange("/answer", body, _read_plain)


def _read_plain(event: Event) -> Piece | None:
    if event.data == "[DONE]":
        return None
    try:
        said = json.loads(event.data)
    except ValueError:
        raise UpstreamError("it sent an event that is not JSON") from None
    ids, logprobs = tuple(said.get("ids", ())), said.get("logprobs")
    return Piece(
        ids,
        said.get("text"),
        None
        if logprobs is None
        else tuple(TokenLogprob(i, lp, 1, ((i, lp),)) for i, lp in zip((*ids, 0, 0), logprobs, strict=False)),
        None if said.get("finish") is None else Finish(said["finish"]),
        said.get("error"),
    )


def facts(**values: Any) -> Facts:
    return Facts(**{"dialect": "plain", "vocab_size": 256, "max_model_len": 4096, **values})


def completion_runner(
    urls: str | list[str],
    *,
    tokenizer: Any = None,
    max_num_seqs: int = 32,
    about: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> CompletionRunner:
    """The runner in front of these servers, in the plain dialect; its pauses between attempts take no time."""
    checked = HttpOptions.model_validate({"servers": [urls] if isinstance(urls, str) else urls, **options})
    ctx = Context(
        options=checked, model="far-away", path=None, cache=CacheOptions(), max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048, max_model_len=None, threads=None, tokenizer=tokenizer,
    )  # fmt: skip
    servers = Servers([Transport(url, checked) for url in checked.addresses])
    return CompletionRunner(
        servers, PlainDialect(), facts(**(about or {})), checked, ctx, clock=clock, pause=lambda call, seconds: None
    )
