"""Bad input, by hand and at random: a typed error that names the thing, and nobody else notices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_support import Answers, RemoteRunner, ask, assert_idle, drive, greedy, make_engine
from nanovllm import LLM, ConfigError, NanoVLLMError, Request, RequestError, SamplingParams
from nanovllm.builtin.mock import MockRunner, expected
from nanovllm.builtin.simple_bpe import SimpleBPETokenizer
from nanovllm.engine import Engine

PROMPT = list(range(10, 30))


def refused(words: str, prompt: Any = PROMPT, n: Any = 1, **params: Any) -> None:
    """The request is refused with these words, on one readable line, and the engine has not changed."""
    engine = make_engine(MockRunner(max_model_len=128))
    with pytest.raises(RequestError, match=words) as caught:
        engine.add(Request(prompt=prompt, n=n, params=SamplingParams(**params)))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert not engine.has_work
    assert engine.stats().num_requests == 0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ((), "the prompt is empty"),
        (np.array([], np.int64), "the prompt is empty"),
        ([5] * 128, "128 tokens.*128.*shorten"),
        ("a " * 500, "1000 tokens.*128"),
        ([5, 125], "the prompt holds the token id 125.*125 entries"),
        (np.array([10**6]), "1000000.*125"),
        ([-1], r"prompt\[0\] is negative"),
        ([5, 2**31], r"prompt\[1\].*at least 2\*\*31"),
        ([10**5000], r"prompt\[0\].*at least 2\*\*31"),
        ([True, False], r"whole numbers only; prompt\[0\] is a bool"),
        ([1.0], r"whole numbers only; prompt\[0\] is a float"),
        ([1, "two"], r"whole numbers only; prompt\[1\] is a str"),
        ([1, None], r"whole numbers only; prompt\[1\] is a NoneType"),
        ([[1, 2]], "whole numbers only"),
        (["a", "b"], "whole numbers only"),
        (np.array([[1, 2]]), "not ndarray"),
        (np.array([1.5]), "not ndarray"),
        (np.array(5), "not ndarray"),
        (b"bytes", "not bytes"),
        (None, "not NoneType"),
        (7, "not int"),
        ({"role": "user", "content": "hi"}, "not dict"),
        (iter([1, 2]), "iterator"),
        ("\ud800", "lone surrogate"),
        ([{"role": "user"}], r"messages\[0\].*'content'"),
        ([{"role": "user", "content": 5}], r"messages\[0\]"),
        ([{"role": "user", "content": "hi"}, 5], r"messages\[1\].*int"),
        ([{"role": "<|im_start|>", "content": "hi"}], "role"),
    ],
)
def test_a_prompt_that_is_none(prompt: Any, words: str) -> None:
    refused(words, prompt)


@pytest.mark.parametrize("n", [0, -1, 10**18, True, 1.0, "2", None, math.nan])
def test_n_that_is_no_small_number(n: Any) -> None:
    refused("n must be", n=n)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temperature": math.nan}, "temperature must be a finite number, not nan"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -0.1}, "temperature.*-0.1"),
        ({"temperature": True}, "temperature"),
        ({"temperature": "hot"}, "temperature.*'hot'"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": -2}, "top_k.*-2"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_p": 0}, "top_p must be above 0"),
        ({"top_p": 1.1}, "top_p.*1.1"),
        ({"min_p": math.nan}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 3}, "presence_penalty.*2.*3"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed.*18446744073709551615"),
        ({"seed": 1.0}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, r"min_tokens \(9\) is larger than max_tokens \(8\); lower"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop": ["x"] * 10_000}, "10000"),
        ({"stop": [f"{i}" for i in range(65)]}, "65 texts; at most 64"),
        ({"stop": ""}, "stop.*1 to 1024"),
        ({"stop": "x" * 1025}, "1025"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"stop_token_ids": [125]}, "stop_token_ids holds the token id 125.*125"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": range(300)}, "stop_token_ids"),
        ({"stop_token_ids": list(range(300))}, "300"),
        ({"stop_token_ids": [[1]]}, "stop_token_ids"),
        ({"logit_bias": {125: 1.0}}, "logit_bias holds the token id 125.*125"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias"),
        ({"logit_bias": {5: math.nan}}, r"logit_bias\[5\].*nan"),
        ({"logit_bias": {5: 101}}, r"logit_bias\[5\].*101"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(2000), 1)}, "2000"),
        ({"logprobs": 21}, "logprobs.*20"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs.*20"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"ignore_eos": "no"}, "ignore_eos"),
    ],
    ids=lambda p: str(p)[:40] if isinstance(p, dict) else "",
)
def test_params_out_of_range(params: dict[str, Any], words: str) -> None:
    refused(words, **params)


@pytest.mark.parametrize(
    "options",
    [
        {"priority": 1.5},
        {"priority": 2**31},
        {"cache_salt": ""},
        {"cache_salt": "x" * 257},
        {"cache_salt": b"x"},
        {"cache_salt": "\udfff"},
        {"parse_special": None},
        {"params": None},
        {"params": {"temperature": 0}},
    ],
    ids=str,
)
def test_options_of_a_request_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        Request(prompt="hello", **options)


def test_something_that_is_no_request() -> None:
    engine = make_engine()
    for thing in ("hello", None, 5, [Request(prompt="hello")]):
        with pytest.raises(RequestError, match=r"a request is a nanovllm\.Request"):
            engine.add(thing)  # type: ignore[arg-type]


def test_a_parameter_that_the_runner_would_ignore_is_refused_by_name() -> None:
    runner = RemoteRunner()
    from dataclasses import replace

    runner._info = replace(runner.info, supports=frozenset(["temperature", "top_p"]))
    engine = make_engine(runner)
    with pytest.raises(RequestError, match="does not support min_p, top_k"):
        engine.add(Request(prompt="hello", params=SamplingParams(top_k=3, min_p=0.5, top_p=0.5)))
    engine.add(Request(prompt="hello", params=SamplingParams(top_p=0.5)))


def test_a_prompt_longer_than_a_step_is_chunked_not_refused() -> None:
    """The seeds' own numbers: 16 sequences and 1024 tokens a step, with a model of 4096."""
    engine = make_engine(MockRunner(max_model_len=4096), max_num_seqs=16, max_num_batched_tokens=1024)
    prompt = [5 + i % 100 for i in range(3000)]
    ticket = ask(engine, prompt)
    assert drive(engine).ids(ticket) == expected(prompt, 8)
    assert engine.stats().num_steps == 10


def test_a_runner_that_cannot_chunk_refuses_with_the_remedy() -> None:
    engine = make_engine(MockRunner(can_chunk=False), max_num_batched_tokens=64)
    with pytest.raises(RequestError, match=r"64.*raise scheduler.max_num_batched_tokens"):
        ask(engine, [5] * 65)
    with pytest.raises(RequestError, match=r"73 tokens do not fit"):  # after a preemption, with its answer so far
        ask(engine, [5] * 60, greedy(14))
    ticket = ask(engine, [5] * 30)
    assert drive(engine).ids(ticket) == expected([5] * 30, 8)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make_engine(MockRunner(vocab_size=124)), "125 entries.*124.*tokenizer"),
        (lambda: Engine(MockRunner()), "tokenizer"),
        (lambda: make_engine(eos_ids=[125]), "125"),
        (lambda: make_engine(eos_ids=[-1]), "-1"),
        (lambda: make_engine(max_num_batched_tokens=8, max_num_seqs=9), r"\(8\).*\(9\)"),
    ],
)
def test_parts_that_do_not_belong_together(build: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()


def test_the_calls_refuse_what_is_no_prompt() -> None:
    with LLM.from_components(MockRunner(), SimpleBPETokenizer()) as llm:
        for prompts in ([], (), None, 5, {"a": 1}, [[]], [None], object(), {1, 2}, [b"x"], [{"role": "user"}]):
            with pytest.raises(RequestError):
                llm.generate(prompts, greedy())  # type: ignore[arg-type]
        assert_idle(llm.engine)


# ------------------------------------------------------------------------------------- at random

NUMBERS = st.one_of(
    st.integers(-3, 70), st.sampled_from([10**18, -(10**18), 2**31, 2**63, 2**64, 10**400]), st.floats(), st.booleans()
)
JUNK = st.one_of(NUMBERS, st.none(), st.text(max_size=3), st.binary(max_size=2), st.lists(NUMBERS, max_size=3))
TEXTS = st.text(st.characters(), max_size=8)  # surrogates, controls and all
IDS = st.integers(0, 124)
PROMPTS = st.one_of(
    st.text("the hello?", min_size=1, max_size=30),
    st.lists(IDS, min_size=1, max_size=90),
    st.just([{"role": "user", "content": "hello"}]),
)
FIELDS = {
    "n": st.integers(1, 3),
    "priority": st.integers(-5, 5),
    "cache_salt": st.sampled_from([None, "a", "b"]),
    "parse_special": st.booleans(),
    "temperature": st.floats(0, 2),
    "top_k": st.integers(-1, 200),
    "top_p": st.floats(0.001, 1),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.001, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(IDS, st.floats(-100, 100), max_size=3),
    "seed": st.integers(0, 2**64 - 1),
    "max_tokens": st.one_of(st.none(), st.integers(4, 200)),
    "min_tokens": st.integers(0, 4),
    "stop": st.lists(st.text("the", min_size=1, max_size=3), max_size=3),
    "stop_token_ids": st.lists(IDS, max_size=5),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 20),
}
OF_THE_REQUEST = ("prompt", "n", "priority", "cache_salt", "parse_special")
MALFORMED = st.one_of(
    JUNK,
    TEXTS,
    st.lists(TEXTS, max_size=3),
    st.lists(st.integers(-1, 200), max_size=99),
    st.dictionaries(NUMBERS, JUNK),
)


@st.composite
def odd_requests(draw: Any) -> dict[str, Any]:
    """Fields of a request: legal, if strange; half of the time, one or two of them are anything at all."""
    fields = draw(st.fixed_dictionaries({"prompt": PROMPTS}, optional=FIELDS))
    for name in draw(st.lists(st.sampled_from(["prompt", *FIELDS]), max_size=2)):
        fields[name] = draw(MALFORMED)
    return fields


GOOD = [[9] * 20, [9] * 20, [9] * 17 + [4], list(range(10, 30)), [7]]


@given(odd=st.lists(st.tuples(odd_requests(), st.integers(0, 4)), min_size=1, max_size=6))
def test_no_request_changes_anothers_tokens_or_stops_the_engine(odd: list[tuple[dict[str, Any], int]]) -> None:
    runner = MockRunner(block_size=4, num_blocks=20, max_model_len=100)
    engine = make_engine(runner, max_num_seqs=4, max_num_batched_tokens=24)
    answers, good, accepted = Answers(), [], []
    for i, prompt in enumerate(GOOD):
        good.append(ask(engine, prompt, greedy(10)))
        for fields, when in odd:
            if when == i:
                of_params = {name: value for name, value in fields.items() if name not in OF_THE_REQUEST}
                of_request = {name: value for name, value in fields.items() if name in OF_THE_REQUEST}
                try:
                    accepted.append(engine.add(Request(params=SamplingParams(**of_params), **of_request)))
                except NanoVLLMError:
                    engine.scheduler.check()
        answers.take(engine.step())
        engine.scheduler.check()
    drive(engine, answers)
    assert [answers.ids(t) for t in good] == [expected(p, 10) for p in GOOD]
    assert all(answers.has_ended(t) for t in accepted)
    assert engine.health().is_ready
