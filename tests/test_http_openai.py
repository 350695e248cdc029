"""The dialect `openai`: recorded exchanges of real servers, what is sent to each kind, and how streams are read."""

from __future__ import annotations

from typing import Any

import pytest

from http_dialects import asked_of, pieces, transport_to
from http_recordings import replay
from http_support import Asked, ScriptedServer, Wire
from nanovllm.batch import ALL_PARAMETERS
from nanovllm.errors import ConfigError, RequestError
from nanovllm.request import Finish, SamplingParams
from nanovllm_runner_http.dialects import Facts, Piece
from nanovllm_runner_http.dialects.openai import OpenAI
from nanovllm_runner_http.errors import UpstreamError
from support import needs_data

VLLM = Facts(dialect="openai", model="m", kind="vllm", max_model_len=100)
TEXT = Facts(dialect="openai", model="m", kind="unknown", takes_ids=False)
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.mark.parametrize(
    "name", ["llama-server-openai", "llama-cpp-python", "vllm-text", pytest.param("vllm-ids", marks=needs_data)]
)
def test_a_real_servers_answers_give_what_they_gave(name: str) -> None:
    came, recorded = replay(name)
    assert came == recorded


@needs_data
def test_vllm_gives_the_same_in_ids_and_in_text() -> None:
    with_ids, with_text = replay("vllm-ids")[1], replay("vllm-text")[1]
    assert with_ids["greedy"]["text"] == with_text["greedy"]["text"] != ""
    assert len(with_ids["greedy"]["token_ids"]) == 12
    assert len(with_ids["logprobs"]["logprobs"]) == 4
    assert with_ids["eos"]["token_ids"] == [2]
    assert len(with_ids["min_tokens"]["token_ids"]) == 4  # the same, but for the three that must come before


# --------------------------------------------------------------------------------------------- sending


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ({"temperature": 0.0}, {"temperature": 0.0}),
        ({"top_k": 7, "top_p": 0.5, "min_p": 0.25}, {"top_k": 7, "top_p": 0.5, "min_p": 0.25}),
        ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
        ({"presence_penalty": 0.5, "frequency_penalty": -1.0}, {"presence_penalty": 0.5, "frequency_penalty": -1.0}),
        ({"logit_bias": {5: -100.0}}, {"logit_bias": {"5": -100.0}}),
        ({"min_tokens": 3}, {"min_tokens": 3}),
        ({"ignore_eos": True, "stop_token_ids": [4]}, {"ignore_eos": True, "stop_token_ids": [4]}),
        ({"logprobs": 3}, {"logprobs": 3, "return_tokens_as_token_ids": True}),
        ({"max_tokens": None}, {"max_tokens": 98}),
        ({"seed": 2**31 + 5}, {"seed": 5}),
    ],
)
def test_vllm_knows_every_parameter(params: dict[str, Any], wanted: dict[str, Any]) -> None:
    exchange = asked_of(OpenAI(), VLLM, SamplingParams(**params))
    assert exchange.path == "/v1/completions"
    assert {name: exchange.body[name] for name in wanted} == wanted
    assert (exchange.body["prompt"], exchange.body["return_token_ids"], exchange.body["model"]) == ([1, 2], True, "m")


def test_servers_that_are_not_known_get_nothing_but_the_apis_own_fields() -> None:
    """Some refuse a request for a field that they do not know."""
    params = SamplingParams(temperature=0.5, stop=["x"], max_tokens=None)
    body = asked_of(OpenAI(), TEXT, params, ids=(), prompt="hi").body
    assert body == {"model": "m", "stream": True, "max_tokens": None, "temperature": 0.5, "top_p": 1.0, "seed": 0,
                    "prompt": "hi"}  # fmt: skip


def test_defaults_of_llama_cpp_python_are_switched_off() -> None:
    facts = Facts(dialect="openai", model="m", kind="llama-cpp-python", takes_ids=False)
    body = asked_of(OpenAI(), facts, GREEDY, ids=(), prompt="hi").body
    assert {name: body[name] for name in ("top_k", "min_p", "repeat_penalty", "min_tokens")} == {
        "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "min_tokens": 0,
    }  # fmt: skip


def test_a_requests_salt_goes_to_vllm_which_keeps_caches_apart() -> None:
    assert asked_of(OpenAI(), VLLM, GREEDY, salt="tenant", extra={"cache_salt": "all"}).body["cache_salt"] == "tenant"
    assert "cache_salt" not in asked_of(OpenAI(), VLLM, GREEDY).body
    assert "cache_salt" not in asked_of(OpenAI(), TEXT, GREEDY, ids=(), prompt="hi", salt="tenant").body


def test_a_conversation_takes_the_servers_template() -> None:
    given = [{"role": "user", "content": "hi"}]
    exchange = asked_of(OpenAI(), TEXT, GREEDY, ids=(), prompt=given)
    assert (exchange.path, exchange.body["messages"]) == ("/v1/chat/completions", given)
    with pytest.raises(RequestError, match="logprobs needs token ids"):
        asked_of(OpenAI(), VLLM, SamplingParams(logprobs=1), ids=(), prompt=given)


def test_ids_go_nowhere_but_to_who_takes_them() -> None:
    with pytest.raises(RequestError, match="takes text, not token ids"):
        asked_of(OpenAI(), TEXT, GREEDY, ids=(1, 2), prompt=[1, 2])
    assert asked_of(OpenAI(), VLLM, GREEDY, ids=(1, 2), prompt=[1, 2]).body["prompt"] == [1, 2]


# --------------------------------------------------------------------------------------------- reading


def chunk(text: str | None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "c",
        "object": "text_completion",
        "choices": [{"index": 0, "text": text, "finish_reason": finish, **more}],
    }


def delta(content: Any, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": finish}]}


LOGPROB = {"token_logprobs": [-1.0]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}


def test_text() -> None:
    exchange = asked_of(OpenAI(), TEXT, GREEDY, prompt="hi")
    came = pieces(exchange, chunk("He"), chunk(""), chunk("llo", "stop"), USAGE, "[DONE]")
    assert came == [Piece(text="He"), Piece(text="llo", finish=Finish.STOP)]


def test_a_conversations_answer() -> None:
    """As LM Studio, Ollama and vLLM write it: a role first, a usage last, reasoning aside."""
    exchange = asked_of(OpenAI(), TEXT, GREEDY, prompt=[{"role": "user", "content": "hi"}])
    came = pieces(
        exchange, delta({"role": "assistant", "content": None}), delta({"reasoning": "hm", "content": ""}),
        delta({"content": "Hi"}), delta({}, "length"), USAGE, "[DONE]",
    )  # fmt: skip
    assert came == [Piece(text="Hi"), Piece(text="", finish=Finish.LENGTH)]


def test_ids_with_log_probabilities() -> None:
    told = {
        "tokens": ["token_id:5"],
        "token_logprobs": [-1.5],
        "top_logprobs": [{"token_id:5": -1.5, "token_id:9": -0.5}],
    }
    exchange = asked_of(OpenAI(), VLLM, SamplingParams(logprobs=1))
    (piece,) = pieces(exchange, chunk("a", token_ids=[5], logprobs=told))
    assert piece == Piece((5,), None, ((5, -1.5, 2, ((9, -0.5),)),))


def test_ids_and_text_where_the_server_tokenizes() -> None:
    told = {"token_logprobs": [-1.5], "top_logprobs": [{"token_id:5": -1.5}]}
    exchange = asked_of(OpenAI(), VLLM, SamplingParams(logprobs=1), ids=(), prompt="hi")
    assert (exchange.body["prompt"], exchange.body["return_token_ids"]) == ("hi", True)
    (piece,) = pieces(exchange, chunk("a", token_ids=[5], logprobs=told))
    assert piece == Piece((5,), "a", ((5, -1.5, 1, ((5, -1.5),)),))


def test_an_end_that_brings_a_token() -> None:
    exchange = asked_of(OpenAI(), VLLM, GREEDY)
    came = pieces(exchange, chunk("a", token_ids=[5]), chunk("", "stop", token_ids=[2]))
    assert came == [Piece((5,)), Piece((2,), finish=Finish.STOP)]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ("no", "no JSON"),
        ({}, "choices None"),
        ({"choices": [{}, {}]}, "where there is one"),
        ({"choices": [5]}, "where there is one"),
        (chunk("a", index=1), "answered for sequence 1"),
        (chunk(["a"]), "a text that is none"),
        (chunk("a", "content_filter"), "ended the answer with 'content_filter'"),
        (chunk("a", "tool_calls"), "ended the answer with 'tool_calls'"),
        ({"error": {"message": "the model fell over", "type": "x"}}, "it reported: the model fell over"),
        ({"object": "error", "message": "fell over", "code": 400}, "it reported: fell over"),
        ({"error": "Unexpected endpoint"}, "it reported: Unexpected endpoint"),
    ],
)
def test_events_that_are_not_allowed(event: Any, message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        pieces(asked_of(OpenAI(), TEXT, GREEDY, prompt="hi"), event)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (chunk("a"), "text without its token ids"),
        (chunk("a", token_ids=["5"]), "no list of whole numbers"),
        (chunk("a", token_ids=[5]), "no log-probabilities"),
        (chunk("a", token_ids=[5], logprobs={"token_logprobs": []}), "do not belong to 1 tokens"),
        (chunk("a", token_ids=[5], logprobs={"token_logprobs": [None]}), "are no numbers"),
        (chunk("a", token_ids=[5], logprobs=LOGPROB | {"top_logprobs": [{" a": -1.0}]}), "not for a token id"),
        (chunk("a", token_ids=[5], logprobs=LOGPROB | {"top_logprobs": [{"token_id:5": "x"}]}), "are no numbers"),
    ],
)  # fmt: skip
def test_ids_that_are_missing_or_wrong(event: Any, message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        pieces(asked_of(OpenAI(), VLLM, SamplingParams(logprobs=1)), event)


# --------------------------------------------------------------------------------------------- probing


def models(*entries: dict[str, Any]) -> Any:
    def answer(asked: Asked, wire: Wire) -> None:
        if asked.path == "/v1/models":
            wire.json({"object": "list", "data": list(entries)})
        else:
            wire.json({"detail": "Not Found"}, 404)

    return answer


def probed(handler: Any, model: str | None = None) -> Facts | None:
    with ScriptedServer(handler) as server:
        return OpenAI(model=model).probe(transport_to(server.url))


@pytest.mark.parametrize(
    ("entry", "kind", "more"),
    [
        ({"id": "llama3:8b", "owned_by": "library"}, "unknown", set()),  # Ollama
        ({"id": "m.gguf", "owned_by": "me"}, "llama-cpp-python", {"top_k", "min_p", "min_tokens"}),
        ({"id": "m", "owned_by": "llamacpp"}, "llama.cpp", {"top_k", "min_p", "ignore_eos"}),
    ],
)
def test_what_is_supported_depends_on_the_kind(entry: dict[str, Any], kind: str, more: set[str]) -> None:
    facts = probed(models(entry))
    assert facts is not None
    assert (facts.model, facts.kind, facts.takes_ids) == (entry["id"], kind, False)
    standard = {
        "temperature",
        "top_p",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "seed",
        "max_tokens",
        "stop",
    }
    assert OpenAI.supports - facts.lacks == standard | more


@pytest.mark.parametrize("knows_ids", [True, False])
def test_vllm_is_asked_whether_it_knows_ids(knows_ids: bool) -> None:
    def answer(asked: Asked, wire: Wire) -> None:
        if asked.path == "/v1/completions":
            assert asked.json["return_token_ids"] is True
            wire.json(
                {"choices": [{"text": "x", "token_ids": [7]}]} if knows_ids else {"error": "no"},
                200 if knows_ids else 400,
            )
        else:
            models({"id": "m", "owned_by": "vllm", "max_model_len": 77})(asked, wire)

    facts = probed(answer)
    assert facts is not None
    assert (facts.takes_ids, facts.max_model_len) == (knows_ids, 77)
    refused = {"prompt_logprobs"} if knows_ids else {"prompt_logprobs", "logprobs", "stop_token_ids"}
    assert OpenAI.supports - facts.lacks == ALL_PARAMETERS - refused


def test_of_several_models_one_must_be_named() -> None:
    both = models({"id": "a"}, {"id": "b"})
    with pytest.raises(ConfigError, match=r"has 2 models \(a, b\); set runner.model"):
        probed(both)
    facts = probed(both, "b")
    assert facts is not None
    assert facts.model == "b"
    with pytest.raises(ConfigError, match="has 0 models"):
        probed(models())


def test_vllms_vocabulary_is_compared_with_the_tokenizers() -> None:
    class Another:
        vocab_size, eos_ids = 256, ()

        def encode(self, text: str, parse_special: bool = False) -> list[int]:
            return list(text.encode())

        def decode(self, ids: list[int]) -> str:
            return bytes(ids).decode()

    def answer(asked: Asked, wire: Wire) -> None:
        if asked.path == "/v1/completions":
            wire.json({"choices": [{"text": "x", "token_ids": [7]}]})
        elif asked.path == "/detokenize":
            wire.json({"prompt": "quite another text"})
        else:
            models({"id": "m", "max_model_len": 77})(asked, wire)

    with ScriptedServer(answer) as server, pytest.raises(ConfigError, match="its vocabulary is another one"):
        OpenAI(Another()).probe(transport_to(server.url))  # type: ignore[arg-type]
