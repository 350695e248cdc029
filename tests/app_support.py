"""What the tests of both servers share: an app on a real socket in a thread of ours, and commands as real processes."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from http_support import wait_until
from nanovllm.aio import AsyncLLM
from nanovllm_server.bind import bind
from nanovllm_server.keys import Keys


class ServedApp:
    """Where an app is to be found, its engine, and how it is called."""

    def __init__(self, llm: AsyncLLM, keys: Keys) -> None:
        self.llm = llm
        self.sock = bind("127.0.0.1", 0, keys)
        self.port: int = self.sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        """One call, byte for byte."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            given = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request(method, path, body, given)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        status, answer = self.call("POST", path, json.dumps(body).encode(), **headers)
        return status, json.loads(answer)


@contextmanager
def running(served: ServedApp, server: uvicorn.Server, run: Coroutine[Any, Any, None]) -> Iterator[None]:
    """`run`, which has `server` serve, in a thread of its own; it must end when it is told to."""
    thread = threading.Thread(target=asyncio.run, args=(run,), name="serve")
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not end"
        served.sock.close()


@contextmanager
def command(directory: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`nanovllm WORDS...` as a process, started in `directory`; killed if it is still there in the end."""
    program = [sys.executable, "-c", "from nanovllm.cli import main; main()", *words]
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    with subprocess.Popen(
        program, cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serve_command(directory: Path, *words: str, what: str = "") -> Iterator[str]:
    """The url of `nanovllm WORDS...`, a `serve` that says it serves `what`; it must end well when it is told to."""
    with command(directory, *words) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[1].startswith(f"serving {what}"), lines[0] + process.stderr.read()
        yield lines[1].split()[-1]
        process.terminate()
        assert process.wait(20) == 0, process.stderr.read()
