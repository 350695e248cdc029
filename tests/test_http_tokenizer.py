"""Tokenizer `http`: over a llama-server (a small one of ours; the real one's recordings are test_http_llamacpp's), over
a server of ours, and over one of the seeds' protocol."""

from __future__ import annotations

import base64
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from http_support import Asked, ScriptedServer, Wire
from nanovllm.errors import RequestError, TokenizerError
from nanovllm_runner_http.options import TokenizerOptions
from nanovllm_runner_http.tokenizer import HttpTokenizer

SPECIAL = "<end>"
PIECES = [*(bytes([b]) for b in range(256)), b""]  # 256 is <end>
END = 256


def tokenizer(url: str, **options: Any) -> HttpTokenizer:
    return HttpTokenizer(SimpleNamespace(options=TokenizerOptions(url=url, retries=0, **options)))  # type: ignore[arg-type]


def spelt(text: str, parse_special: bool) -> list[int]:
    """Bytes, and <end> where special tokens are meant."""
    if not parse_special:
        return list(text.encode())
    first, *rest = text.split(SPECIAL)
    return [*first.encode(), *(i for part in rest for i in (END, *part.encode()))]


def llama_server(asked: Asked, wire: Wire) -> None:
    body = asked.json if asked.body else {}
    if asked.path == "/props":
        wire.json({"default_generation_settings": {}, "eos_token": SPECIAL})
    elif asked.path == "/completion":
        # The order is by likelihood.
        listed = [{"id": i, "bytes": list(piece), "logprob": -1.0} for i, piece in reversed(list(enumerate(PIECES)))]
        wire.json({"completion_probabilities": [{"top_logprobs": listed}]})
    elif asked.path == "/apply-template":
        shown = "".join(f"{m['role']}: {m['content']}{SPECIAL}" for m in body["messages"])
        wire.json({"prompt": shown})
    elif asked.path == "/tokenize":
        content = body["content"]
        parts = [content] if isinstance(content, str) else content
        ids = [i for p in parts for i in ([p] if isinstance(p, int) else spelt(p, body["parse_special"]))]
        wire.json({"tokens": [0] * body["add_special"] + ids})
    else:
        wire.json({"error": "no"}, 404)


def test_bytes_come_from_one_answer_and_cost_nothing_later() -> None:
    with ScriptedServer(llama_server) as server:
        http = tokenizer(server.url)
        num_asked = len(server.asked)
        assert (http.vocab_size, http.eos_ids) == (257, (END,))
        assert [http.token_bytes(i) for i in range(257)] == PIECES
        assert http.token_bytes(257) == http.token_bytes(10**9) == http.token_bytes(-1) == b""
        assert http.decode([*"é".encode(), END, 0xF0]) == "é�"
        assert len(server.asked) == num_asked


def test_special_tokens_come_only_where_they_are_meant() -> None:
    with ScriptedServer(llama_server) as server:
        http = tokenizer(server.url)
        assert http.encode("a<end>") == [0, *b"a<end>"]
        assert http.encode("a<end>", parse_special=True) == [0, 97, END]


def test_a_conversation_is_the_servers_template() -> None:
    with ScriptedServer(llama_server) as server:
        http = tokenizer(server.url)
        said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "é"}]
        assert http.chat(said) == [0, *b"user: hi", END, *"assistant: é".encode(), END]


def test_text_in_a_conversation_never_becomes_a_special_token() -> None:
    with ScriptedServer(llama_server) as server:
        http = tokenizer(server.url)
        said = [{"role": "user", "content": "a<end>b"}, {"role": "user", "content": "c"}]
        assert http.chat(said) == [0, *b"user: a<end>b", END, *b"user: c", END]


def test_nor_where_the_template_changes_it() -> None:
    def upper(asked: Asked, wire: Wire) -> None:
        if asked.path == "/apply-template":
            wire.json({"prompt": asked.json["messages"][0]["content"][:8] + SPECIAL})
        else:
            llama_server(asked, wire)

    with ScriptedServer(upper) as server:
        http = tokenizer(server.url)
        assert http.chat([{"role": "user", "content": "short"}]) == [0, *b"short", END]
        with pytest.raises(RequestError, match="spells a special token"):
            http.chat([{"role": "user", "content": "<end> and more"}])


def test_messages_are_checked_before_anybody_is_asked() -> None:
    with ScriptedServer(llama_server) as server:
        http = tokenizer(server.url)
        num_asked = len(server.asked)
        with pytest.raises(RequestError, match="needs a text under 'content'"):
            http.chat([{"role": "user"}])
        assert len(server.asked) == num_asked


def test_several_threads_may_ask() -> None:
    with ScriptedServer(llama_server) as server:
        http = tokenizer(server.url)
        came: dict[int, list[int]] = {}
        threads = [
            threading.Thread(target=lambda i=i: came.__setitem__(i, http.encode(f"text {i}"))) for i in range(16)
        ]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert came == {i: [0, *f"text {i}".encode()] for i in range(16)}


@pytest.mark.parametrize(
    ("path", "answer", "status", "kind", "message"),
    [
        ("/tokenize", {"error": {"message": "too long"}}, 400, RequestError, "too long"),
        ("/tokenize", {"error": {"message": "broken"}}, 500, TokenizerError, "broken"),
        ("/tokenize", {"tokens": "no"}, 200, TokenizerError, "no list of whole numbers"),
        ("/tokenize", [], 200, TokenizerError, "no JSON object"),
        ("/tokenize", {"tokens": [257]}, 200, TokenizerError, "outside of its vocabulary of 257"),
        ("/apply-template", {}, 200, TokenizerError, "without a prompt"),
    ],
)
def test_what_may_go_wrong(path: str, answer: Any, status: int, kind: type[Exception], message: str) -> None:
    is_broken = False

    def sometimes(asked: Asked, wire: Wire) -> None:
        if is_broken and asked.path == path:
            wire.json(answer, status)
        else:
            llama_server(asked, wire)

    with ScriptedServer(sometimes) as server:
        http = tokenizer(server.url)
        is_broken = True
        with pytest.raises(kind, match=message):
            http.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "x", "stop": True},  # llamafile 0.8
        {"completion_probabilities": [{"content": "x", "probs": [{"prob": 1.0, "tok_str": "x"}]}]},  # also
        {"completion_probabilities": [{"top_logprobs": [{"id": 1, "bytes": [65]}]}]},  # a gap
        {"completion_probabilities": [{"top_logprobs": [{"id": 0, "bytes": [256]}]}]},
    ],
)
def test_a_server_that_does_not_list_its_tokens(answer: Any) -> None:
    def old(asked: Asked, wire: Wire) -> None:
        wire.json(answer) if asked.path == "/completion" else llama_server(asked, wire)

    with ScriptedServer(old) as server, pytest.raises(TokenizerError, match="does not list its tokens"):
        tokenizer(server.url)


# ------------------------------------------------------------------------------- the dialect nanovllm


def ours(asked: Asked, wire: Wire) -> None:
    if asked.path == "/info":
        wire.json({"protocol": "nanovllm", "versions": [1], "vocab_size": 300, "eos_token_ids": [END]})
    elif asked.path == "/v1/vocabulary":
        wire.json({"version": 1, "token_bytes": [base64.b64encode(piece).decode() for piece in PIECES]})
    elif asked.path == "/v1/tokenize" and "messages" in asked.json:
        wire.json({"token_ids": [END, *asked.json["messages"][0]["content"].encode()]})
    elif asked.path == "/v1/tokenize":
        wire.json({"token_ids": spelt(asked.json["text"], asked.json["parse_special"])})
    else:
        wire.json({"error": "no"}, 404)


def test_a_server_of_ours() -> None:
    with ScriptedServer(ours) as server:
        http = tokenizer(server.url)
        assert (http.vocab_size, http.eos_ids, http.token_bytes(65)) == (257, (END,), b"A")
        assert http.encode("<end>") == list(b"<end>")
        assert http.encode("<end>", parse_special=True) == [END]
        assert http.chat([{"role": "user", "content": "hi"}]) == [END, 104, 105]


@pytest.mark.parametrize("listed", [{}, [], {"token_bytes": 5}, {"token_bytes": ["?"]}, {"token_bytes": [5]}])
def test_a_vocabulary_that_is_none(listed: Any) -> None:
    def wrong(asked: Asked, wire: Wire) -> None:
        wire.json(listed) if asked.path == "/v1/vocabulary" else ours(asked, wire)

    with ScriptedServer(wrong) as server, pytest.raises(TokenizerError, match="answered /v1/vocabulary wrongly"):
        tokenizer(server.url)


def seed_server(asked: Asked, wire: Wire) -> None:
    if asked.path == "/v1/tokenize":
        assert asked.json == {"text": "Hé"}
        wire.json({"token_ids": list("Hé".encode())})
    elif asked.path == "/v1/detokenize":
        wire.json({"text": bytes(asked.json["token_ids"]).decode("utf-8", "replace")})
    else:
        wire.json({"error": "no"}, 404)


def test_a_server_of_the_seeds_is_asked_for_each_token_once() -> None:
    with ScriptedServer(seed_server) as server:
        http = tokenizer(server.url, vocab_size=256)
        assert http.encode("Hé") == list("Hé".encode())
        assert http.decode([72, 72, 105, 72]) == "HHiH"
        assert [a.json["token_ids"] for a in server.asked if a.path == "/v1/detokenize"] == [[72], [105]]
        with pytest.raises(TokenizerError, match="has no chat template"):
            http.chat([{"role": "user", "content": "hi"}])


def test_where_nothing_is_shared() -> None:
    with ScriptedServer(lambda asked, wire: wire.json({}, 404)) as server:
        with pytest.raises(TokenizerError, match="shares no tokenizer") as failure:
            tokenizer(server.url)
        assert "tokenizer.vocab_size" in str(failure.value.hint)
