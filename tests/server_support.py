"""What the tests of the server and of step mode share: a runner-serve app on a real socket, in a thread of ours."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from app_support import ServedApp, running
from nanovllm.aio import AsyncLLM
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.runner import ModelRunner
from nanovllm_server.keys import Keys
from nanovllm_server.limits import Limits
from nanovllm_server.runner_app import runner_app
from nanovllm_server.stepper import Stepper


class Served(ServedApp):
    """An app that runs, its parts, and what it was asked."""

    def __init__(self, llm: AsyncLLM, limits: Limits, keys: Keys) -> None:
        super().__init__(llm, keys)
        self.loop: Any = None  # the event loop, once it runs
        self.now = 0.0  # seconds, by the stepper's clock
        self.stepper = Stepper(llm, limits, clock=lambda: self.now)
        self.paths: list[str] = []  # of every call
        self.bodies: list[bytes] = []  # of every POST
        self.connections: set[int] = set()  # their ports on the client's side
        self._app: ASGIApp = runner_app(llm, keys, limits, self.stepper)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self.paths.append(scope["path"])
        self.connections.add(scope["client"][1])
        body = b""

        async def listening() -> Any:
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body"):
                self.bodies.append(body)
            return message

        await self._app(scope, listening, send)

    @property
    def steps(self) -> list[Any]:
        """The steps that it was asked for, as JSON."""
        return [json.loads(body) for body in self.bodies if b"sequences" in body]

    def forget_idle(self, seconds: float = 61.0) -> None:
        """Let time pass, and have it tidied up on its own loop."""
        self.now += seconds
        done = threading.Event()

        def tidy() -> None:
            self.stepper.free_idle()
            done.set()

        self.loop.call_soon_threadsafe(tidy)
        assert done.wait(10)


@contextmanager
def serving(
    runner: ModelRunner | None = None,
    tokenizer: Any = None,
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    llm: AsyncLLM | None = None,
    **engine: Any,
) -> Iterator[Served]:
    """A mock runner with the built-in tokenizer, unless others are given."""
    if llm is None:
        llm = AsyncLLM.from_components(runner or MockRunner(), tokenizer or SimpleBPETokenizer(), **engine)
    served = Served(llm, limits or Limits(), keys or Keys())
    server = uvicorn.Server(
        uvicorn.Config(served.app, log_config=None, lifespan="on", interface="asgi3", timeout_graceful_shutdown=5)
    )

    async def run() -> None:
        served.loop = asyncio.get_running_loop()
        await server.serve(sockets=[served.sock])

    with running(served, server, run()):
        yield served
