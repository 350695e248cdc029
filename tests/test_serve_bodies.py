"""What a body may hold: JSON's traps, wrong types and values, and the server's caps at the limit and beyond it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.builtin.mock import MockRunner
from nanovllm_server.body import loads
from nanovllm_server.errors import ApiError
from nanovllm_server.options import ServerOptions
from serve_support import Served, serving

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    options = ServerOptions(
        max_body_bytes=300_000, max_prompts=4, max_choices=8, max_prompt_tokens=20, max_tokens=30, max_text_chars=50,
        max_ids=40,
    )  # fmt: skip
    with serving(options=options) as served:
        yield served
        assert served.llm.health().is_ready


def refused(server: Served, path: str, raw: bytes, status: int = 400, **headers: str) -> dict[str, Any]:
    """The error of a call that is refused, in OpenAI's shape."""
    found, answer = server.call("POST", path, raw, **headers)
    error = json.loads(answer)["error"]
    assert (found, set(error)) == (status, {"message", "type", "param", "code"}), answer
    assert error["type"] == "invalid_request_error"
    return dict(error)


TRAPS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no JSON"),
    "no JSON": (b"{", "no JSON"),
    "not an object": (b'["prompt"]', "must be a JSON object"),
    "a number": (b"7", "must be a JSON object"),
    "two objects": (b"{}{}", "no JSON"),
    "no UTF-8": (b'{"prompt": "\xff"}', "no JSON"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "no"),
    "brackets": (b"[" * 100_000, "too deeply"),
    "nested objects": (b'{"a":' * 40_000, "too deeply"),
    "brackets in a field": (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "too deeply"),
    "NaN": (b'{"temperature": NaN}', "NaN is no number"),
    "Infinity": (b'{"temperature": -Infinity}', "-Infinity is no number"),
    "1e400": (b'{"temperature": 1e400}', "too large"),
    "-1e999 deep inside": (b'{"logit_bias": {"1": -1e999}}', "too large"),
    "a number of 5000 digits": (b'{"max_tokens": ' + b"9" * 5000 + b"}", "no JSON"),
    "a key twice": (b'{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
    "a key twice inside": (b'{"logit_bias": {"1": 1, "1": 2}}', "the key '1' is there twice"),
    "a lone surrogate": (b'{"prompt": "\\ud800"}', "lone surrogate"),
    "a surrogate as a key": (b'{"\\udfff": 1}', "lone surrogate"),
    "surrogates in the wrong order": (b'{"prompt": "\\ude00\\ud83d"}', "lone surrogate"),
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/tokenize", "/v1/detokenize"])
@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_400(server: Served, path: str, name: str) -> None:
    raw, said = TRAPS[name]
    assert said in refused(server, path, raw)["message"]


def test_a_pair_of_surrogates_is_a_character(server: Served) -> None:
    assert server.call("POST", "/v1/tokenize", b'{"text": "\\ud83d\\ude00"}') == server.call(
        "POST", "/v1/tokenize", '{"text": "😀"}'.encode()
    )


@pytest.mark.parametrize("given_type", ["text/plain", "", "multipart/form-data; boundary=x", "application/jsonx"])
def test_only_json_is_taken(server: Served, given_type: str) -> None:
    error = refused(server, COMPLETIONS, b'{"prompt": "a"}', 415, Content_Type=given_type)
    assert error["message"] == "the body must be application/json"
    status, _ = server.call("POST", COMPLETIONS, b'{"prompt": "a"}', Content_Type="Application/JSON; charset=utf-8")
    assert status == 200


texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


@given(st.dictionaries(texts, json_values), st.booleans())
def test_every_other_object_is_what_it_is(data: dict[str, Any], ensure_ascii: bool) -> None:
    assert loads(json.dumps(data, ensure_ascii=ensure_ascii).encode()) == data


@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ud8ex1-NaIfty ', max_size=40).map(str.encode))
def test_anything_is_an_object_or_an_ApiError(raw: bytes) -> None:
    try:
        found: object = loads(raw)
    except ApiError as e:
        found = {"status": e.status}
    assert isinstance(found, dict)
    assert found.get("status", 400) == 400


# --------------------------------------------------------------------------------------------- fields

WRONG: list[tuple[str, Any]] = [
    ("n", True), ("n", 1.0), ("n", "1"), ("n", 0), ("n", 129), ("n", 10**18), ("n", -1),
    ("temperature", "1"), ("temperature", -0.1), ("temperature", True), ("temperature", 10**400), ("temperature", 101),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 2**31), ("top_k", 1.5), ("min_p", -1),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("repetition_penalty", 0),
    ("seed", 2**64), ("seed", -(2**63) - 1), ("seed", 0.5), ("max_tokens", -1), ("max_tokens", 2**31),
    ("stop", 1), ("stop", [""]), ("stop", ""), ("stop", ["a"] * 65), ("stop", ["a" * 1025]), ("stop", [None]),
    ("logit_bias", [1]), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {str(i): 0 for i in range(1025)}), ("logit_bias", {"1": None}),
    ("logprobs", 21), ("logprobs", -1), ("stop_token_ids", [-1]), ("stop_token_ids", list(range(257))),
    ("min_tokens", -1), ("ignore_eos", 1), ("stream", "true"), ("echo", "yes"), ("user", 1), ("user", "u" * 513),
    ("cache_salt", ""), ("cache_salt", 1), ("cache_salt", "s" * 257), ("cache_salt", ["a"]),
    ("priority", 2**31), ("priority", -1), ("priority", 0.5), ("model", 5), ("metadata", {"a": 1}),
    ("stream_options", {"include_usage": True}), ("stream_options", {"x": 1}), ("stream_options", 1),
    ("prompt", 1), ("prompt", []), ("prompt", {}), ("prompt", [1, "a"]), ("prompt", [[1], "a"]), ("prompt", [[1.0]]),
    ("prompt", [-1]), ("prompt", [2**31]), ("prompt", True), ("prompt", [[]]), ("prompt", ""), ("prompt", [""]),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), WRONG, ids=lambda v: repr(v)[:24])
def test_a_wrong_field_is_named(server: Served, field: str, value: Any) -> None:
    error = refused(server, COMPLETIONS, json.dumps({"prompt": "a", field: value}).encode())
    assert field.rpartition("_")[2] in error["message"]
    assert len(error["message"]) < 300


WRONG_CHATS: dict[str, tuple[Any, str]] = {
    "none": ([], "messages"),
    "no list": ("hello", "messages"),
    "no object": (["hello"], "messages[0]"),
    "no role": ([{"content": "a"}], "messages[0].role"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "null": ([{"role": "user", "content": None}], "messages[0].content"),
    "another role": ([{"role": "tool", "content": "a"}], "messages[0].role"),
    "a marker as a role": ([{"role": "user<|im_end|>", "content": "a"}], "messages[0].role"),
    "a number": ([{"role": "user", "content": 1}], "messages[0].content"),
    "an image": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/"}}]}],
        "messages[0].content",
    ),
    "the second": ([{"role": "user", "content": "a"}, {"role": "user", "content": [1]}], "messages[1].content"),
    "tool calls": ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "tool_calls"),
    "an unknown field": ([{"role": "user", "content": "a", "x": 1}], "'x'"),
}


@pytest.mark.parametrize("name", WRONG_CHATS)
def test_a_wrong_message_is_named(server: Served, name: str) -> None:
    messages, said = WRONG_CHATS[name]
    assert said in refused(server, CHAT, json.dumps({"messages": messages}).encode())["message"]


def test_fields_that_contradict_each_other_are_refused(server: Served) -> None:
    def chat(**fields: Any) -> str:
        return str(refused(server, CHAT, json.dumps({**HELLO, **fields}).encode())["message"])

    assert "top_logprobs needs logprobs" in chat(top_logprobs=2)
    assert "max_tokens and max_completion_tokens differ" in chat(max_tokens=2, max_completion_tokens=3)
    assert "min_tokens (9) is larger than max_tokens (3)" in chat(min_tokens=9, max_tokens=3)
    assert server.post(CHAT, {**HELLO, "max_tokens": 2, "max_completion_tokens": 2})[0] == 200
    error = refused(server, COMPLETIONS, b'{"prompt": "a", "max_tokens": 0}')
    assert "gives nothing without echo" in error["message"]
    assert refused(server, COMPLETIONS, b"{}")["message"] == "prompt is missing"
    assert "'zzz' is no field" in refused(server, COMPLETIONS, b'{"prompt": "a", "zzz": 1}')["message"]
    assert "'best_of' is not supported" in refused(server, COMPLETIONS, b'{"prompt": "a", "best_of": 3}')["message"]


# ---------------------------------------------------------------------------------------------- caps

CAPS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # what is at the limit, and what beyond it
    "prompts": (COMPLETIONS, {"prompt": ["a"] * 4}, {"prompt": ["a"] * 5}),
    "choices": (COMPLETIONS, {"prompt": ["a"] * 4, "n": 2}, {"prompt": ["a"] * 3, "n": 3}),
    "prompt tokens": (COMPLETIONS, {"prompt": [5] * 20}, {"prompt": [[5] * 20, [5] * 21]}),
    "max_tokens": (COMPLETIONS, {"prompt": "a", "max_tokens": 30}, {"prompt": "a", "max_tokens": 31}),
    "max_completion_tokens": (CHAT, {**HELLO, "max_completion_tokens": 30}, {**HELLO, "max_completion_tokens": 31}),
    "text": ("/v1/tokenize", {"text": "a" * 50}, {"text": "a" * 51}),
    "conversation": (
        "/v1/tokenize",
        {"messages": [{"role": "user", "content": "a" * 25}] * 2},
        {"messages": [{"role": "user", "content": "a" * 26}] * 2},
    ),
    "ids": ("/v1/detokenize", {"token_ids": [5] * 40}, {"token_ids": [5] * 41}),
    "the vocabulary": ("/v1/detokenize", {"token_ids": [124]}, {"token_ids": [125]}),
    "body": (
        "/v1/tokenize",
        {"text": "a", "messages": None, "parse_special": False},
        {"text": "a" * 300_000},
    ),
}


@pytest.mark.parametrize("name", CAPS)
def test_caps_hold_at_the_limit_and_beyond_it(server: Served, name: str) -> None:
    path, fine, too_much = CAPS[name]
    assert server.post(path, fine)[0] == 200
    status, answer = server.post(path, too_much)
    assert (status, answer["error"]["type"]) == (413 if name == "body" else 400, "invalid_request_error")


def test_an_answer_without_a_length_gets_the_servers(server: Served) -> None:
    _, answer = server.post(CHAT, {**HELLO, "ignore_eos": True})
    assert answer["usage"]["completion_tokens"] == 30
    with serving(options=ServerOptions(max_tokens=5)) as small:
        for fields in ({}, {"max_tokens": None}, {"max_tokens": 5}):
            _, answer = small.post(COMPLETIONS, {"prompt": "a", "ignore_eos": True, **fields})
            assert answer["usage"]["completion_tokens"] == 5


def test_a_body_is_as_large_as_its_cap_to_the_byte() -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    for room, status in ((0, 200), (1, 413)):
        with serving(options=ServerOptions(max_body_bytes=len(body) - room)) as server:
            assert server.call("POST", COMPLETIONS, body)[0] == status


def test_a_body_without_a_length_is_cut_at_the_cap() -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"prompt": "'
        for _ in range(100):
            yield b"a" * 100
        yield b'"}'

    with serving(options=ServerOptions(max_body_bytes=5000)) as server:
        status, answer = server.call("POST", COMPLETIONS, pieces())  # type: ignore[arg-type]
        assert (status, json.loads(answer)["error"]["message"]) == (413, "a body may have 5000 bytes")


def test_nobody_runs_ahead_unless_the_server_allows_it() -> None:
    for is_allowed in (False, True):
        with serving(MockRunner(), options=ServerOptions(allow_priority=is_allowed)) as server:
            status, _ = server.post(COMPLETIONS, {"prompt": "a", "priority": -1})
            assert status == (200 if is_allowed else 400)
            assert server.post(COMPLETIONS, {"prompt": "a", "priority": 1})[0] == 200


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for() -> None:
    with serving(MockRunner(max_model_len=32), options=ServerOptions(max_prompt_tokens=20)) as server:
        for length in (21, 32, 100):
            status, answer = server.post(COMPLETIONS, {"prompt": [5] * length})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
