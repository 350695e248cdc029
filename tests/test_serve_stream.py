"""Streams of `nanovllm serve`: when events come, and what becomes of a call whose client or runner goes away."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from http_support import PATIENCE, wait_until
from nanovllm.aio import AsyncLLM
from nanovllm.batch import Batch, SeqOutput
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import RunnerDead
from nanovllm_server.options import ServerOptions
from serve_support import Served, serving

PROMPT = {"prompt": "hello", "ignore_eos": True, "temperature": 0}
PATHS = ["/v1/completions", "/v1/chat/completions"]


def body(path: str, **fields: Any) -> dict[str, Any]:
    prompt = {"prompt": "hello"} if path == PATHS[0] else {"messages": [{"role": "user", "content": "hello"}]}
    return {**prompt, "ignore_eos": True, "temperature": 0, **fields}


class Stepped(MockRunner):
    """Makes the steps that it is allowed to make, one by one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.num_steps = 0
        self._allowed = threading.Semaphore(0)

    def allow(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self._allowed.release()

    def execute(self, batch: Batch) -> list[SeqOutput]:
        assert self._allowed.acquire(timeout=PATIENCE), "nobody allowed this step"
        self.num_steps += 1
        return super().execute(batch)

    def close(self) -> None:
        self.allow(1000)
        super().close()


class Reader:
    """A client that reads a stream as it comes."""

    def __init__(self, server: Served, path: str, fields: dict[str, Any]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        raw = json.dumps(fields).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
        )
        self.socket.sendall(head.encode() + b"\r\n\r\n" + raw)
        self.received = b""

    def read_until(self, wanted: bytes, times: int = 1) -> None:
        while self.received.count(wanted) < times:
            data = self.socket.recv(65536)
            assert data, self.received
            self.received += data

    def read_to_the_end(self) -> bytes:
        """Until the connection is closed."""
        while data := self.socket.recv(65536):
            self.received += data
        return self.received

    @property
    def events(self) -> list[Any]:
        """Those that are there, as JSON."""
        parts = self.received.partition(b"\r\n\r\n")[2].split(b"data: ")[1:]
        return [json.loads(part.partition(b"\n\n")[0]) for part in parts if not part.startswith(b"[DONE]")]


@contextmanager
def reading(server: Served, path: str = PATHS[0], **fields: Any) -> Iterator[Reader]:
    reader = Reader(server, path, body(path, **fields))
    try:
        yield reader
    finally:
        reader.socket.close()


def is_idle(server: Served) -> bool:
    scheduler = server.llm.engine.scheduler
    return not scheduler.running and not scheduler.waiting


def check_blocks(server: Served) -> None:
    """The engine rests, and holds no block."""
    manager = server.llm.engine.scheduler.manager
    assert manager is not None
    manager.check([])
    assert manager.num_used == 0


# -------------------------------------------------------------------------------------- when events come


@pytest.mark.parametrize("path", PATHS)
def test_each_token_is_there_before_the_next_is_computed(path: str) -> None:
    runner = Stepped()
    with serving(runner) as server, reading(server, path, max_tokens=4, stream=True) as reader:
        for step in range(1, 5):
            runner.allow()
            reader.read_until(b'"finish_reason"', step)
            assert (len(reader.events), runner.num_steps) == (step, step)
        reader.read_until(b"[DONE]")


def test_a_step_of_several_answers_is_one_write() -> None:
    runner = Stepped()
    with serving(runner) as server, reading(server, max_tokens=3, stream=True, n=3) as reader:
        runner.allow(2)  # the first draws the leader's token, the second its siblings'
        reader.read_until(b'"index": 2')
        runner.allow()
        before = len(reader.events)
        data = reader.socket.recv(65536)
        assert data.count(b'"finish_reason"') >= 2
        assert data.count(b"\r\n") == 2, "one chunk"
        runner.allow(10)
        reader.read_until(b"[DONE]")
        assert before < len(reader.events)


def test_silence_is_filled_with_comments_that_clients_skip() -> None:
    runner = Stepped()
    options = ServerOptions(keep_alive_seconds=0.05)
    with serving(runner, options=options) as server, reading(server, max_tokens=2, stream=True) as reader:
        reader.read_until(b": keep-alive\n\n", 2)
        runner.allow()
        reader.read_until(b'"finish_reason"')
        reader.read_until(b": keep-alive\n\n", 4)
        runner.allow()
        reader.read_until(b"[DONE]")
        assert "".join(e["choices"][0]["text"] for e in reader.events)
    with serving(options=options) as server, server.client() as client:
        stream = client.completions.create(model="model", max_tokens=3, stream=True, prompt="hello", temperature=0)
        assert sum(len(event.choices) for event in stream) >= 1


# -------------------------------------------------------------------------------------- clients that go


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_before", [0, 1, 3])
def test_a_client_that_goes_has_its_blocks_back_within_two_steps(path: str, stream: bool, num_before: int) -> None:
    runner = Stepped()
    with serving(runner) as server:
        with reading(server, path, max_tokens=1000, stream=stream, n=2) as reader:
            wait_until(lambda: bool(server.llm.engine.scheduler.has_work))
            runner.allow(num_before)
            wait_until(lambda: runner.num_steps == num_before)
            if stream and num_before:
                reader.read_until(b"data: ")
        wait_until(lambda: server.state.admission.num_calls == 0)
        runner.allow(2)
        wait_until(lambda: is_idle(server))
        assert runner.num_steps <= num_before + 2
        check_blocks(server)


def test_the_others_go_on_token_by_token_when_one_goes() -> None:
    with serving(max_num_seqs=4) as server:
        _, alone = server.post("/v1/completions", {**PROMPT, "max_tokens": 200})
    runner = Stepped()
    with serving(runner, max_num_seqs=4) as server:
        with reading(server, max_tokens=200, stream=True) as stays:
            with reading(server, max_tokens=200, stream=True) as goes:
                wait_until(lambda: server.state.admission.num_calls == 2)
                runner.allow(20)
                goes.read_until(b"data: ")
            wait_until(lambda: server.state.admission.num_calls == 1)
            runner.allow(1000)
            stays.read_until(b"[DONE]")
            text = "".join(choice["text"] for event in stays.events for choice in event["choices"])
        assert text == alone["choices"][0]["text"]
        wait_until(lambda: is_idle(server))
        check_blocks(server)


def test_a_reader_that_takes_nothing_is_cut_off_and_the_others_do_not_wait() -> None:
    """Its socket is full soon: the answer has 40 answers in it, each with its 20 most likely tokens."""
    options = ServerOptions(reader_seconds=0.2)
    with serving(options=options, max_num_seqs=64) as server:
        with reading(server, max_tokens=4000, stream=True, n=40, logprobs=20) as stuck:
            stuck.read_until(b"data: ")
            status, _ = server.post("/v1/completions", {**PROMPT, "max_tokens": 20})
            assert status == 200
            wait_until(lambda: server.state.admission.num_calls == 0)
            assert b"[DONE]" not in stuck.read_to_the_end()
        wait_until(lambda: is_idle(server))
        check_blocks(server)


# ---------------------------------------------------------------------------------- failures and ends


@pytest.mark.parametrize("path", PATHS)
def test_what_fails_before_the_first_token_has_a_status(path: str) -> None:
    with serving(MockRunner(script=Script(fail_steps=[1]))) as server:
        status, answer = server.post(path, body(path, stream=True))
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (500, "server_error", "generation_failed")
        assert "script" not in answer["error"]["message"], "what the runner says is for the log"
        assert server.post(path, body(path))[0] == 200, "the engine goes on"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("step", [2, 3, 5])
def test_what_fails_later_is_the_streams_last_event(path: str, step: int) -> None:
    with serving(MockRunner(script=Script(fail_steps=[step], delay=0.05))) as server:
        *before, last = server.events(path, body(path, max_tokens=20))
        assert last["error"]["code"] == "generation_failed"
        assert len(before) == step - 1
        assert all("choices" in event for event in before)
        check_blocks(server)
    with serving(MockRunner(script=Script(fail_steps=[step]))) as server:
        status, answer = server.post(path, body(path, max_tokens=20))
        assert (status, answer["error"]["code"]) == (500, "generation_failed")


def test_a_dead_engine_is_said_to_be_dead() -> None:
    class Dies(MockRunner):
        def execute(self, batch: Batch) -> list[SeqOutput]:
            raise RunnerDead("gone for good")

    with serving(Dies()) as server:
        assert server.post("/v1/completions", PROMPT)[0] == 500
        status, answer = server.post("/v1/completions", PROMPT)
        assert (status, answer["error"]["code"]) == (503, "engine_dead")


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_closes_says_so_to_everybody(stream: bool) -> None:
    runner = Stepped()
    with serving(runner) as server, reading(server, max_tokens=100, stream=stream) as reader:
        runner.allow(2)
        wait_until(lambda: runner.num_steps == 2)
        if stream:
            reader.read_until(b"data: ")
        closing = threading.Thread(target=lambda: asyncio.run(server.llm.close()))
        closing.start()
        wait_until(lambda: server.llm._is_closing)
        runner.allow(3)
        reader.read_until(b"shutting_down")
        closing.join(PATIENCE)
        assert b"[DONE]" not in reader.received
        assert (b"200 OK" in reader.received) == stream
        assert (b"503 Service Unavailable" in reader.received) != stream


def test_nothing_is_accepted_unless_every_prompt_is_good() -> None:
    with serving() as server:
        status, answer = server.post("/v1/completions", {"prompt": [[5, 6], [7], [125]]})
        assert (status, "125" in answer["error"]["message"]) == (400, True)
        assert server.llm.stats().num_requests == 0


def test_calls_leave_no_inbox_behind() -> None:
    llm = AsyncLLM.from_components(MockRunner(), SimpleBPETokenizer())
    with serving(llm=llm) as server:
        for _ in range(20):
            with reading(server, max_tokens=3000, stream=True) as reader:
                reader.read_until(b"data: ")
            server.post("/v1/completions", {**PROMPT, "max_tokens": 2})
        wait_until(lambda: server.state.admission.num_calls == 0)
        assert not llm._mail, "every inbox is gone"
        wait_until(lambda: is_idle(server))
        check_blocks(server)


# --------------------------------------------------------------------------------- at every point of it


def test_a_client_may_go_at_any_byte_of_its_request_or_answer() -> None:
    """Closed with a reset, so that the server notices by what it writes, too."""
    with serving(MockRunner(script=Script(delay=0.001)), max_num_seqs=32) as server:
        raw = json.dumps(body(PATHS[0], max_tokens=4, stream=True)).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}X-Request-ID: x\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw

        def exchange(num_sent: int, num_read: int) -> bytes:
            with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock:
                sock.sendall(request[:num_sent])
                received = b""
                while len(received) < num_read and not received.endswith(b"\r\n0\r\n\r\n"):
                    received += sock.recv(min(65536, num_read - len(received)))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return received

        whole = exchange(len(request), 1 << 20)
        assert whole.endswith(b"[DONE]\n\n\r\n0\r\n\r\n")
        for num_sent in range(len(request)):
            exchange(num_sent, 0)
        for num_read in range(0, len(whole), 3):
            got = exchange(len(request), num_read)
            assert len(got) == num_read or got.endswith(b"\r\n0\r\n\r\n")  # shorter where two steps were one event
        wait_until(lambda: server.state.admission.num_calls == 0 and is_idle(server))
        check_blocks(server)
        assert not server.llm._mail
        again = exchange(len(request), 1 << 20)
        text = re.compile(rb'"text": "([^"]*)"')
        assert b"".join(text.findall(again)) == b"".join(text.findall(whole))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["fail_steps", "nan_steps", "short_steps"])
def test_the_runner_may_fail_at_any_step(stream: bool, fault: str) -> None:
    """Everybody gets an answer: the whole one before, a status or a last event with the error at it."""
    for step in range(1, 6):
        script = Script(delay=0.01, **{fault: [step]})
        with serving(MockRunner(script=script)) as server, reading(server, max_tokens=4, stream=stream) as reader:
            reader.read_until(b"[DONE]" if step > 4 and stream else b"finish_reason" if step > 4 else b"error")
            if not stream:
                assert (b"200 OK" in reader.received) == (step > 4)
            elif step <= 4:
                assert b"[DONE]" not in reader.received
                assert (b"200 OK" in reader.received) == (step > 1)
            wait_until(lambda: is_idle(server))
            check_blocks(server)
            if step <= 4:
                assert server.post(PATHS[0], body(PATHS[0]))[0] == 200, "the engine goes on"
