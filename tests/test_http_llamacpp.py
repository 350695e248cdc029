"""The dialect `llamacpp`: recorded exchanges of a real llama-server, what is sent, and how events are read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from http_dialects import asked_of, pieces, transport_to
from http_recordings import replay
from http_support import Asked, ScriptedServer, Wire
from nanovllm.batch import ALL_PARAMETERS
from nanovllm.errors import ConfigError, RequestError
from nanovllm.request import Finish, SamplingParams
from nanovllm.tokenizer import TokenStream
from nanovllm_runner_http.dialects import Facts, Piece
from nanovllm_runner_http.dialects.llamacpp import LlamaCpp
from nanovllm_runner_http.dialects.utf8_gaps import Gaps, is_incomplete
from nanovllm_runner_http.errors import UpstreamError
from nanovllm_runner_http.extra import check_extra

FACTS = Facts(dialect="llamacpp", vocab_size=512, max_model_len=100)
OLD = Facts(dialect="llamacpp", vocab_size=512, max_model_len=100, takes_ids=False)
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.mark.parametrize("name", ["llama-server-ids", "llama-server-text"])
def test_a_real_servers_answers_give_what_they_gave(name: str) -> None:
    came, recorded = replay(name)
    assert came == recorded


def test_the_recordings_hold_what_they_are_for() -> None:
    """Ids and text agree; characters of several tokens, whose tokens the server does not name, are whole."""
    with_ids, with_text = replay("llama-server-ids")[1], replay("llama-server-text")[1]
    for name in ("greedy", "stop", "drawn", "characters of several tokens"):
        assert with_ids[name]["text"] == with_text[name]["text"]
        assert with_ids[name]["finish"] == with_text[name]["finish"]
    assert with_ids["characters of several tokens"]["text"] == "😀é"
    # In this vocabulary the byte b is id 3 + b, é is id 485, and 2 ends the answer.
    assert with_ids["characters of several tokens"]["token_ids"] == [*(3 + b for b in "😀".encode()), 485, 2]
    assert with_ids["stop"]["stop_reason"] == with_text["stop"]["stop_reason"] == "little"
    assert len(with_ids["logprobs"]["logprobs"]) == 4


# --------------------------------------------------------------------------------------------- sending


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({"temperature": 0.0, "top_k": 7}, {"temperature": 0.0, "top_k": 1}),  # the same, and the server has less to do
        ({"top_k": 7}, {"top_k": 7}),
        ({"top_k": -1}, {"top_k": 0}),  # all
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"min_p": 0.25}, {"min_p": 0.25}),
        ({"repetition_penalty": 1.5}, {"repeat_penalty": 1.5, "repeat_last_n": 100}),  # over the whole context
        ({"logit_bias": {5: -100.0, 7: 2.0}}, {"logit_bias": [[5, -100.0], [7, 2.0]]}),
        ({"ignore_eos": True}, {"ignore_eos": True}),
        ({"logprobs": 0}, {"n_probs": 1}),  # of the token itself
        ({"logprobs": 5}, {"n_probs": 5}),
        ({"max_tokens": 9}, {"n_predict": 9}),
        ({"max_tokens": None}, {"n_predict": 98}),  # what is left of the length
        ({"max_tokens": 99999}, {"n_predict": 98}),
        ({"seed": 5}, {"seed": 5}),
        ({"seed": 2**32 - 1}, {"seed": 0}),  # the number that means "a random one" is never sent
        ({"stop": ["x"]}, {}),  # looked for in the tokens' text, by the engine
    ],
)
def test_each_parameter_has_its_name_there(params: dict[str, Any], wanted: dict[str, Any]) -> None:
    exchange = asked_of(LlamaCpp(), FACTS, SamplingParams(**params))
    assert exchange.path == "/completion"
    assert {name: exchange.body[name] for name in wanted} == wanted
    assert exchange.body["prompt"] == [1, 2]
    assert "stop" not in exchange.body


def test_what_it_cannot_say_is_not_supported() -> None:
    """Its presence and frequency penalties count the prompt's tokens, too: another function under the same name."""
    refused = {"presence_penalty", "frequency_penalty", "min_tokens", "prompt_logprobs"}
    assert LlamaCpp.supports == ALL_PARAMETERS - refused


def test_the_servers_own_defaults_are_switched_off() -> None:
    """Its command line may set any of these."""
    body = asked_of(LlamaCpp(), FACTS, SamplingParams()).body
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0, "presence_penalty": 0.0,
               "frequency_penalty": 0.0, "typical_p": 1.0, "dry_multiplier": 0.0, "xtc_probability": 0.0,
               "mirostat": 0, "dynatemp_range": 0.0, "temperature": 1.0}  # fmt: skip
    assert {name: body[name] for name in neutral} == neutral
    samplers = body["samplers"]
    assert samplers.index("temperature") < min(samplers.index(name) for name in ("top_p", "min_p"))


def test_a_request_with_a_salt_uses_no_cache_because_the_server_cannot_keep_two_apart() -> None:
    for prompt in (None, "hi", [{"role": "user", "content": "hi"}]):
        body = asked_of(LlamaCpp(), FACTS, GREEDY, prompt=prompt, salt="tenant", extra={"cache_prompt": True}).body
        assert body["cache_prompt"] is False


def test_completions_of_one_request_draw_apart() -> None:
    seeds = [asked_of(LlamaCpp(), FACTS, SamplingParams(seed=2**32 - 3), index=i).body["seed"] for i in range(4)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**32 - 1 for seed in seeds)


def test_text_takes_its_stops_along_and_a_conversation_the_servers_template() -> None:
    params = SamplingParams(max_tokens=5, stop=["x"])
    text = asked_of(LlamaCpp(), FACTS, params, ids=(), prompt="hi")
    assert (text.path, text.body["prompt"], text.body["stop"]) == ("/completion", "hi", ["x"])
    given = [{"role": "user", "content": "hi"}]
    chat = asked_of(LlamaCpp(), FACTS, params, ids=(), prompt=given)
    assert (chat.path, chat.body["messages"], chat.body["max_tokens"]) == ("/v1/chat/completions", given, 5)
    with pytest.raises(RequestError, match="logprobs needs token ids"):
        asked_of(LlamaCpp(), FACTS, SamplingParams(logprobs=1), ids=(), prompt=given)


def test_ids_stay_ids_where_the_server_tokenizes() -> None:
    assert asked_of(LlamaCpp(), OLD, GREEDY, ids=(5, 6), prompt=[5, 6]).body["prompt"] == [5, 6]


# ----------------------------------------------------------------------------------- the fields let through


@pytest.mark.parametrize(
    "extra",
    [{"grammar": 'root ::= "a"'}, {"json_schema": {"minimum": -5}}, {"cache_prompt": False}, {"id_slot": 3},
     {"presence_penalty": 0.5}, {"top_n_sigma": -1.0}, {"lora": [{"id": 0, "scale": -0.5}]}],
)  # fmt: skip
def test_extra_fields_go_out_as_they_are(extra: dict[str, Any]) -> None:
    check_extra(LlamaCpp(), extra)
    body = asked_of(LlamaCpp(), FACTS, GREEDY, extra=extra).body
    assert {name: body[name] for name in extra} == extra


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"n_discard": 4}, "does not let 'n_discard' through"),  # CVE-2026-21869
        ({"gramar": "x"}, "did you mean 'grammar'"),
        ({"prompt": "x"}, "does not let 'prompt' through"),
        ({"n_predict": 5}, "does not let 'n_predict' through"),
        ({"id_slot": -1}, "id_slot holds a negative whole number"),
        ({"n_keep": -1}, "n_keep holds a negative whole number"),
        ({"lora": [{"id": -2, "scale": 1.0}]}, "lora holds a negative whole number"),
        ({"dry_base": float("nan")}, "dry_base cannot be said in JSON"),
        ({"grammar": "x" * (1 << 20)}, "characters as JSON"),
    ],
)
def test_nothing_else_is_let_through(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_extra(LlamaCpp(), extra)


# --------------------------------------------------------------------------------------------- reading


def event(text: str, tokens: list[int], **more: Any) -> dict[str, Any]:
    return {"index": 0, "content": text, "tokens": tokens, "stop": False, **more}


def last(stop_type: str = "limit", **more: Any) -> dict[str, Any]:
    return {"index": 0, "content": "", "tokens": [], "stop": True, "stop_type": stop_type, **more}


@pytest.mark.parametrize(
    ("stop_type", "finish"), [("eos", Finish.STOP), ("word", Finish.STOP), ("limit", Finish.LENGTH)]
)
def test_todays_events(stop_type: str, finish: Finish) -> None:
    exchange = asked_of(LlamaCpp(), FACTS, GREEDY)
    came = pieces(exchange, event("a", [5]), event("", []), event("b", [6]), last(stop_type), "[DONE]")
    assert came == [Piece((5,)), Piece((6,)), Piece(finish=finish)]


# As llamafile 0.8's server writes them (llama.cpp of spring 2024, examples/server): text, no ids, three flags.
@pytest.mark.parametrize(
    ("flag", "finish"),
    [("stopped_eos", Finish.STOP), ("stopped_word", Finish.STOP), ("stopped_limit", Finish.LENGTH)],
)
def test_events_of_llamafile_0_8(flag: str, finish: Finish) -> None:
    flags = dict.fromkeys(["stopped_eos", "stopped_word", "stopped_limit"], False) | {flag: True}
    end = {"content": "", "id_slot": 0, "stop": True, "model": "m", "tokens_predicted": 2, "truncated": False,
           "stopping_word": "", "tokens_cached": 4, "timings": {}, **flags}  # fmt: skip
    exchange = asked_of(LlamaCpp(), OLD, GREEDY, ids=(), prompt="hi")
    words = [{"content": text, "multimodal": False, "slot_id": 0, "stop": False} for text in ("He", "", "llo")]
    assert pieces(exchange, *words, end) == [Piece(text="He"), Piece(text="llo"), Piece(text="", finish=finish)]


def test_the_stop_that_the_server_cut_off_is_given_back() -> None:
    """The engine finds it there, and knows why the answer ended."""
    exchange = asked_of(LlamaCpp(), FACTS, GREEDY, ids=(), prompt="hi")
    came = pieces(exchange, event("so ", [5]), last("word", stopping_word="END"))
    assert came == [Piece((5,), "so "), Piece(text="END", finish=Finish.STOP)]


def test_log_probabilities() -> None:
    exchange = asked_of(LlamaCpp(), FACTS, SamplingParams(logprobs=1))
    told = [{"id": 5, "logprob": -2.0, "top_logprobs": [{"id": 9, "logprob": -0.5}]}]
    (piece,) = pieces(exchange, event("a", [5], completion_probabilities=told))
    assert piece.logprobs is not None
    assert piece.logprobs[0] == (5, -2.0, 2, ((9, -0.5),))  # not among the most likely one: second at best


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (["{"], "no JSON"),
        (["[1]"], "no JSON object"),
        (["[" * 100_000], "no JSON"),
        ([{}], "'content' is None"),
        ([event("a", [1]) | {"content": 5}], "'content' is 5"),
        ([event("a", [1]) | {"stop": 0}], "'stop' is 0"),
        ([event("a", [1]) | {"index": 1}], "answered for sequence 1"),
        ([event("a", [1]) | {"tokens": None}], "no list of whole numbers"),
        ([event("a", [True])], "no list of whole numbers"),
        ([event("a", [1.0])], "no list of whole numbers"),
        ([event("a", [1], tokens_predicted="1")], "'tokens_predicted' is '1'"),
        ([last("none")], "without a reason"),
        ([{"error": {"code": 500, "message": "out of\nmemory"}}], "it reported: out of memory"),
    ],
)
def test_events_that_are_not_allowed(events: list[Any], message: str) -> None:
    with pytest.raises(UpstreamError, match=message):
        pieces(asked_of(LlamaCpp(), FACTS, GREEDY), *events)


def test_errors_as_older_servers_write_them() -> None:
    with pytest.raises(UpstreamError, match="slot unavailable") as failure:
        pieces(asked_of(LlamaCpp(), OLD, GREEDY, prompt="x"), {"content": "slot unavailable"}, kind="error")
    assert not failure.value.can_retry
    with pytest.raises(UpstreamError) as failure:
        pieces(asked_of(LlamaCpp(), FACTS, GREEDY), {"error": {"code": 503, "message": "Loading model"}})
    assert failure.value.can_retry


@pytest.mark.parametrize("told", [None, [], [{}], [{"top_logprobs": 5}], [{"top_logprobs": [], "logprob": "x"}]])
def test_log_probabilities_that_are_missing_or_wrong(told: Any) -> None:
    exchange = asked_of(LlamaCpp(), FACTS, SamplingParams(logprobs=1))
    with pytest.raises(UpstreamError, match="log-probabilities"):
        pieces(exchange, event("a", [5], completion_probabilities=told))


# ------------------------------------------------------------------- characters that are several tokens


class Fragments:
    """Single bytes, and longer pieces of which some end or begin inside of a character."""

    pieces = (*(bytes([b]) for b in range(256)), b" \xf0\x9f", b"\x98\x80", b"\xe4\xbd", b"ab", b"a\xc3", b"")
    vocab_size = len(pieces)
    eos_ids: tuple[int, ...] = ()

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


class Bytes(Fragments):
    pieces = Fragments.pieces[:256]
    vocab_size = 256


def sent_by_llama_server(tokens: list[int], tokenizer: Any) -> list[dict[str, Any]]:
    """Its `process_token`: nothing while the text ends inside of a character, then all of it with the last id."""
    events, text, shown = [], b"", 0
    for i, token in enumerate(tokens, 1):
        text += tokenizer.token_bytes(token)
        if not is_incomplete(text):
            events.append(event(text[shown:].decode("utf-8", "replace"), [token], tokens_predicted=i))
            shown = len(text)
    return [*events, last(tokens_predicted=len(tokens))]


TEXTS = st.text(st.sampled_from("ab é你😀🙂 "), max_size=8)


@given(TEXTS)
def test_no_token_of_a_character_is_lost(text: str) -> None:
    tokens = list(text.encode())
    exchange = asked_of(LlamaCpp(Bytes()), FACTS, GREEDY)  # type: ignore[arg-type]
    came = pieces(exchange, *sent_by_llama_server(tokens, Bytes()))
    assert [token for piece in came for token in piece.tokens] == tokens
    assert all(piece.text is None for piece in came)


@given(st.lists(st.integers(0, Fragments.vocab_size - 1) | st.sampled_from([256, 257, 258, 260]), max_size=8))
def test_tokens_are_told_right_or_not_at_all(tokens: list[int]) -> None:
    """Several spellings, or bytes that are no text: the text is the server's, and no id is invented."""
    tokenizer: Any = Fragments()
    events = sent_by_llama_server(tokens, tokenizer)
    came = pieces(asked_of(LlamaCpp(tokenizer), FACTS, GREEDY), *events)
    position, stream, text = 0, TokenStream(tokenizer.token_bytes), ""
    for piece, sent in zip([p for p in came if p.tokens], [e for e in events if e["tokens"]], strict=True):
        num_now = sent["tokens_predicted"] - position
        if piece.text is None:
            assert list(piece.tokens) == tokens[position : position + num_now]
            text += stream.feed(piece.tokens)
        else:
            assert piece.tokens == (tokens[position + num_now - 1],)
            text += piece.text
        position += num_now
    assert text == "".join(e["content"] for e in events)


@given(TEXTS, st.integers(0, 40))
def test_where_a_text_is_incomplete(text: str, cut: int) -> None:
    data = text.encode()[:cut]
    assert is_incomplete(data) == (len(data.decode("utf-8", "ignore").encode()) < len(data))


def test_two_spellings_are_one_too_many() -> None:
    class Twice(Fragments):
        pieces = (*Fragments.pieces, b"\xf0")
        vocab_size = len(pieces)

    tokenizer: Any = Twice()
    assert Gaps(tokenizer).fill("😀", 0x80, 3) is None
    assert Gaps(tokenizer).fill("é", 0xA9, 1) == (0xC3,)


# --------------------------------------------------------------------------------------------- probing


def llama_server(asked: Asked, wire: Wire) -> None:
    """A small one: a token is a byte."""
    answers: dict[str, Any] = {
        "/props": {
            "default_generation_settings": {"n_ctx": 64},
            "total_slots": 2,
            "eos_token": "\n",
            "build_info": "b1",
        },
        "/v1/models": {"data": [{"id": "bytes", "meta": {"n_vocab": 256}}]},
    }
    if asked.path in answers:
        wire.json(answers[asked.path])
    elif asked.path == "/completion":
        wire.json({"content": "x", "tokens": [120], "stop": True})
    elif asked.path == "/tokenize":
        wire.json({"tokens": list(asked.json["content"].encode())})
    elif asked.path == "/detokenize":
        wire.json({"content": bytes(asked.json["tokens"]).decode("utf-8", "replace")})
    else:
        wire.json({"error": "File Not Found"}, 404)


class ByteVocabulary(Bytes):
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


def test_what_a_server_says_about_itself() -> None:
    with ScriptedServer(llama_server) as server:
        facts = LlamaCpp(ByteVocabulary()).probe(transport_to(server.url))  # type: ignore[arg-type]
    assert facts is not None
    assert (facts.model, facts.vocab_size, facts.max_model_len, facts.num_slots) == ("bytes", 256, 64, 2)
    assert (facts.eos_ids, facts.takes_ids, facts.lacks) == ((10,), True, frozenset())


def test_an_old_server_is_spoken_to_in_text() -> None:
    def old(asked: Asked, wire: Wire) -> None:
        if asked.path == "/completion":
            wire.json({"content": "x", "stop": True, "stopped_limit": True})
        elif asked.path == "/v1/models":
            wire.json({"error": "no"}, 404)
        else:
            llama_server(asked, wire)

    with ScriptedServer(old) as server:
        facts = LlamaCpp().probe(transport_to(server.url))
    assert facts is not None
    assert (facts.takes_ids, facts.vocab_size, facts.model) == (False, None, None)
    assert facts.lacks == {"logprobs", "stop_token_ids"}


def test_another_vocabulary_is_refused_at_the_start() -> None:
    class Shifted(ByteVocabulary):
        def encode(self, text: str, parse_special: bool = False) -> list[int]:
            return [b + 1 for b in text.encode()]

        def decode(self, ids: list[int]) -> str:
            return bytes(i - 1 for i in ids).decode("utf-8", "replace")

    class Wider(ByteVocabulary):
        def encode(self, text: str, parse_special: bool = False) -> list[int]:
            return [300]

    with ScriptedServer(llama_server) as server:
        for tokenizer in (Shifted(), Wider()):
            with pytest.raises(ConfigError, match="its vocabulary is another one"):
                LlamaCpp(tokenizer).probe(transport_to(server.url))  # type: ignore[arg-type]
