"""`dialect: auto`: who is recognised, how a loading server is waited for, and what is said otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from http_dialects import transport_to
from http_support import Asked, ScriptedServer, Wire
from nanovllm_runner_http.errors import UpstreamError
from nanovllm_runner_http.probe import probe
from test_http_llamacpp import llama_server


def serving(answers: dict[str, Any]) -> Any:
    def answer(asked: Asked, wire: Wire) -> None:
        if asked.path in answers:
            wire.json(answers[asked.path])
        else:
            wire.json({"error": "there is nothing"}, 404)

    return answer


MODELS = {"object": "list", "data": [{"id": "m", "owned_by": "library"}]}


@pytest.mark.parametrize(
    ("handler", "name"),
    [
        (llama_server, "llamacpp"),
        (serving({"/v1/models": MODELS}), "openai"),
        # Others also have these paths, and mean something else with them.
        (serving({"/info": {"model_id": "tgi", "max_input_tokens": 5}, "/v1/models": MODELS}), "openai"),
        (serving({"/props": {"error": "Unexpected endpoint or method"}, "/v1/models": MODELS}), "openai"),
    ],
)
def test_who_is_recognised(handler: Any, name: str) -> None:
    with ScriptedServer(handler) as server:
        dialect, facts = probe(transport_to(server.url))
        assert dialect.name == facts.dialect == name
        assert facts.description["server"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 0), ("vocab_size", 10**400), ("vocab_size", True), ("max_model_len", 1e3), ("max_num_seqs", -1),
        ("eos_token_ids", [-1]), ("eos_token_ids", [2**31]), ("eos_token_ids", 2), ("versions", ["1"]), ("model", 5),
    ],
)  # fmt: skip
def test_a_server_that_says_what_cannot_be_of_itself_is_refused(name: str, value: Any) -> None:
    good = {"protocol": "nanovllm", "versions": [1], "vocab_size": 5, "max_model_len": 9, "eos_token_ids": [2]}
    said = f"says of itself that {name} is "
    with ScriptedServer(serving({"/info": {**good, name: value}})) as server, pytest.raises(UpstreamError, match=said):
        probe(transport_to(server.url))
    with ScriptedServer(serving({"/info": good})) as server:
        assert probe(transport_to(server.url))[1].vocab_size == 5


def test_a_named_dialect_is_the_only_one_that_is_asked_for() -> None:
    with ScriptedServer(serving({"/v1/models": MODELS})) as server:
        assert probe(transport_to(server.url), "openai")[0].name == "openai"
        with pytest.raises(UpstreamError, match="does not speak llamacpp") as failure:
            probe(transport_to(server.url), "llamacpp")
        assert failure.value.hint == "check the address, or set runner.dialect: auto"


def test_when_nothing_is_recognised_it_says_what_was_asked() -> None:
    with ScriptedServer(serving({"/health": {"status": "ok"}})) as server, pytest.raises(UpstreamError) as failure:
        probe(transport_to(server.url))
    assert str(failure.value) == (
        f"{server.url} does not speak nanovllm or llamacpp or openai (it answers /info: 404, /props: 404, "
        "/v1/models: 404, /health: 200, of another kind); check the address"
    )


def test_a_page_for_people_is_no_answer() -> None:
    """Some servers show their web page under every path that they do not know."""

    def page(asked: Asked, wire: Wire) -> None:
        if asked.path == "/v1/models":
            wire.json(MODELS)
        elif asked.method == "GET":
            wire.raw(b"<html>", 200, {"Content-Type": "text/html"})
        else:
            wire.json({"error": "no"}, 404)

    with ScriptedServer(page) as server:
        assert probe(transport_to(server.url))[0].name == "openai"


def test_models_that_are_no_list_are_none() -> None:
    with (
        ScriptedServer(serving({"/v1/models": {"data": 5}})) as server,
        pytest.raises(UpstreamError, match="does not speak"),
    ):
        probe(transport_to(server.url))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_server_that_loads_its_model_is_waited_for() -> None:
    num_asked = 0

    def loading(asked: Asked, wire: Wire) -> None:
        nonlocal num_asked
        num_asked += 1
        if num_asked <= 20:
            wire.json({"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}, 503)
        else:
            llama_server(asked, wire)

    clock = Clock()
    with ScriptedServer(loading) as server:
        assert probe(transport_to(server.url), clock=clock, sleep=clock.sleep)[0].name == "llamacpp"
    assert clock.now > 0


def test_but_not_for_ever() -> None:
    def loading(asked: Asked, wire: Wire) -> None:
        wire.json({"error": {"message": "Loading model"}}, 503)

    clock = Clock()
    with ScriptedServer(loading) as server, pytest.raises(UpstreamError, match="Loading model") as failure:
        probe(transport_to(server.url), patience=30, clock=clock, sleep=clock.sleep)
    assert failure.value.status == 503
    assert 30 <= clock.now < 31


def test_a_refused_key_is_said_at_once() -> None:
    def refusing(asked: Asked, wire: Wire) -> None:
        wire.json({"error": {"message": "Invalid API Key"}}, 401)

    with ScriptedServer(refusing) as server, pytest.raises(UpstreamError, match="Invalid API Key") as failure:
        probe(transport_to(server.url))
    assert failure.value.status == 401
    assert len(server.asked) == 1
