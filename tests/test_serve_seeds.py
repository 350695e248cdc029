"""The founding documents' API: /healthz, /v1/chat and /v1/chat/stream, key by key, and their client as a process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app_support import serve_command
from engine_support import ByteTokenizer
from http_support import wait_until
from nanovllm import LLM, SamplingParams
from nanovllm.aio import AsyncLLM
from nanovllm.builtin.mock import MockRunner, Script
from nanovllm_server.keys import Keys
from nanovllm_server.options import ServerOptions
from serve_support import Served, serving
from support import REPO

# Word for word what the documents send; their backend was called onnx-genai.
QUESTION = {
    "model": "onnx-genai",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0.7,
    "max_tokens": 100,
    "top_p": 0.9,
    "top_k": 50,
}
GREEDY = {"messages": QUESTION["messages"], "temperature": 0, "max_tokens": 20}
# Word for word what they answer.
METRICS = [
    "ttft", "total_latency", "tokens_per_second", "output_tokens_per_second", "input_tokens", "output_tokens", "tpot",
    "model",
]  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with serving(llm=AsyncLLM("demo", runner="numpy")) as server:
        yield server


def stream(server: Served, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Its events; each must be one line of data and nothing else."""
    status, raw = server.call("POST", "/v1/chat/stream", json.dumps(body).encode())
    assert status == 200, raw
    *blocks, rest = raw.decode("ascii").split("\n\n")  # as JSON escapes it, no character is a line end to anybody
    assert rest == ""
    return [json.loads(re.fullmatch(r"data: (.*)", block)[1]) for block in blocks]  # type: ignore[index]


def check_metrics(metrics: dict[str, Any], *, is_stream: bool) -> None:
    assert list(metrics) == METRICS
    num_input, num_output, seconds = (metrics[key] for key in ("input_tokens", "output_tokens", "total_latency"))
    assert num_input > 0
    assert metrics["tokens_per_second"] == pytest.approx((num_input + num_output) / seconds)
    assert metrics["output_tokens_per_second"] == pytest.approx(num_output / seconds)
    if num_output == 1:
        assert metrics["tpot"] is None
    else:
        assert 0 < metrics["tpot"] * (num_output - 1) <= seconds
    if is_stream:
        assert 0 < metrics["ttft"] + (metrics["tpot"] or 0) * (num_output - 1) <= seconds
    else:
        assert metrics["ttft"] is None


# ------------------------------------------------------------------------------------------------ health


def test_healthz_has_the_four_keys(demo: Served) -> None:
    status, raw = demo.call("GET", "/healthz")
    assert (status, json.loads(raw)) == (
        200,
        {"status": "ok", "backend": "numpy", "device": "cpu", "model_dir": "demo"},
    )


def test_where_the_model_lies_can_be_kept_to_oneself() -> None:
    llm = AsyncLLM("demo", runner="numpy")
    with serving(llm=llm, options=ServerOptions(hide_model_dir=True)) as server:
        health = json.loads(server.call("GET", "/healthz")[1])
    assert health == {"status": "ok", "backend": "numpy", "device": "cpu", "model_dir": None}


def test_healthz_asks_for_a_key_and_follows_the_engine() -> None:
    key = "a-key-of-the-tests"
    with serving(MockRunner(script=Script(dead_step=1)), keys=Keys([key])) as server:
        bearer = {"Authorization": f"Bearer {key}"}
        assert server.call("GET", "/healthz")[0] == 401
        assert server.call("GET", "/healthz", **bearer)[0] == 200
        assert server.post("/v1/chat", GREEDY, **bearer)[0] == 500
        wait_until(lambda: not server.llm.health().is_live)
        status, raw = server.call("GET", "/healthz", **bearer)
    assert (status, json.loads(raw)["error"]["code"]) == (503, "dead")


# -------------------------------------------------------------------------------------------------- chat


def test_a_chat_has_the_documents_keys_and_figures_that_agree(demo: Served) -> None:
    status, answer = demo.post("/v1/chat", QUESTION)
    assert (status, list(answer)) == (200, ["content", "metrics"])
    assert answer["content"] == "The capital of France is Paris."
    assert answer["metrics"]["model"] == "demo"
    check_metrics(answer["metrics"], is_stream=False)


def test_a_stream_comes_in_pieces() -> None:
    with serving(MockRunner(script=Script(delay=0.05))) as server:
        *pieces, _ = stream(server, {**GREEDY, "max_tokens": 8})
    assert len(pieces) > 1


def test_a_stream_has_the_documents_keys_and_is_the_whole_answer(demo: Served) -> None:
    *pieces, last = stream(demo, GREEDY)
    assert all(list(piece) == ["token"] and piece["token"] for piece in pieces)
    assert "".join(piece["token"] for piece in pieces) == demo.post("/v1/chat", GREEDY)[1]["content"]
    assert list(last) == ["done", "token", "metrics"]
    assert (last["done"], last["token"], last["metrics"]["model"]) == (True, "[DONE]", "demo")
    check_metrics(last["metrics"], is_stream=True)


@pytest.mark.parametrize("num_tokens", [1, 2, 7])
def test_answers_and_counts_are_those_of_the_engine(num_tokens: int) -> None:
    body = {**GREEDY, "max_tokens": num_tokens}
    with LLM.from_components(MockRunner(256), ByteTokenizer()) as llm:
        params = SamplingParams(temperature=0, max_tokens=num_tokens)
        (output,) = llm.chat([QUESTION["messages"]], params)
    with serving(MockRunner(256), ByteTokenizer()) as server:
        answer = server.post("/v1/chat", body)[1]
        *pieces, last = stream(server, body)
    assert answer["content"] == "".join(piece["token"] for piece in pieces) == output.text
    for metrics, is_stream in ((answer["metrics"], False), (last["metrics"], True)):
        assert metrics["input_tokens"] == len(output.prompt_token_ids)
        assert metrics["output_tokens"] == len(output.token_ids) == num_tokens
        check_metrics(metrics, is_stream=is_stream)


# Each of these has ended somebody's stream: SSE's own line ends, Python's, JavaScript's, and the word for the end.
@pytest.mark.parametrize(
    "text", ["[DONE]", "data: [DONE]\n\n", "a\n\nb", "a\r\rb\r\n\r\n", "\u2028\u2029\x85\x1c", '"}\n\ndata: {"done":1}']
)
def test_no_text_ends_a_stream(text: str) -> None:
    script = Script(tokens=list(text.encode()))
    body = {**GREEDY, "max_tokens": len(script.tokens)}
    with serving(MockRunner(256, script=script), ByteTokenizer()) as server:
        *pieces, last = stream(server, body)
        assert "".join(piece["token"] for piece in pieces) == text == server.post("/v1/chat", body)[1]["content"]
        assert all("done" not in piece for piece in pieces)
        assert last["done"] is True
        with server.client() as client:  # and so on OpenAI's routes
            chunks = client.chat.completions.create(model="model", stream=True, **body)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
            events = client.completions.create(
                model="model", prompt="x", temperature=0, max_tokens=len(script.tokens), stream=True
            )
            assert "".join(event.choices[0].text for event in events) == text


@pytest.mark.parametrize("step", [1, 3])
def test_a_failure_is_a_status_or_the_last_event_and_never_done(step: int) -> None:
    script = Script(tokens=b"abcd", fail_steps=[step], delay=0.05)  # so that the first token is out when step 3 fails
    with serving(MockRunner(256, script=script), ByteTokenizer()) as server:
        status, raw = server.call("POST", "/v1/chat/stream", json.dumps(GREEDY).encode())
    events = raw.decode().removesuffix("\n\n").split("\n\n")
    assert status == (500 if step == 1 else 200)
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "generation_failed"
    assert "done" not in raw.decode()


@pytest.mark.parametrize("path", ["/v1/chat", "/v1/chat/stream"])
@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**18}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "0"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": True}, "top_k"),
        ({"max_new_tokens": 5}, None),
        ({"tools": [{}]}, "tools"),
    ],
)
def test_what_is_wrong_is_refused_by_name(demo: Served, path: str, wrong: dict[str, Any], param: str | None) -> None:
    status, answer = demo.post(path, {**GREEDY, **wrong})
    assert (status, answer["error"]["param"]) == (400, param)
    assert next(iter(wrong)) in answer["error"]["message"]


def test_the_servers_cap_on_tokens_holds_here_too() -> None:
    with serving(MockRunner(256), ByteTokenizer(), options=ServerOptions(max_tokens=5)) as server:
        refused = server.post("/v1/chat", {**GREEDY, "max_tokens": 6})
        assert (refused[0], refused[1]["error"]["param"]) == (400, "max_tokens")
        assert server.post("/v1/chat", {"messages": GREEDY["messages"]})[1]["metrics"]["output_tokens"] == 5


# -------------------------------------------------------------------------------------------- as a process


def test_the_documents_command_line_and_their_client(tmp_path: Path) -> None:
    model = REPO / "plugins" / "models" / "nanovllm_models" / "demo"
    with serve_command(tmp_path, "serve", "--model", str(model), "--port=0") as url:
        command = [sys.executable, "-W", "error", str(REPO / "examples" / "client_requests.py"), url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("The capital of France is Paris.") == 2
    assert re.search(r"Latency: [\d.]+s\nTokens/sec: [\d.]+\n", done.stdout)
    assert re.search(r"Time to first token: [\d.e-]+s", done.stdout)
