"""SamplingParams and Request: whatever goes in, out comes a value or a RequestError that names the field."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.errors import RequestError
from nanovllm.request import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_PRIORITY,
    MAX_SALT_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
    Request,
    SamplingParams,
)
from support import REPO

HUGE = 10**5000  # more digits than Python prints
TINY = 5e-324
FIELDS = [f.name for f in dataclasses.fields(SamplingParams)]
REQUEST_FIELDS = ["params", "n", "priority", "cache_salt", "parse_special"]
BUILD: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(FIELDS, SamplingParams),
    **dict.fromkeys(REQUEST_FIELDS, lambda **kw: Request(prompt="hi", **kw)),
}

# field: accepted values at the limits, refused values just past them.
NUMBERS: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.0, TINY, 100], [-TINY, -1, math.nextafter(100, 101), 101]),
    "top_p": ([TINY, 0.5, 1, 1.0], [0, 0.0, -0.0, -0.1, math.nextafter(1, 2), 2]),
    "min_p": ([0, 0.0, 1], [-TINY, math.nextafter(1, 2)]),
    "repetition_penalty": ([0.01, 1, 100], [0, -1, math.nextafter(100, 101)]),
    "presence_penalty": ([-2, 0, 2], [math.nextafter(-2, -3), math.nextafter(2, 3)]),
    "frequency_penalty": ([-2, 0, 2], [math.nextafter(-2, -3), math.nextafter(2, 3)]),
}
INTEGERS: dict[str, tuple[list[Any], list[Any]]] = {
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31]),
    "seed": ([None, 0, 2**64 - 1], [-1, 2**64]),
    "max_tokens": ([None, 1, 2**31 - 1], [0, -1, 2**31, 10**18]),
    "min_tokens": ([0, 1, 64], [-1, 65, 2**31, 10**18]),  # max_tokens is 64
    "logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    "prompt_logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1]),
    "n": ([1, MAX_N], [0, -1, MAX_N + 1, 10**18]),
    "priority": ([-MAX_PRIORITY, 0, MAX_PRIORITY], [-MAX_PRIORITY - 1, MAX_PRIORITY + 1, 10**18]),
}
LISTS: dict[str, tuple[list[Any], list[Any]]] = {
    "stop": (
        ["a", (), [], ["a"], ("a", "b"), ["x" * MAX_STOP_CHARS], [str(i) for i in range(MAX_STOPS)]],
        ["", [""], ["a", ""], ["x" * (MAX_STOP_CHARS + 1)], [str(i) for i in range(MAX_STOPS + 1)],
         [str(i) for i in range(10_000)], None, 1, [1], [b"a"], b"a", {"a": 1}, ["a", None], [["a"]]],
    ),
    "stop_token_ids": (
        [(), [], [0], (2**31 - 1,), {1, 2}, frozenset({3}), list(range(MAX_STOP_TOKEN_IDS))],
        [[-1], [2**31], [True], [1.0], ["1"], [None], [[1]], "1", 1, None, {1: 2}, [HUGE], [math.nan],
         list(range(MAX_STOP_TOKEN_IDS + 1))],
    ),
    "logit_bias": (
        [None, {}, {0: 100, 2**31 - 1: -100}, {1: 0.5}, dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)],
        [{-1: 0}, {2**31: 0}, {True: 0}, {1.0: 0}, {"1": 0}, {None: 0}, {1: None}, {1: "1"}, {1: True},
         {1: math.nextafter(100, 101)}, {1: -101}, {1: math.nan}, {1: math.inf}, {1: HUGE}, {HUGE: 1}, [], [1],
         "1", 1, dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0)],
    ),
    "cache_salt": (
        [None, "a", "é\U0001f600", "x" * MAX_SALT_CHARS],
        ["", "x" * (MAX_SALT_CHARS + 1), "a\ud800", "\udfff", b"a", 1, True, ["a"]],
    ),
    "parse_special": ([True, False], [0, 1, None, "true", "", 1.0]),
    "ignore_eos": ([True, False], [0, 1, None, "true", "", 1.0]),
    "params": ([SamplingParams()], [None, {}, {"temperature": 0}, SamplingParams, 1]),
}  # fmt: skip
NO_NUMBER = [True, False, "1", "", b"1", [1], (1,), {1}, {}, 1j, object(), math.nan, math.inf, -math.inf, HUGE, -HUGE]
NO_INTEGER = [*NO_NUMBER, 1.0, 0.5]
LIMITS = {**NUMBERS, **INTEGERS, **LISTS}


def test_the_table_of_the_docs_lists_every_field_in_order() -> None:
    page = (REPO / "docs" / "sampling-parameters.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \|", page, re.MULTILINE)
    defaults = [getattr(SamplingParams(), name) for name in FIELDS]
    shown = ["none" if d is None or d == () else str(d).lower() for d in defaults]
    assert rows == list(zip(FIELDS, shown, strict=True))


def cases(which: int) -> list[Any]:
    return [pytest.param(f, v, id=f"{f}-{i}") for f, sides in LIMITS.items() for i, v in enumerate(sides[which])]


def wrong_types() -> list[Any]:
    return [
        pytest.param(f, v, id=f"{f}-{i}")
        for fields, values in ((NUMBERS, [*NO_NUMBER, None]), (INTEGERS, NO_INTEGER))
        for f in fields
        for i, v in enumerate(values)
    ]


def test_every_field_has_its_limits_here() -> None:
    assert set(LIMITS) == {*FIELDS, *REQUEST_FIELDS}


@pytest.mark.parametrize(("field", "value"), cases(0))
def test_accepted_at_the_limit(field: str, value: Any) -> None:
    BUILD[field](**{field: value})


@pytest.mark.parametrize(("field", "value"), [*cases(1), *wrong_types()])
def test_refused_past_the_limit_and_by_type(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as refusal:
        BUILD[field](**{field: value})
    assert type(refusal.value) is RequestError
    assert field in str(refusal.value)
    assert len(str(refusal.value)) < 300


class Hostile:
    """An object whose every answer is an exception."""

    def _refuse(self, *_: object) -> Any:
        raise RuntimeError("no answer")

    __repr__ = __str__ = __len__ = __iter__ = __bool__ = __eq__ = __lt__ = __float__ = __index__ = _refuse


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


EXTREME = [
    HUGE, -HUGE, 10**18, 2**64, [HUGE], {HUGE: HUGE}, "x" * 10_000, object(), Hostile, Hostile(), nested(100_000)
]  # fmt: skip
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.text(st.characters(categories=["Cs"]), min_size=1)
    | st.binary()
    | st.sampled_from(range(len(EXTREME))).map(lambda i: EXTREME[i]),  # Hypothesis cannot print them either
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.integers() | st.text() | st.booleans() | st.none(), inner, max_size=4)
    ),
    max_leaves=6,
)


@settings(max_examples=500)
@given(st.data())
def test_any_object_in_any_fields_gives_a_value_or_a_request_error(data: st.DataObject) -> None:
    for build, names in ((SamplingParams, FIELDS), (BUILD["n"], REQUEST_FIELDS)):
        chosen = data.draw(st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=3))
        values = {name: data.draw(anything) for name in chosen}
        try:
            build(**values)
        except RequestError as refusal:
            assert any(name in str(refusal) for name in chosen)  # noqa: PT017 (an acceptance is right too)


UNPRINTABLE = {"itself": Hostile(), "in a list": [Hostile()], "in a map": {1: Hostile()}, "nested": nested(100_000)}


@pytest.mark.parametrize("value", UNPRINTABLE.values(), ids=UNPRINTABLE)
@pytest.mark.parametrize("field", [*FIELDS, *REQUEST_FIELDS])
def test_an_object_that_cannot_be_printed_is_refused_all_the_same(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field):
        BUILD[field](**{field: value})


# ------------------------------------------------------------------------------ across fields


def test_min_tokens_above_max_tokens() -> None:
    SamplingParams(min_tokens=10, max_tokens=10)
    SamplingParams(min_tokens=10**6, max_tokens=None)
    with pytest.raises(RequestError, match=r"min_tokens \(11\) is larger than max_tokens \(10\)"):
        SamplingParams(min_tokens=11, max_tokens=10)


def test_too_many_stops_are_counted() -> None:
    with pytest.raises(RequestError, match="stop has 10000 texts; at most 64"):
        SamplingParams(stop=["x"] * 10_000)


# ---------------------------------------------------------------------------- what is kept


def test_one_spelling_of_one_meaning() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=["b", "a", "b"]).stop == ("b", "a")
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_token_ids == (3, 1)


def test_values_are_frozen_copies() -> None:
    stop, ids, bias = ["a"], [1], {1: 2.0}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append("b")
    ids.append(2)
    bias[2] = 3.0
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (1,), {1: 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5  # type: ignore[misc]


def test_changed_names_what_differs_from_the_defaults() -> None:
    assert SamplingParams().changed() == frozenset()
    assert SamplingParams(temperature=1, top_k=-1, stop=[]).changed() == frozenset()
    assert SamplingParams(temperature=0, logprobs=0, stop="x").changed() == {"temperature", "logprobs", "stop"}


def test_an_unknown_parameter_is_not_dropped_in_silence() -> None:
    with pytest.raises(TypeError, match="temprature"):
        SamplingParams(temprature=0.5)  # type: ignore[call-arg]
