"""What the tests of `nanovllm serve` share: the app on a real socket, in a thread of ours, and clients for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import uvicorn
from fastapi import FastAPI

from app_support import ServedApp, running
from http_support import wait_until
from nanovllm import LLM, SamplingParams
from nanovllm.aio import AsyncLLM
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.runner import ModelRunner
from nanovllm_server.app import create_app
from nanovllm_server.keys import Keys
from nanovllm_server.options import ServerOptions
from nanovllm_server.serving import uvicorn_config
from nanovllm_server.state import State


class Served(ServedApp):
    """An app that runs, and its engine."""

    def __init__(self, llm: AsyncLLM, keys: Keys, options: ServerOptions) -> None:
        super().__init__(llm, keys)
        self.options = options
        self.app = create_app(llm=llm, keys=keys, options=options)

    @property
    def state(self) -> State:
        layer: Any = self.app
        while not isinstance(layer, FastAPI):
            layer = layer.app
        state: State = layer.state.nanovllm
        return state

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        """The official one; the caller closes it."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, **options)

    def events(self, path: str, body: Any, **headers: str) -> list[Any]:
        """A streamed answer: its events as JSON, and "[DONE]"."""
        status, raw = self.call("POST", path, json.dumps({**body, "stream": True}).encode(), **headers)
        assert status == 200, raw
        lines = [line.removeprefix("data: ") for line in raw.decode().split("\n\n") if line.startswith("data: ")]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    def wait_for_free_blocks(self) -> None:
        """Until the engine holds nothing: no sequence, no block but cached ones."""
        scheduler = self.llm.engine.scheduler
        wait_until(lambda: not scheduler.running and not scheduler.waiting)


@contextmanager
def serving(
    runner: ModelRunner | None = None,
    tokenizer: Any = None,
    *,
    llm: AsyncLLM | None = None,
    keys: Keys | None = None,
    options: ServerOptions | None = None,
    **engine: Any,
) -> Iterator[Served]:
    """A mock runner with the built-in tokenizer, unless others are given."""
    if llm is None:
        llm = AsyncLLM.from_components(runner or MockRunner(), tokenizer or SimpleBPETokenizer(), **engine)
    served = Served(llm, keys or Keys(), options or ServerOptions())
    server = uvicorn.Server(uvicorn_config(served.app, served.options, timeout_graceful_shutdown=5))
    with running(served, server, server.serve(sockets=[served.sock])):
        yield served


class Witness:
    """Asks a server with the mock runner again and again, and remembers the answers."""

    def __init__(self, server: Served, headers: dict[str, str]) -> None:
        self.answers: list[list[str]] = []  # tokens
        self._server = server
        self._headers = headers
        self.is_over = False
        params = SamplingParams(temperature=0.9, seed=11, max_tokens=24)
        with LLM.from_components(MockRunner(), SimpleBPETokenizer()) as llm:
            (output,) = llm.generate("the witness", params)
        token_bytes = SimpleBPETokenizer().token_bytes
        self.wanted = [token_bytes(i).decode() or f"token_id:{i}" for i in output.token_ids]

    def ask(self) -> None:
        """Until it is told to end."""
        body = {"prompt": "the witness", "temperature": 0.9, "seed": 11, "max_tokens": 24, "logprobs": 0}
        while not self.is_over:
            _, answer = self._server.post("/v1/completions", body, **self._headers)
            self.answers.append(answer["choices"][0]["logprobs"]["tokens"])

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """The answers that were under way during the body are the right ones."""
        before = len(self.answers)
        yield
        after = len(self.answers)
        wait_until(lambda: len(self.answers) > after)
        assert all(tokens == self.wanted for tokens in self.answers[before:])


@contextmanager
def witnessing(server: Served, **headers: str) -> Iterator[Witness]:
    """A witness on a thread of its own, that has seen an answer."""
    witness = Witness(server, headers)
    thread = threading.Thread(target=witness.ask, name="witness")
    thread.start()
    try:
        wait_until(lambda: len(witness.answers) > 0)
        yield witness
    finally:
        witness.is_over = True
        thread.join(20)
