"""`nanovllm serve` as a process: start, readiness, drain, exit codes; and whatever is killed when, everybody is told.

what                                     the client gets                      the engine
it leaves after byte k of the answer     (it is gone)                         aborts it, its blocks come back
the runner fails in step k               an error: 500, or the last event     goes on; others are not touched
the runner dies in step k                an error: 500, or the last event     is dead; the process ends with 5
SIGTERM while it loads                   503 before, a closed connection      the process ends with 0
SIGTERM while answers run                the whole answer                     drains; 0
SIGTERM, answers longer than the drain   an error: 503, or the last event     aborts them; 0
a second signal                          a closed connection                  the process ends with 128 + n at once
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from http_support import wait_until
from nanovllm.builtin.mock import MockRunner, Script
from serve_support import Served, serving

posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
ASK = {"prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}

# ------------------------------------------------------------------------------- disconnects and failures


def request(port: int, body: dict[str, Any]) -> socket.socket:
    """Sent, and nothing read."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    sock.sendall(head.encode() + b"Content-Type: application/json\r\nConnection: close\r\n\r\n" + data)
    return sock


def read_all(sock: socket.socket) -> bytes:
    """To its end, and close it."""
    answer = b""
    with sock, suppress(ConnectionError):
        while part := sock.recv(65536):
            answer += part
    return answer


def check(served: Served) -> None:
    """Nothing runs, nothing is held, and the engine is sound."""
    engine = served.llm.engine
    wait_until(lambda: not engine.has_work and not served.state.admission.num_calls)
    engine.scheduler.check()
    blocks = engine.kv_blocks()
    assert blocks is not None
    assert blocks.used == 0


def open_files() -> int:
    directory = Path("/proc/self/fd")
    return len(list(directory.iterdir())) if directory.is_dir() else 0


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_after_any_byte_of_its_answer(is_stream: bool) -> None:
    body = {**ASK, "stream": is_stream, "max_tokens": 3}
    with serving() as served:
        served.post("/v1/completions", ASK)
        alone = served.post("/v1/completions", ASK)[1]["choices"]
        whole = read_all(request(served.port, body))
        num_files = open_files()
        step = 1 if is_stream else 7
        for num_bytes in range(0, len(whole) + 1, step):
            with request(served.port, body) as sock:
                left = num_bytes
                while left and (part := sock.recv(left)):
                    left -= len(part)
                if num_bytes % 2:  # a reset; else it closes politely
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            if num_bytes % 50 == 0:
                check(served)
        check(served)
        assert served.post("/v1/completions", ASK)[1]["choices"] == alone
        wait_until(lambda: open_files() <= num_files)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_leaves_a_long_answer_ends_it(is_stream: bool) -> None:
    with serving(MockRunner(script=Script(delay=0.005))) as served:
        sock = request(served.port, {**ASK, "max_tokens": 3000, "stream": is_stream})
        wait_until(lambda: served.llm.stats().num_steps > 3)
        sock.close()
        check(served)
        assert served.llm.stats().num_steps < 2000
        assert served.llm.health().is_ready


class Failing(MockRunner):
    """Fails in one of the steps of sequences that begin with token 9."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        self.num_steps = 0

    def execute(self, batch: Any) -> Any:
        outputs = super().execute(batch)
        for i, seq in enumerate(batch.seqs):
            if seq.context[0] == 9:
                self.num_steps += 1
                if self.num_steps == self.at:
                    outputs[i] = type(outputs[i])(error="a failure that is scripted")
        return outputs


@pytest.mark.parametrize("step", range(1, 8))
@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
def test_a_runner_that_raises_in_any_step(step: int, is_stream: bool) -> None:
    with serving(MockRunner(script=Script(fail_steps=(step,)))) as served:
        answer = read_all(request(served.port, {**ASK, "stream": is_stream}))
        if step > ASK["max_tokens"]:  # it was over
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b"error" not in answer
        else:
            assert error_of(answer, is_stream) == "generation_failed"
        check(served)
        if step > ASK["max_tokens"]:
            assert served.post("/v1/completions", ASK)[0] == 500
        assert served.post("/v1/completions", ASK)[0] == 200


@pytest.mark.parametrize("step", range(1, 7))
def test_a_failure_of_one_sequence_leaves_the_others_alone(step: int) -> None:
    with serving() as served:
        alone = served.post("/v1/completions", {**ASK, "max_tokens": 40})[1]["choices"][0]["text"]
    with serving(Failing(step)) as served:
        answers: list[Any] = []
        other = threading.Thread(
            target=lambda: answers.append(served.post("/v1/completions", {**ASK, "max_tokens": 40}))
        )
        other.start()
        failed = read_all(request(served.port, {**ASK, "prompt": [9, 1], "stream": True}))
        assert error_of(failed, True) == "generation_failed"
        other.join()
        assert answers[0][1]["choices"][0]["text"] == alone
        check(served)


@pytest.mark.parametrize("step", range(1, 7))
def test_a_runner_that_dies_in_any_step_leaves_nobody_waiting(step: int) -> None:
    with serving(MockRunner(script=Script(dead_step=step))) as served:
        bodies = [{**ASK, "stream": is_stream} for is_stream in (True, False, True)]
        answers = [read_all(sock) for sock in [request(served.port, body) for body in bodies]]
        for body, answer in zip(bodies, answers, strict=True):
            assert error_of(answer, bool(body["stream"])) in ("generation_failed", "engine_dead")
        check(served)
        assert not served.llm.health().is_live


def error_of(answer: bytes, is_stream: bool) -> str:
    """The code of the error that it is, or that a stream ends with: whose reader was quick enough has part of it."""
    assert b"[DONE]" not in answer
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 200 "):
        assert is_stream
        body = [line for line in body.splitlines() if line.startswith(b"data: ")][-1].removeprefix(b"data: ")
    code: str = json.loads(body)["error"]["code"]
    return code


# ---------------------------------------------------------------------------------------- the process


class Process:
    """`nanovllm serve` in its own process, with the mock runner and these options."""

    def __init__(self, directory: Path, config: str, *arguments: str) -> None:
        (directory / "c.yaml").write_text(config)
        command = [sys.executable, "-c", "from nanovllm.cli import main; main()", "serve", "-c", "c.yaml", "--port=0"]
        self.popen = subprocess.Popen(
            [*command, *arguments], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("listening at http"), (line, self.popen.communicate())
        self.port = int(line.split(",")[0].rpartition(":")[2])
        self.log = ""

    def get(self, path: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def wait_until_ready(self) -> None:
        wait_until(lambda: self.get("/readyz")[0] == 200)

    def send(self, number: int) -> None:
        self.popen.send_signal(number)

    def end(self) -> int:
        _, self.log = self.popen.communicate(timeout=40)
        return self.popen.returncode


@contextmanager
def process(directory: Path, config: str, *arguments: str) -> Iterator[Process]:
    started = Process(directory, config, *arguments)
    try:
        yield started
    finally:
        if started.popen.poll() is None:
            started.popen.kill()
            started.popen.communicate()


SLOW = "runner: {type: mock, script: {delay: 0.02}}\nserver: {drain_seconds: %g}\n"


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_starts_answers_drains_and_ends_with_0(number: int, tmp_path: Path) -> None:
    with process(tmp_path, SLOW % 20) as served:
        served.wait_until_ready()
        stream = request(served.port, {**ASK, "max_tokens": 60, "stream": True})
        whole = request(served.port, {**ASK, "max_tokens": 60})
        assert stream.recv(20).startswith(b"HTTP/1.1 200 ")
        served.send(number)
        wait_until(lambda: served.get("/readyz") == (503, {"status": "draining"}))
        assert served.get("/livez")[0] == 200
        refused = read_all(request(served.port, ASK))
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in refused
        assert read_all(stream).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        answer = json.loads(read_all(whole).partition(b"\r\n\r\n")[2])
        assert answer["usage"]["completion_tokens"] == 60
        assert served.end() == 0
        lines = [json.loads(line) for line in served.log.splitlines()]
        assert not [line for line in lines if line["level"] not in ("info", "debug")]
        assert [line["path"] for line in lines if line.get("error") == "shutting_down"] == ["/v1/completions"]


@posix
@pytest.mark.parametrize("phase", ["decode", "prefill", "queue"])
def test_what_the_drain_is_too_short_for_is_told_so(phase: str, tmp_path: Path) -> None:
    """The first is in that phase, the second one waits for it."""
    scheduler = "scheduler: {max_num_seqs: 1, max_num_batched_tokens: 8}\n"
    with process(tmp_path, SLOW % 0.3 + scheduler) as served:
        served.wait_until_ready()
        prompt = [5] * (3000 if phase == "prefill" else 3)
        first = request(served.port, {**ASK, "prompt": prompt, "max_tokens": 1000, "stream": phase != "queue"})
        if phase == "decode":
            assert first.recv(20).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: metric(served, "steps_total") > 1)
        second = request(served.port, {**ASK, "stream": phase == "queue"})
        wait_until(lambda: metric(served, "waiting") == 1)
        served.send(signal.SIGTERM)
        assert b'"code": "shutting_down"' in (rest := read_all(first))
        assert b"[DONE]" not in rest
        refused = read_all(second)
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert error_of(refused, False) == "shutting_down"
        assert served.end() == 0
        assert "2 calls were aborted" in served.log


def metric(served: Process, name: str) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return float(next(line for line in lines if line.startswith(f"nanovllm_{name} ")).split()[1])


@posix
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once(second: int, tmp_path: Path) -> None:
    with process(tmp_path, SLOW % 60) as served:
        served.wait_until_ready()
        stream = request(served.port, {**ASK, "max_tokens": 3000, "stream": True})
        assert stream.recv(20).startswith(b"HTTP/1.1 200 ")
        served.send(signal.SIGTERM)
        wait_until(lambda: served.get("/readyz")[1] == {"status": "draining"})
        served.send(second)
        rest = read_all(stream)
        assert b"[DONE]" not in rest
        assert served.end() == 128 + second


@posix
def test_told_to_end_before_it_is_ready_it_ends_with_0(tmp_path: Path) -> None:
    with process(tmp_path, "runner: mock\n") as served:
        served.send(signal.SIGTERM)
        assert served.end() == 0


@posix
def test_an_engine_that_dies_ends_the_process_with_5(tmp_path: Path) -> None:
    with process(tmp_path, "runner: {type: mock, script: {dead_step: 3}}\n") as served:
        served.wait_until_ready()
        answer = read_all(request(served.port, {**ASK, "stream": True}))
        assert error_of(answer, True) == "generation_failed"
        assert served.end() == 5
        assert "error: the engine is dead: the runner died" in served.log
        assert "restart the server" in served.log


def test_tls_with_a_certificate_of_ours(tmp_path: Path) -> None:
    import ssl

    pem = Path(__file__).with_name("tls_localhost.pem")
    with process(tmp_path, f"runner: mock\nserver: {{tls_certificate: {json.dumps(str(pem))}}}\n") as served:
        context = ssl.create_default_context(cafile=str(pem))
        connection = http.client.HTTPSConnection("localhost", served.port, timeout=20, context=context)
        wait_until(lambda: _status(connection, "/readyz") == 200)
        connection.close()
        served.popen.terminate()
        assert served.end() == 0


def _status(connection: http.client.HTTPConnection, path: str) -> int:
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    return response.status


def test_uvicorn_runs_the_app_by_its_factory(tmp_path: Path) -> None:
    environ = {**os.environ, "NANOVLLM_RUNNER": "mock"}
    (tmp_path / ".env").write_text("NANOVLLM_SERVER__MAX_TOKENS=7\n")
    command = [sys.executable, "-m", "uvicorn", "--factory", "nanovllm_server.app:create_app", "--port", "0"]
    started = subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True)
    try:
        assert started.stderr is not None
        port = 0
        for line in started.stderr:
            if "Uvicorn running on" in line:
                port = int(line.split("http://127.0.0.1:")[1].split()[0])
                break
        assert port, "it did not start"
        assert read_all(request(port, ASK)).startswith(b"HTTP/1.1 200 ")
        assert read_all(request(port, {**ASK, "max_tokens": 8})).startswith(b"HTTP/1.1 400 ")
    finally:
        started.terminate()
        started.communicate(timeout=20)
