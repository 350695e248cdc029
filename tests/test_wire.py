"""The messages of the nanovllm dialect, byte for byte: what we ask, what we answer, and what neither side takes.

Each file under golden/http is one message. A new version of nanovllm must still read them and say the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http_support import Asked, ScriptedServer, Wire
from nanovllm import LLM, SamplingParams
from nanovllm.batch import Sampling, TokenLogprob
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.errors import RequestError
from nanovllm.request import Request
from nanovllm.testing import alone
from nanovllm_runner_http import wire
from server_support import serving

GOLDEN = Path(__file__).parent / "golden" / "http"
PATHS = {
    "sequences": "/v1/inference", "batch": "/inference", "begin": "/v1/inference", "decode": "/v1/inference",
    "unknown": "/v1/inference", "release": "/v1/inference", "tokenize": "/v1/tokenize", "detokenize": "/v1/detokenize",
}  # fmt: skip


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes().rstrip(b"\n")


# --------------------------------------------------------------------------------------------- the server's side


def test_our_server_answers_every_golden_request_with_its_golden_response() -> None:
    with serving() as served:
        for name, path in PATHS.items():
            assert served.call("POST", path, golden(f"{name}.request")) == (200, golden(f"{name}.response")), name
        for name, path in (("info", "/info"), ("health", "/health")):
            assert served.call("GET", path) == (200, golden(f"{name}.response")), name
        for old, new in (("/tokenize", "tokenize"), ("/detokenize", "detokenize")):
            assert served.call("POST", old, golden(f"{new}.request")) == (200, golden(f"{new}.response"))


def test_the_golden_tokens_are_the_model_s() -> None:
    begun = json.loads(golden("begin.request"))["sequences"][0]
    first = json.loads(golden("begin.response"))["token_ids"][0]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    assert alone(begun["token_ids"], params) == [first, json.loads(golden("decode.response"))["token_ids"][0]]
    assert json.loads(golden("decode.request"))["sequences"][0]["token_ids"] == [first]
    plain = json.loads(golden("sequences.request"))["sequences"]
    assert json.loads(golden("sequences.response"))["token_ids"] == [alone(p["token_ids"], params)[0] for p in plain]


# --------------------------------------------------------------------------------------------- the client's side


def client_of(url: str) -> LLM:
    sections: dict[str, Any] = {"runner": {"type": "http", "url": url, "dialect": "nanovllm"}, "tokenizer": "simple"}
    return LLM.from_config(None, model="remote", **sections)


def test_our_client_asks_as_the_golden_requests_do_and_understands_the_golden_responses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nanovllm_runner_http.step.secrets.token_hex", lambda num_bytes: "c0ffee")
    said = ["begin", "decode", "release"]

    def handler(asked: Asked, connection: Wire) -> None:
        if asked.path == "/info":
            connection.raw(golden("info.response"))
            return
        if asked.path == "/v1/detokenize":  # is its vocabulary ours?
            connection.json({"text": SimpleBPETokenizer().decode(asked.json["token_ids"])})
            return
        name = said.pop(0)
        assert asked.path == PATHS[name]
        assert asked.body == golden(f"{name}.request")
        connection.raw(golden(f"{name}.response"))

    with ScriptedServer(handler) as server, client_of(server.url) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, seed=11)
        ticket = llm.engine.add(Request(prompt=[5, 6, 7], params=params))
        while llm.engine.has_work:
            llm.engine.step()
        assert not said
        assert list(ticket.sequences[0].output_ids) == alone([5, 6, 7], params)


@pytest.mark.parametrize("name", ["sequences", "batch"])
def test_our_client_says_the_seeds_words_to_a_server_that_knows_no_others(name: str) -> None:
    asked_for: list[bytes] = []

    def handler(asked: Asked, connection: Wire) -> None:
        if asked.path != PATHS[name]:
            connection.raw(b"{}", 404)
        elif b"[]" in asked.body:
            connection.raw(b'{"token_ids":[]}')
        else:
            asked_for.append(asked.body)
            connection.raw(golden(f"{name}.response"))

    with ScriptedServer(handler) as server, client_of(server.url) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        outputs = llm.generate([[5, 6, 7], [8, 9]], params)
    assert asked_for == [golden(f"{name}.request")]
    assert [list(o.token_ids) for o in outputs] == [[t] for t in json.loads(golden(f"{name}.response"))["token_ids"]]


# --------------------------------------------------------------------------------- there and back, and strictly

ids = st.integers(0, 2**31 - 1)
logprob = st.builds(
    TokenLogprob,
    ids,
    st.floats(-50, 0, width=32) | st.just(float("-inf")),
    st.integers(1, 200_000),
    st.lists(st.tuples(ids, st.floats(-50, 0, width=32)), max_size=3).map(tuple),
)


@st.composite
def params(draw: Any) -> SamplingParams:
    bias = st.dictionaries(ids, st.floats(-100, 100), min_size=1, max_size=3)
    return SamplingParams(
        temperature=draw(st.floats(0, 100)),
        top_k=draw(st.integers(0, 99)),
        top_p=draw(st.floats(0.01, 1)),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logit_bias=draw(st.none() | bias),
        max_tokens=draw(st.none() | st.integers(5, 2**31 - 1)),
        min_tokens=draw(st.integers(0, 5)),
        stop_token_ids=draw(st.lists(ids, max_size=3)),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.none() | st.integers(0, 20)),
        prompt_logprobs=draw(st.none() | st.integers(0, 20)),
        seed=draw(st.integers(0, 2**64 - 1)),
    )


@given(st.data())
def test_a_step_and_its_answers_arrive_as_they_were_sent(data: st.DataObject) -> None:
    asks, answers, wanted = [], [], []
    for seq_id in data.draw(st.lists(st.integers(0, 2**63 - 1), unique=True, max_size=4)):
        tokens = data.draw(st.lists(ids, min_size=1, max_size=5))
        start = None
        if data.draw(st.booleans()):
            chosen = data.draw(params())
            sampling = Sampling(chosen, (2, 7), frozenset(), chosen.seed or 0, data.draw(st.integers(0, 9)), False)
            start = wire.start_of(sampling, data.draw(st.integers(1, len(tokens))), is_resumed=False)
            wanted.append(chosen)
        asks.append(wire.Ask(seq_id, len(tokens) if start else data.draw(st.integers(len(tokens), 99)), tokens, start))
        drawn = data.draw(logprob)
        answers.append(
            data.draw(
                st.sampled_from(
                    [
                        wire.Answer(),
                        wire.Answer(drawn.token_id),
                        wire.Answer(drawn.token_id, logprob=drawn),
                        wire.Answer(is_unknown=True),
                        wire.Answer(error="it is too long"),
                    ]
                )
            )
        )
    step = wire.Step("c0ffee", data.draw(st.integers(0, 2**63 - 1)), asks, data.draw(st.lists(ids, max_size=3)))
    read = wire.read_step(wire.loads(wire.dumps(wire.step_json(step))), max_sequences=4)
    assert (read.client, read.call, list(read.release)) == (step.client, step.call, list(step.release))
    assert [a._replace(start=None) for a in read.asks] == [a._replace(start=None) for a in asks]
    for one, other in zip(read.asks, asks, strict=True):
        assert (one.start is None) == (other.start is None)
        if one.start is not None and other.start is not None:
            assert one.start.sampling_params() == wanted.pop(0)
            assert one.start[:5] == other.start[:5]
    told = json.loads(wire.dumps(wire.answers_json(step, answers)))
    assert wire.read_answers(told, step, None) == answers


GOOD: dict[str, Any] = {
    "version": 1, "client": "c", "call": 1, "is_prefill": False,
    "sequences": [
        {"id": 1, "at": 2, "token_ids": [5]},
        {"id": 2, "at": 1, "token_ids": [5], "temperature": 1.0, "num_prompt": 1, "index": 0, "seed": 0,
         "eos_token_ids": [], "params": {}},
    ],
}  # fmt: skip
HUGE = 10**400


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        (("version",), 2, r"version 2 is not spoken here; the versions are \[1\]"),
        (("version",), True, "version True"),
        (("client",), "", "client"),
        (("client",), "ä", "ASCII"),
        (("call",), -1, "call"),
        (("call",), HUGE, "call"),
        (("is_prefill",), 1, "is_prefill"),
        (("blocks",), [1], "blocks, which is not known"),
        (("release",), [-1], "release"),
        (("sequences",), {}, "sequences must be a list"),
        (("sequences",), [{}] * 9, "holds 9 items"),
        (("sequences", 0), 7, r"sequences\[0\] must be an object"),
        (("sequences", 0, "id"), 2, "names an id twice"),
        (("sequences", 0, "at"), 0, "at must be"),
        (("sequences", 0, "at"), True, "at must be"),
        (("sequences", 0, "token_ids"), [5, 6, 7], "holds 3 ids of a sequence of 2"),
        (("sequences", 0, "token_ids"), [1.0], "which is no id"),
        (("sequences", 0, "token_ids"), [2**31], "which is no id"),
        (("sequences", 0, "block"), 3, "not known"),
        (("sequences", 1, "token_ids"), [], "must hold all of its 1 tokens"),
        (("sequences", 1, "num_prompt"), 2, "num_prompt"),
        (("sequences", 1, "seed"), 2**64, "seed"),
        (("sequences", 1, "temperature"), "1", "temperature"),
        (("sequences", 1, "temperature"), HUGE, "temperature"),
        (("sequences", 1, "params"), [], "params must be an object"),
    ],
)
def test_a_step_that_is_none_is_refused_by_name(where: tuple[Any, ...], value: Any, says: str) -> None:
    data = json.loads(json.dumps(GOOD))
    assert len(wire.read_step(data, 8).asks) == 2
    at = data
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    with pytest.raises(wire.WireError, match=says):
        wire.read_step(data, 8)


BAD_PARAMS: list[dict[str, Any]] = [
    {"stop": ["x"]}, {"top_q": 1}, {"top_k": "3"}, {"logit_bias": {"x": 1}}, {"seed": 1},
]  # fmt: skip


@pytest.mark.parametrize("given_params", BAD_PARAMS)
def test_parameters_that_are_none_are_an_error_of_their_sequence(given_params: dict[str, Any]) -> None:
    start = wire.Start(1, 0, 0, (), 1.0, given_params)
    with pytest.raises(RequestError):
        start.sampling_params()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "no JSON"),
        (b"[]", "must be a JSON object"),
        (b"[" * 100_000, "nested too deeply|no JSON"),
        (b'{"a":NaN}', "NaN is no number"),
        (b'{"a":-Infinity}', "Infinity is no number"),
        (b'{"a":"\xff"}', "no JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(raw: bytes, says: str) -> None:
    with pytest.raises(wire.WireError, match=says):
        wire.loads(raw)


STEP = wire.Step("c", 3, [wire.Ask(1, 2, [5], None), wire.Ask(2, 2, [5], None)], ())
ANSWER: dict[str, Any] = {"version": 1, "call": 3, "ids": [1, 2], "token_ids": [7, 8]}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"call": 2}, "to another call"),
        ({"ids": [2, 1]}, "to another call"),
        ({"version": 2}, "none of version 1"),
        ({"token_ids": [7]}, "token_ids holds 1 items"),
        ({"errors": []}, "objects"),
    ],
)
def test_an_answer_to_something_else_is_none(change: dict[str, Any], says: str) -> None:
    assert [a.token for a in wire.read_answers(ANSWER, STEP, 10)] == [7, 8]
    with pytest.raises(wire.WireError, match=says):
        wire.read_answers({**ANSWER, **change}, STEP, 10)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"token_ids": [10, 8]}, "the token 10 is none of a vocabulary of 10"),
        ({"token_ids": [float("nan"), 8]}, "the token nan"),
        ({"errors": {"1": "too long"}}, "too long"),
        ({"errors": {"1": 3}}, "no text"),
        ({"logprobs": {"1": [7, float("nan"), 1, []]}}, "no log-probability"),
        ({"logprobs": {"1": [6, -1.0, 1, []]}}, r"is not \[7, logprob"),
        ({"logprobs": {"1": [7, -1.0, 1, [[3]]]}}, "is no"),
        ({"prompt_logprobs": {"1": [[7, -1.0, 1, []]]}}, "one for each of 0 tokens"),
    ],
)
def test_what_is_wrong_with_one_answer_is_that_sequence_s_error(change: dict[str, Any], says: str) -> None:
    first, second = wire.read_answers({**ANSWER, **change}, STEP, 10)
    assert first.token is None
    with pytest.raises(RequestError, match=says):
        raise RequestError(first.error or "")
    assert second == wire.Answer(8)
