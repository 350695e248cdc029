"""`nanovllm serve` by the official `openai` client: what it answers is what `LLM` answers, streamed or not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import openai
import pytest

from engine_support import RemoteRunner
from nanovllm import LLM, Output, SamplingParams
from nanovllm.aio import AsyncLLM
from nanovllm.batch import SeqOutput
from nanovllm.builtin.mock import MockRunner
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.request import Finish
from nanovllm_server.keys import Keys
from nanovllm_server.openai_answers import ChatAnswered, ChatChunk, CompletionAnswered
from serve_support import Served, serving

ROUNDING = 1e-5  # of log-probabilities, between batches of different sizes
SEEDED: dict[str, Any] = {"temperature": 0.9, "seed": 7}


@dataclass
class Pair:
    """A server and, as its oracle, the same model in an `LLM` of our own."""

    server: Served
    client: openai.OpenAI
    llm: LLM
    model: str


@pytest.fixture(scope="module", params=["mock", "demo"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with ExitStack() as stack:
        if request.param == "mock":
            served = AsyncLLM.from_components(MockRunner(), SimpleBPETokenizer())
            oracle = LLM.from_components(MockRunner(), SimpleBPETokenizer())
        else:
            served, oracle = AsyncLLM("demo", runner="numpy"), LLM("demo", runner="numpy")
        server = stack.enter_context(serving(llm=served))
        client = stack.enter_context(server.client())
        yield Pair(server, client, stack.enter_context(oracle), client.models.list().data[0].id)


@pytest.fixture(scope="module")
def mock() -> Iterator[Served]:
    with serving() as server:
        yield server


# ----------------------------------------------------------------------------------- the same tokens


def prompts_of(pair: Pair, kind: str) -> tuple[Any, list[Any]]:
    """`prompt` as the client sends it, and each prompt as LLM takes it."""
    texts = ["What is the capital of France?", "hello"]
    ids = [pair.llm.tokenizer.encode(text) for text in texts]  # type: ignore[union-attr]
    return {
        "a text": (texts[0], texts[:1]),
        "texts": (texts, texts),
        "ids": (ids[0], ids[:1]),
        "lists of ids": (ids, ids),
    }[kind]


@pytest.mark.parametrize("kind", ["a text", "texts", "ids", "lists of ids"])
@pytest.mark.parametrize("n", [1, 3])
def test_completions_are_those_of_generate(pair: Pair, kind: str, n: int) -> None:
    prompt, each = prompts_of(pair, kind)
    outputs: list[Output] = pair.llm.generate(each, SamplingParams(max_tokens=12, **SEEDED), n=n)
    wanted = [(c.text, str(c.finish)) for output in outputs for c in output.completions]
    arguments: Any = {"model": pair.model, "prompt": prompt, "max_tokens": 12, "n": n, **SEEDED}
    whole = pair.client.completions.create(**arguments)
    assert [(c.text, c.finish_reason) for c in whole.choices] == wanted
    assert [c.index for c in whole.choices] == list(range(len(wanted)))
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in outputs)
    assert whole.usage.completion_tokens == sum(len(c.token_ids) for o in outputs for c in o.completions)

    texts, finishes = [""] * len(wanted), [""] * len(wanted)
    for event in pair.client.completions.create(**arguments, stream=True):
        assert event.system_fingerprint == whole.system_fingerprint
        for choice in event.choices:
            assert not finishes[choice.index], "nothing comes after the end"
            texts[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason or ""
    assert list(zip(texts, finishes, strict=True)) == wanted


CONVERSATIONS = {
    "a question": [{"role": "user", "content": "What is the capital of France?"}],
    "a system prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
    "three turns": [
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "assistant", "content": "Lima."},
        {"role": "user", "content": "And of Italy?"},
    ],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("n", [1, 2])
def test_chats_are_those_of_chat(pair: Pair, name: str, n: int) -> None:
    messages: Any = CONVERSATIONS[name]
    output = pair.llm.chat(messages, SamplingParams(max_tokens=10, **SEEDED), n=n)
    output = output if isinstance(output, Output) else output[0]
    wanted = [(c.text, str(c.finish)) for c in output.completions]
    arguments: Any = {"model": pair.model, "messages": messages, "max_completion_tokens": 10, "n": n, **SEEDED}
    whole = pair.client.chat.completions.create(**arguments)
    assert [(c.message.content, c.finish_reason) for c in whole.choices] == wanted
    assert {c.message.role for c in whole.choices} == {"assistant"}

    roles = [""] * n
    texts, finishes, usages = [""] * n, [""] * n, []
    for event in pair.client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
        usages.append(event.usage)
        for choice in event.choices:
            roles[choice.index] += choice.delta.role or ""
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or ""
    assert list(zip(texts, finishes, strict=True)) == wanted
    assert roles == ["assistant"] * n
    assert usages[:-1] == [None] * (len(usages) - 1)
    cached = whole.usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
    assert usages[-1].model_dump() | {"prompt_tokens_details": None} == whole.usage.model_dump() | {  # type: ignore[union-attr]
        "prompt_tokens_details": None
    }
    assert usages[-1].prompt_tokens_details.cached_tokens >= cached  # type: ignore[union-attr]


def test_the_demo_model_knows_its_capitals() -> None:
    with serving(llm=AsyncLLM("demo")) as server, server.client() as client:
        answer = client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
        )
        assert "Paris" in (answer.choices[0].message.content or "")


FIELDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.6},
    {"presence_penalty": 1.5, "frequency_penalty": -1.5},
    {"logit_bias": {"60": 30, "61": 30.5}},
    {"stop": "a"},
    {"stop": ["e", "o", "th"]},
    {"extra_body": {"top_k": 3}},
    {"extra_body": {"top_k": -1, "min_p": 0.3}},
    {"extra_body": {"repetition_penalty": 1.7}},
    {"extra_body": {"min_tokens": 9, "stop_token_ids": list(range(120))}},
    {"extra_body": {"ignore_eos": True}},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda f: "+".join(f.get("extra_body", f)))
@pytest.mark.parametrize("route", ["completions", "chat"])
def test_every_field_means_what_it_means_in_SamplingParams(mock: Served, fields: dict[str, Any], route: str) -> None:
    known = fields.get("extra_body", fields)
    own = {**SEEDED, **known}
    if "logit_bias" in own:
        own["logit_bias"] = {int(k): v for k, v in own["logit_bias"].items()}
    with LLM.from_components(MockRunner(), SimpleBPETokenizer()) as llm, mock.client() as client:
        params = SamplingParams(max_tokens=24, **own)
        messages: Any = [{"role": "user", "content": "hello"}]
        if route == "chat":
            chat = client.chat.completions.create(
                model="model", messages=messages, max_tokens=24, **{**SEEDED, **fields}
            )
            found = (chat.choices[0].message.content, chat.choices[0].finish_reason)
            output = llm.chat(messages, params)
        else:
            answer = client.completions.create(model="model", prompt="hello", max_tokens=24, **SEEDED | fields)
            found = (answer.choices[0].text, answer.choices[0].finish_reason)
            output = llm.generate("hello", params)
        output = output if isinstance(output, Output) else output[0]
        assert found == (output.text, str(output.finish))


def test_a_negative_seed_is_a_seed_and_each_seed_its_own(mock: Served) -> None:
    with mock.client() as client:
        texts = [
            client.completions.create(model="model", prompt="hello", seed=seed).choices[0].text
            for seed in (-1, -1, 2**64 - 1, 5, 6)
        ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts)) == 3


def test_completions_end_after_16_tokens_and_chats_at_the_models_length() -> None:
    runner = MockRunner(max_model_len=64)
    with serving(runner, SimpleBPETokenizer(eos_id=1)) as server, server.client() as client:
        some = client.completions.create(model="model", prompt="hello")
        assert some.usage is not None
        assert some.usage.completion_tokens == 16
        chat = client.chat.completions.create(
            model="model", messages=[{"role": "user", "content": "hello"}], extra_body={"ignore_eos": True}
        )
        assert chat.usage is not None
        assert (chat.usage.total_tokens, chat.choices[0].finish_reason) == (64, "length")


# ------------------------------------------------------------------------------------------- logprobs


def test_chat_logprobs_are_those_of_chat(pair: Pair) -> None:
    messages: Any = CONVERSATIONS["a question"]
    output = pair.llm.chat(messages, SamplingParams(max_tokens=8, logprobs=3, **SEEDED))
    output = output if isinstance(output, Output) else output[0]
    arguments: Any = {
        "model": pair.model, "messages": messages, "max_tokens": 8, "logprobs": True, "top_logprobs": 3, **SEEDED,
    }  # fmt: skip
    whole = pair.client.chat.completions.create(**arguments)
    content = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert content is not None
    assert output.logprobs is not None
    assert [t.logprob for t in content] == pytest.approx([e.logprob for e in output.logprobs], abs=ROUNDING)
    token_bytes = pair.llm.tokenizer.token_bytes  # type: ignore[union-attr]
    assert [bytes(t.bytes or []) for t in content] == [token_bytes(e.token_id) for e in output.logprobs]
    assert [[p.logprob for p in t.top_logprobs] for t in content] == [
        pytest.approx([logprob for _, logprob in e.top], abs=ROUNDING) for e in output.logprobs
    ]
    shown = b"".join(bytes(t.bytes or []) for t in content).decode("utf-8", "replace")
    assert shown == whole.choices[0].message.content
    streamed: list[Any] = []
    for event in pair.client.chat.completions.create(**arguments, stream=True):
        for choice in event.choices:
            streamed += choice.logprobs.content or [] if choice.logprobs else []
    assert [t.model_dump() for t in streamed] == [t.model_dump() for t in content]


@pytest.mark.parametrize("max_tokens", [0, 6])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echo_scores_the_prompt_too(pair: Pair, max_tokens: int, as_ids: bool) -> None:
    text = "The capital of France"
    ids = pair.llm.tokenizer.encode(text)  # type: ignore[union-attr]
    params = SamplingParams(max_tokens=max(1, max_tokens), logprobs=2, prompt_logprobs=2, **SEEDED)
    output = pair.llm.generate([ids], params)[0]
    arguments: Any = {
        "model": pair.model, "prompt": ids if as_ids else text, "echo": True, "logprobs": 2, "n": 2,
        "max_tokens": max_tokens, **SEEDED,
    }  # fmt: skip
    whole = pair.client.completions.create(**arguments)
    assert whole.usage is not None
    for choice in whole.choices:
        found = choice.logprobs
        assert found is not None
        assert choice.text.startswith(pair.llm.tokenizer.decode(ids) if as_ids else text)  # type: ignore[union-attr]
        wanted: list[Any] = [entry and entry.logprob for entry in output.prompt_logprobs or ()]
        assert len(found.token_logprobs or ()) == len(ids) + whole.usage.completion_tokens // 2
        assert (found.token_logprobs or [])[0] is None
        assert (found.token_logprobs or [])[1 : len(ids)] == pytest.approx(wanted[1:], abs=ROUNDING)
        if choice.index == 0 and max_tokens:
            own = [e.logprob for e in output.logprobs or ()]
            assert (found.token_logprobs or [])[len(ids) :] == pytest.approx(own, abs=ROUNDING)
        for offset, token in zip(found.text_offset or (), found.tokens or (), strict=True):
            if not token.startswith(("token_id:", "bytes:")):
                assert choice.text.startswith(token, offset)
    if max_tokens == 0:
        assert (whole.choices[0].text, whole.usage.completion_tokens) == (text, 0)

    streamed: dict[int, dict[str, list[Any]]] = {}
    texts = {0: "", 1: ""}
    for event in pair.client.completions.create(**arguments, stream=True):
        for choice in event.choices:
            texts[choice.index] += choice.text
            for name, values in choice.logprobs.model_dump().items() if choice.logprobs else ():
                streamed.setdefault(choice.index, {}).setdefault(name, []).extend(values)
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert streamed[choice.index] == choice.logprobs.model_dump()  # type: ignore[union-attr]


def test_a_token_that_is_no_text_is_shown_by_its_bytes_or_its_number() -> None:
    class Bytes(SimpleBPETokenizer):
        def token_bytes(self, token_id: int) -> bytes:
            return "é".encode()[token_id % 2 :][:1] if token_id >= 4 else b""

    with serving(tokenizer=Bytes()) as server, server.client() as client:
        answer = client.completions.create(
            model="model", prompt=[5], max_tokens=2, logprobs=1, temperature=0, logit_bias={"6": 100}
        )
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.tokens == ["bytes:\\xc3"] * 2
        answer = client.completions.create(
            model="model", prompt=[5], max_tokens=1, logprobs=1, temperature=0, logit_bias={"3": 100}
        )
        assert answer.choices[0].logprobs is not None
        assert answer.choices[0].logprobs.tokens == ["token_id:3"]


def test_no_logprob_is_minus_infinity_in_JSON() -> None:
    class Certain(MockRunner):
        def forward(self, packed: Any) -> Any:
            logits = super().forward(packed)
            logits[:, 1:] = -math.inf
            return logits

    with serving(Certain()) as server:
        status, answer = server.post("/v1/completions", {"prompt": [5], "max_tokens": 1, "logprobs": 3})
        assert status == 200
        assert answer["choices"][0]["logprobs"]["token_logprobs"] == [0.0]
        assert sorted(answer["choices"][0]["logprobs"]["top_logprobs"][0].values())[0] == -9999.0


def test_a_runner_that_tokenizes_by_itself_is_served_too() -> None:
    """As one behind the HTTP runner is: text comes from it, ids it has none."""
    texts = [SeqOutput(text="hel"), SeqOutput(), SeqOutput(text="lo"), SeqOutput(text=" world", finish=Finish.STOP)]
    llm = AsyncLLM.from_components(RemoteRunner(*[texts] * 4, tokenizes=True, vocab_size=None))
    with serving(llm=llm) as server:
        events = server.events("/v1/completions", {"prompt": "hi", "echo": True})
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "hihello world"
        _, answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
        assert answer["choices"][0]["message"]["content"] == "hello world"
        assert server.post("/v1/completions", {"prompt": [1, 2], "echo": True})[0] == 400
        assert server.post("/v1/tokenize", {"text": "hi"})[0] == 501


# ------------------------------------------------------------------------------- usage and the cache


def cached(answer: Any) -> int:
    return int(answer.usage.prompt_tokens_details.cached_tokens)


def test_a_cached_prefix_is_counted_and_shared_only_within_a_key_and_a_salt() -> None:
    ours, theirs = "a" * 16, "b" * 16
    prompt = "the " * 40
    with serving(keys=Keys([ours, theirs])) as server, server.client(ours) as us, server.client(theirs) as them:

        def ask(client: openai.OpenAI, **extra: Any) -> int:
            return cached(client.completions.create(model="model", prompt=prompt, max_tokens=1, extra_body=extra))

        assert ask(us) == 0
        num_cached = ask(us)
        assert num_cached >= 64
        assert ask(them) == 0, "another key sees nothing of it"
        assert ask(them) == num_cached
        assert ask(us, cache_salt="x") == 0
        assert ask(us, cache_salt="x") == num_cached
        assert ask(them, cache_salt="x") == 0
        assert ask(us, cache_salt="x" * 256) == 0


# --------------------------------------------------------------------------------- models and errors


def test_models_are_listed_and_others_are_not_found(pair: Pair) -> None:
    (model,) = pair.client.models.list().data
    assert pair.client.models.retrieve(pair.model) == model
    assert model.model_dump()["max_model_len"] == pair.llm.engine.max_len
    with pytest.raises(openai.NotFoundError, match="no such model"):
        pair.client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4' here") as e:
        pair.client.completions.create(model="gpt-4", prompt="hello")
    assert (e.value.code, e.value.param) == ("model_not_found", "model")


REFUSED: list[tuple[str, Any]] = [
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "auto"),
    ("response_format", {"type": "json_object"}),
    ("reasoning_effort", "low"),
    ("store", True),
    ("modalities", ["text", "audio"]),
    ("service_tier", "flex"),
    ("functions", [{"name": "f"}]),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_is_not_supported_is_refused_by_name(mock: Served, field: str, value: Any) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    with mock.client() as client, pytest.raises(openai.BadRequestError, match=f"'{field}' is not supported: ") as e:
        client.chat.completions.create(model="model", messages=messages, **{field: value})
    assert (e.value.param, e.value.code) == (field, "unsupported_parameter")


def test_what_asks_for_nothing_is_fine(mock: Served) -> None:
    """Defaults that clients send, null among them."""
    nothing: dict[str, Any] = {
        "tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "store": False, "n": None,
        "service_tier": "auto", "modalities": ["text"], "stop": None, "logit_bias": None, "stream_options": None,
        "user": "me", "metadata": {"a": "b"}, "logprobs": False, "max_tokens": 2,
    }  # fmt: skip
    message = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    messages = [message, {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    status, answer = mock.post("/v1/chat/completions", {"messages": messages, **nothing})
    assert status == 200, answer
    status, answer = mock.post("/v1/completions", {"prompt": "a", "best_of": None, "suffix": "", "max_tokens": 2})
    assert status == 200, answer


def test_developer_is_system_and_parts_are_lines(mock: Served) -> None:
    one = [{"role": "system", "content": "hi"}, {"role": "user", "content": "a\nb"}]
    other = [
        {"role": "developer", "content": "hi"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    assert mock.post("/v1/tokenize", {"messages": one}) == mock.post("/v1/tokenize", {"messages": other})


def test_tokenize_and_detokenize_are_the_tokenizers(pair: Pair) -> None:
    tokenizer = pair.llm.tokenizer
    assert tokenizer is not None
    text = "What is the capital of France?"
    for prefix in ("/v1", ""):
        assert pair.server.post(f"{prefix}/tokenize", {"text": text}) == (200, {"token_ids": tokenizer.encode(text)})
        ids = tokenizer.encode(text)
        assert pair.server.post(f"{prefix}/detokenize", {"token_ids": ids}) == (200, {"text": tokenizer.decode(ids)})
    messages = CONVERSATIONS["a question"]
    status, answer = pair.server.post("/v1/tokenize", {"messages": messages})
    assert (status, answer["token_ids"]) == (200, list(tokenizer.chat(messages)))


# ---------------------------------------------------------------------------------- the API's words


def test_every_answer_is_as_the_document_says(mock: Served) -> None:
    asked: dict[str, Any] = {"max_tokens": 3, "n": 2, **SEEDED}
    options = {"stream_options": {"include_usage": True}}
    chat = {"messages": [{"role": "user", "content": "hello"}], "logprobs": True, "top_logprobs": 1, **asked}
    text = {"prompt": ["hello", "a"], "logprobs": 1, "echo": True, **asked}
    ChatAnswered.model_validate(mock.post("/v1/chat/completions", chat)[1])
    CompletionAnswered.model_validate(mock.post("/v1/completions", text)[1])
    *chunks, done = mock.events("/v1/chat/completions", {**chat, **options})
    assert len({ChatChunk.model_validate(event).id for event in chunks}) == 1
    assert done == "[DONE]"
    *chunks, done = mock.events("/v1/completions", {**text, **options})
    assert len({CompletionAnswered.model_validate(event).id for event in chunks}) == 1
    assert (done, chunks[-1]["choices"]) == ("[DONE]", [])


def test_the_document_lists_the_routes_and_all_its_references_resolve(mock: Served) -> None:
    status, raw = mock.call("GET", "/openapi.json")
    document = json.loads(raw)
    assert status == 200
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/tokenize"} <= document["paths"].keys()

    def references(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from ([value["$ref"]] if "$ref" in value else [])
            value = list(value.values())
        if isinstance(value, list):
            for item in value:
                yield from references(item)

    found = set(references(document))
    assert found
    assert {reference.removeprefix("#/components/schemas/") for reference in found} <= document["components"][
        "schemas"
    ].keys()


def test_the_fingerprint_changes_with_the_configuration() -> None:
    prints = []
    for length in (64, 64, 65):
        with serving(MockRunner(max_model_len=length)) as server:
            prints.append(server.post("/v1/completions", {"prompt": "a"})[1]["system_fingerprint"])
    assert prints[0] == prints[1] != prints[2]
