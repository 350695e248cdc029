"""GET /v1/engine/live: what the engine does, told several times a second and at no cost to it."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from http_support import wait_until
from nanovllm.aio import AsyncLLM
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import TokenizerError
from nanovllm_server import live, page
from nanovllm_server.keys import Keys
from serve_support import Served, serving

KEY = "a-key-of-sixteen-characters"


@contextmanager
def watching(server: Served, key: str | None = None) -> Iterator[Iterator[dict[str, Any]]]:
    """The events, for as long as the block lasts."""
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        connection.request("GET", "/v1/engine/live", headers={"Authorization": f"Bearer {key}"} if key else {})
        response = connection.getresponse()
        assert (response.status, response.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
        with response:
            lines = (line for line in response if line.startswith(b"data: "))
            yield (json.loads(line.removeprefix(b"data: ")) for line in lines)


def test_every_step_is_told_once_and_the_sums_are_the_engines() -> None:
    with serving() as server, watching(server) as events:
        first = next(events)
        assert first["model"]["name"] == "model"
        assert first["model"]["max_model_len"] == server.llm.engine.max_len
        assert (first["running"], first["waiting"], first["steps"]) == (0, 0, [])
        assert first["blocks"]["total"] == server.llm.engine.scheduler.manager.num_blocks
        for _ in range(3):
            status, _ = server.post("/v1/completions", {"prompt": "hello there", "max_tokens": 7, "temperature": 0})
            assert status == 200
        totals = server.llm.stats()
        told, last = [], first
        while last["totals"]["steps"] < totals.num_steps:
            last = next(events)
            assert "model" not in last
            told += last["steps"]
    assert [step["step"] for step in told] == list(range(1, totals.num_steps + 1))
    assert sum(step["prefill"] for step in told) == last["totals"]["prefill_tokens"] == totals.num_prefill_tokens
    assert sum(step["decode"] for step in told) == last["totals"]["decode_tokens"] == totals.num_decode_tokens
    assert last["totals"]["cached_tokens"] == totals.num_cached_tokens
    assert all(step["seconds"] > 0 and step["seqs"] == 1 and not step["failed"] for step in told)


def test_only_the_last_steps_are_kept() -> None:
    with serving() as server:
        with watching(server) as events:  # the engine is observed from the first look on
            next(events)
        server.post("/v1/completions", {"prompt": "hello", "max_tokens": 2 * live.NUM_STEPS, "ignore_eos": True})
        with watching(server) as events:
            told = next(events)["steps"]
    last = server.llm.stats().num_steps
    assert [step["step"] for step in told] == list(range(last - live.NUM_STEPS + 1, last + 1))


def test_an_idle_engine_is_told_of_all_the_same() -> None:
    """So that who hears nothing knows that the connection is gone."""
    with serving() as server, watching(server) as events:
        first, second, third = next(events), next(events), next(events)
    assert first["at"] < second["at"] < third["at"]
    assert second["totals"] == third["totals"]
    assert second.keys() == third.keys() == first.keys() - {"model"}


def test_nothing_that_was_said_is_in_it() -> None:
    with serving() as server, watching(server) as events:
        next(events)
        server.post("/v1/completions", {"prompt": "xylophone", "max_tokens": 4, "user": "xylophone"})
        while (event := next(events))["totals"]["requests"] == 0:
            assert "xylophone" not in json.dumps(event)
        assert "xylophone" not in json.dumps(event)


def test_a_runner_without_blocks_has_none() -> None:
    with serving(MockRunner(layout="lanes")) as server, watching(server) as events:
        first = next(events)
        assert (first["blocks"], first["model"]["block_size"]) == (None, None)


def test_its_head_has_an_end() -> None:
    with serving() as server, closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)) as connection:
        for method, path in (("HEAD", "/v1/engine/live"), ("GET", "/v1/models")):  # over one connection
            connection.request(method, path)
            with connection.getresponse() as response:
                assert (response.status, len(response.read()) > 0) == (200, method == "GET")


def test_it_asks_for_a_key() -> None:
    with serving(keys=Keys([KEY])) as server:
        assert server.call("GET", "/v1/engine/live")[0] == 401
        assert server.call("GET", "/v1/engine/live", Authorization="Bearer another-key-of-sixteen")[0] == 401
        with watching(server, KEY) as events:
            assert next(events)["running"] == 0


def test_who_leaves_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MAX_WATCHING", 1)
    with serving() as server:
        with watching(server) as events:
            next(events)
            status, body = server.call("GET", "/v1/engine/live")
            assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_watching")
        wait_until(lambda: server.call("HEAD", "/v1/engine/live")[0] == 200)


class WithoutTemplate(SimpleBPETokenizer):
    def chat(self, messages: Any) -> list[int]:
        raise TokenizerError("no chat template is known")


@pytest.mark.parametrize(("tokenizer", "has_chat"), [(SimpleBPETokenizer, True), (WithoutTemplate, False)])
def test_whether_a_conversation_can_be_answered_is_said(tokenizer: Any, has_chat: bool) -> None:
    with serving(tokenizer=tokenizer()) as server, watching(server) as events:
        status, _ = server.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        )
        assert next(events)["model"]["has_chat"] is has_chat is (status == 200)


class Told:
    """One stream as a server drives it, without a server."""

    def __init__(self) -> None:
        self.llm = AsyncLLM.from_components(MockRunner(), SimpleBPETokenizer())
        self.view = live.LiveView(self.llm)
        self.sent: list[Any] = []
        self.is_over = False
        self.gone = asyncio.Event()

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def run(self, send: Any = None) -> None:
        stream = live.LiveStream(self.view, {}, lambda: self.is_over, 0.05)
        try:
            await asyncio.wait_for(stream({"type": "http", "method": "GET"}, self.receive, send or self.send), 20)
        finally:
            await self.llm.close()


def test_it_ends_when_the_server_does() -> None:
    async def main() -> Told:
        told = Told()
        asyncio.get_running_loop().call_later(0.1, setattr, told, "is_over", True)
        await told.run()
        return told

    told = asyncio.run(main())
    assert [m.get("more_body") for m in told.sent] == [None, True, False]
    assert told.view.num_watching == 0


def test_who_goes_away_or_takes_nothing_is_not_waited_for() -> None:
    async def leaves() -> Told:
        told = Told()
        asyncio.get_running_loop().call_later(0.1, told.gone.set)
        await told.run()
        return told

    async def takes_nothing() -> Told:
        told = Told()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await told.run(send)
        return told

    for story in (leaves, takes_nothing):
        assert asyncio.run(story()).view.num_watching == 0
