"""NumpySampler against a reference written from docs/sampling-parameters.md with sorted() and fractions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import special, stats

from nanovllm import rng, sampler
from nanovllm.batch import Sampled, SampleRow, TokenLogprob
from nanovllm.request import SamplingParams
from nanovllm.sampler import NumpySampler
from nanovllm.testing.sampler_rows import make_row

INF = math.inf
ALMOST_ONE = 1 - 2.0**-53  # the largest number that rng.uniforms gives


def run(logits: Any, rows: Sequence[SampleRow]) -> Sampled:
    """Sample from read-only logits."""
    logits = np.array(logits)
    if logits.dtype != np.float64:
        logits = logits.astype(np.float32)
    logits.setflags(write=False)
    return NumpySampler().sample(logits, rows)


def one(logits: Sequence[float], params: SamplingParams, **row: Any) -> int:
    sampled = run([logits], [make_row(params, **row)])
    assert not sampled.errors
    return int(sampled.ids[0])


# ------------------------------------------------------------------------------- the reference


def adjusted(logits: Sequence[float], row: SampleRow) -> list[float]:
    """Penalties, bias, mask, min_tokens: steps 1 to 4."""
    params, context = row.sampling.params, row.context.tolist()
    generated = context[row.num_prompt :]
    out = []
    for token, x in enumerate(map(float, logits)):
        if token in context and params.repetition_penalty != 1:
            x = x / params.repetition_penalty if x > 0 else x * params.repetition_penalty
        if token in generated:
            x -= params.presence_penalty + params.frequency_penalty * generated.count(token)
        x += (params.logit_bias or {}).get(token, 0)
        if row.sampling.mask is not None and not row.sampling.mask[token]:
            x = -INF
        if len(generated) < params.min_tokens and token in row.sampling.stop_ids:
            x = -INF
        out.append(x)
    return out


def kept(x: Sequence[float], params: SamplingParams, slack: float = 0.0) -> dict[int, Fraction]:
    """Temperature, top-k, top-p, min-p: steps 5 to 8. The weight of each token left, by ascending id."""
    best = max(x)
    weight = {token: Fraction(math.exp((v - best) / params.temperature)) for token, v in enumerate(x)}
    ranked = sorted(weight, key=lambda token: (-x[token], token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    if params.top_p < 1:
        goal = sum(weight[token] for token in ranked) * Fraction(params.top_p) * (1 + Fraction(slack))
        nucleus, held = ranked[:1], weight[ranked[0]]
        for token in ranked[1:]:
            if held >= goal:
                break
            nucleus.append(token)
            held += weight[token]
        ranked = nucleus
    least = Fraction(params.min_p) * (1 + Fraction(slack))
    return {t: weight[t] for t in sorted(ranked) if weight[t] >= least or t == ranked[0]}


def draws(weights: dict[int, Fraction], uniform: float, slack: float = 0.0) -> set[int]:
    """The tokens whose stretch of the cumulative weight holds uniform × total, give or take the slack."""
    total = sum(weights.values())
    low, high = (Fraction(uniform) + Fraction(s) for s in (-slack, slack))
    found, before = set(), Fraction(0)
    for token, weight in weights.items():
        if weight > 0 and before <= high * total and low * total < before + weight:
            found.add(token)
        before += weight
    return found


def expected(logits: Sequence[float], row: SampleRow, exact: bool) -> set[int]:
    """Every token that is right up to the rounding of exp; only one if `exact`."""
    x = adjusted(logits, row)
    if max(x) == -INF:
        return set()
    params = row.sampling.params
    if params.temperature == 0:
        return {x.index(max(x))}
    slack = 0.0 if exact else 1e-12
    return set().union(*(draws(kept(x, params, s), row.uniform, slack) for s in {0.0, slack, -slack}))


@contextmanager
def tiny_chunks(chunk: int = 8, block: int = 3, nucleus: int = 2) -> Iterator[None]:
    """Make rows of five tokens count as wide, so that small examples reach the wide rows' shortcuts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_CHUNK", chunk), ("_WIDE", chunk // 2), ("_BLOCK", block), ("_NUCLEUS", nucleus)):
            patch.setattr(sampler, name, value)
        yield


# ------------------------------------------------------------------------------------ strategies

uniforms = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, ALMOST_ONE]), st.floats(0, ALMOST_ONE))
logit = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    st.floats(-30, 30, width=32),
    st.just(-INF),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@st.composite
def params(draw: st.DrawFn, vocab: int) -> SamplingParams:
    """Each parameter at its default half of the time."""

    def maybe(name: str, strategy: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {name: draw(strategy)} if draw(st.booleans()) else {}

    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.0, 2.5, 100.0, 1e-300])),
        **maybe("top_k", st.integers(1, vocab + 2)),
        **maybe("top_p", st.one_of(st.sampled_from([5e-324, 0.25, 0.5, 0.9, ALMOST_ONE]), st.floats(0.01, 1))),
        **maybe("min_p", st.one_of(st.sampled_from([0.1, 1.0]), st.floats(0, 1))),
        **maybe("repetition_penalty", st.floats(0.5, 2)),
        **maybe("presence_penalty", st.floats(-2, 2)),
        **maybe("frequency_penalty", st.floats(-2, 2)),
        **maybe("logit_bias", st.dictionaries(st.integers(0, vocab - 1), st.floats(-100, 100), max_size=4)),
        **maybe("min_tokens", st.integers(0, 4)),
        **maybe("logprobs", st.integers(0, 5)),
    )


@st.composite
def problems(draw: st.DrawFn, max_rows: int = 1, max_vocab: int = 40) -> tuple[list[list[float]], list[SampleRow]]:
    vocab = draw(st.integers(1, max_vocab))
    token = st.integers(0, vocab - 1)
    logits, rows = [], []
    for _ in range(draw(st.integers(1, max_rows))):
        logits.append(draw(st.lists(logit, min_size=vocab, max_size=vocab)))
        context = draw(st.lists(token, min_size=1, max_size=8))
        rows.append(
            make_row(
                draw(params(vocab)),
                draw(uniforms),
                context,
                draw(st.integers(1, len(context))),
                draw(st.none() | st.lists(st.booleans(), min_size=vocab, max_size=vocab)),
                draw(st.lists(st.integers(0, vocab + 1), max_size=3)),
            )
        )
    return logits, rows


# ------------------------------------------------------------------------- every parameter at once


@settings(max_examples=400)
@given(problems())
def test_every_combination_agrees_with_the_reference(problem: tuple[list[list[float]], list[SampleRow]]) -> None:
    (logits,), (row,) = problem
    want = expected(logits, row, exact=False)
    for sampled in (run([logits], [row]), _with_tiny_chunks([logits], [row])):
        if want:
            assert not sampled.errors
            assert sampled.ids[0] in want
        else:
            assert sampled.errors.keys() == {0}


@settings(max_examples=300)
@given(st.data())
def test_exactly_where_all_weights_are_one(data: st.DataObject) -> None:
    """Equal logits make every sum a whole number: no rounding, so ties and borders must be exact."""
    vocab = data.draw(st.integers(1, 40))
    logits = data.draw(st.lists(st.sampled_from([2.0, 2.0, -INF]), min_size=vocab, max_size=vocab))
    eighths = st.integers(1, 8).map(lambda i: i / 8)
    filters = SamplingParams(
        top_k=data.draw(st.integers(0, vocab)), top_p=data.draw(eighths), min_p=data.draw(st.sampled_from([0.0, 1.0]))
    )
    row = make_row(filters, data.draw(st.integers(0, 63).map(lambda i: i / 64)))
    want = expected(logits, row, exact=True)
    for sampled in (run([logits], [row]), _with_tiny_chunks([logits], [row])):
        assert ({sampled.ids[0]} if not sampled.errors else set()) == want


def _with_tiny_chunks(logits: Any, rows: Sequence[SampleRow]) -> Sampled:
    with tiny_chunks():
        return run(logits, rows)


@settings(max_examples=200)
@given(problems(max_rows=9), st.booleans())
def test_a_row_is_the_same_alone_and_in_any_batch(
    problem: tuple[list[list[float]], list[SampleRow]], tiny: bool
) -> None:
    logits, rows = problem
    sampler_of_the_day = _with_tiny_chunks if tiny else run
    together = sampler_of_the_day(logits, rows)
    for r, row in enumerate(rows):
        alone = sampler_of_the_day([logits[r]], [row])
        assert together.errors.get(r) == alone.errors.get(0)
        if not alone.errors:
            assert together.ids[r] == alone.ids[0]
            assert _logprob(together, r) == _logprob(alone, 0)


def _logprob(sampled: Sampled, r: int) -> TokenLogprob | None:
    return None if sampled.logprobs is None else sampled.logprobs[r]


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    "filters",
    [{}, {"min_p": 0.05}, {"top_k": 1}, {"top_k": 50}, {"top_k": 15_000}, {"top_p": 0.3}, {"top_p": 0.95},
     {"top_k": 200, "top_p": 0.8, "min_p": 0.01, "temperature": 0.7}],
)  # fmt: skip
def test_a_wide_vocabulary(filters: dict[str, Any], scale: float) -> None:
    """40,000 tokens, coarse logits with many ties, at the real sizes of the shortcuts."""
    generator = np.random.default_rng(0)
    logits = (generator.normal(size=(3, 40_000)) * scale).round(1).astype(np.float32)
    params = SamplingParams(**filters)
    us = [0.0, 0.37, ALMOST_ONE]
    sampled = run(logits, [make_row(params, u) for u in us])
    for x, u, token in zip(logits.astype(np.float64), us, sampled.ids, strict=True):
        order = np.lexsort((np.arange(len(x)), -x))  # best first, ties by id
        weights = np.exp((x[order] - x.max()) / params.temperature)
        weights[params.top_k or len(x) :] = 0
        before = np.cumsum(weights) - weights
        weights[before >= (params.top_p if params.top_p < 1 else INF) * weights.sum()] = 0
        weights[weights < params.min_p] = 0
        by_id = np.zeros(len(x))
        by_id[order] = weights
        cumulative = np.cumsum(by_id) / by_id.sum()
        assert by_id[token] > 0
        assert cumulative[token] >= u - 1e-9
        assert cumulative[token] - by_id[token] / by_id.sum() <= u + 1e-9


# ----------------------------------------------------------------------------- one rule at a time


@given(st.lists(logit, min_size=1, max_size=30).filter(lambda x: max(x) > -INF), uniforms)
def test_what_equals_greedy(logits: list[float], uniform: float) -> None:
    best = logits.index(max(logits))
    assert one(logits, SamplingParams(temperature=0)) == best
    assert one(logits, SamplingParams(temperature=0, logprobs=0)) == best  # not on the fast path
    assert one(logits, SamplingParams(temperature=0, top_k=3, top_p=0.1, min_p=0.5), uniform=uniform) == best
    assert one(logits, SamplingParams(top_k=1), uniform=uniform) == best
    assert one(logits, SamplingParams(top_p=5e-324), uniform=uniform) == best
    weights = [math.exp(x - max(logits)) for x in logits]
    assert weights[one(logits, SamplingParams(min_p=1), uniform=uniform)] == 1


def test_ties_go_to_the_lowest_id() -> None:
    logits = [0.0, 5.0, 5.0, 5.0, 5.0, -1.0]
    assert one(logits, SamplingParams(temperature=0)) == 1
    drawn = {u: one(logits, SamplingParams(top_k=2), uniform=u) for u in (0.0, 0.49, 0.5, ALMOST_ONE)}
    assert drawn == {0.0: 1, 0.49: 1, 0.5: 2, ALMOST_ONE: 2}
    drawn = {u: one([5.0] * 8, SamplingParams(top_p=0.25), uniform=u) for u in (0.0, 0.49, 0.5, ALMOST_ONE)}
    assert drawn == {0.0: 0, 0.49: 0, 0.5: 1, ALMOST_ONE: 1}


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.2)]
    assert one(logits, SamplingParams(top_p=0.49), uniform=ALMOST_ONE) == 0
    assert one(logits, SamplingParams(top_p=0.6), uniform=ALMOST_ONE) == 1
    assert one(logits, SamplingParams(top_p=0.81), uniform=ALMOST_ONE) == 2


def test_top_p_is_of_what_top_k_left() -> None:
    """0.4 of the whole is two tokens; 0.4 of the best two, renormalised to 4/7 and 3/7, is one."""
    logits = [math.log(p) for p in (0.36, 0.27, 0.2, 0.17)]
    assert one(logits, SamplingParams(top_p=0.4), uniform=ALMOST_ONE) == 1
    assert one(logits, SamplingParams(top_p=0.4, top_k=2), uniform=ALMOST_ONE) == 0


def test_top_k_alone_drops_no_token_that_is_too_small_to_change_the_sum() -> None:
    assert one([0.0, 50.0, -1.0], SamplingParams(top_k=2), uniform=0.0) == 0
    assert one([0.0, 50.0, -1.0], SamplingParams(top_k=2, top_p=0.99), uniform=0.0) == 1


def test_temperature_comes_before_the_filters() -> None:
    logits = [math.log(p) for p in (0.6, 0.4)]
    assert one(logits, SamplingParams(top_p=0.65), uniform=ALMOST_ONE) == 1
    assert one(logits, SamplingParams(top_p=0.65, temperature=0.5), uniform=ALMOST_ONE) == 0  # 0.36 : 0.16
    assert one(logits, SamplingParams(min_p=0.5), uniform=ALMOST_ONE) == 1
    assert one(logits, SamplingParams(min_p=0.5, temperature=0.5), uniform=ALMOST_ONE) == 0


def test_repetition_penalty_reads_prompt_and_answer_and_counts_once() -> None:
    params = SamplingParams(temperature=0, repetition_penalty=2)
    assert one([3.0, 2.0], params, context=[0, 0, 0], num_prompt=1) == 1  # 1.5 < 2
    assert one([3.0, 1.4], params, context=[0, 0, 0], num_prompt=1) == 0  # 3/8 if it counted thrice
    assert one([-1.0, -1.9], params, context=[0], num_prompt=1) == 1  # negative logits are multiplied
    assert one([3.0, 2.0], params, context=[1], num_prompt=1) == 0


def test_presence_and_frequency_read_the_answer_only() -> None:
    presence, frequency = (SamplingParams(temperature=0, **{f"{n}_penalty": 1.0}) for n in ("presence", "frequency"))
    assert one([3.0, 1.5], presence, context=[0, 0, 0], num_prompt=3) == 0
    assert one([3.0, 1.5], presence, context=[0, 0, 0], num_prompt=1) == 0  # 2, once
    assert one([3.0, 1.5], frequency, context=[0, 0, 0], num_prompt=3) == 0
    assert one([3.0, 1.5], frequency, context=[0, 0, 0], num_prompt=1) == 1  # 1, twice
    assert one([3.0, 2.5], presence, context=[0, 0, 0], num_prompt=1) == 1


def test_repetition_comes_before_the_other_penalties_and_bias() -> None:
    # Repetition first: 3 / 2 - 2 = -0.5. Last: (3 - 2) / 2 = 0.5.
    both = SamplingParams(temperature=0, repetition_penalty=2, presence_penalty=2)
    assert one([3.0, 0.0], both, context=[0, 0], num_prompt=1) == 1
    # Repetition first: 3 / 2 + 1 = 2.5. Last: (3 + 1) / 2 = 2.
    biased = SamplingParams(temperature=0, repetition_penalty=2, logit_bias={0: 1.0})
    assert one([3.0, 2.2], biased, context=[0, 0], num_prompt=1) == 0


def test_a_bias_lifts_no_masked_token() -> None:
    params = SamplingParams(temperature=0, logit_bias={0: 100.0})
    assert one([1.0, 0.0, 0.0], params) == 0
    assert one([1.0, 0.0, 0.0], params, mask=[False, True, True]) == 1


def test_min_tokens_bans_the_stop_ids_until_there_are_enough() -> None:
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, top_k=1, min_tokens=2)
        row = {"num_prompt": 2, "stop_ids": [1, 3, 99]}  # 99 is beyond the logits
        assert one([0.0, 9.0, 1.0, 8.0], params, context=[0, 0], **row) == 2
        assert one([0.0, 9.0, 1.0, 8.0], params, context=[0, 0, 0], **row) == 2
        assert one([0.0, 9.0, 1.0, 8.0], params, context=[0, 0, 0, 0], **row) == 1


def test_a_vanishing_temperature_is_greedy() -> None:
    assert one([1.0, 1.0 + 2**-20, 0.0], SamplingParams(temperature=5e-324), uniform=ALMOST_ONE) == 1


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_dtypes(dtype: type) -> None:
    logits = np.array([[0.0, 3.0, 1.0], [4.0, 3.0, 1.0]], dtype)
    rows = [make_row(SamplingParams(temperature=0)), make_row(SamplingParams(logprobs=1), 0.0)]
    sampled = NumpySampler().sample(logits, rows)
    assert list(sampled.ids) == [1, 0]
    assert sampled.logprobs[1].top[0] == (0, pytest.approx(special.log_softmax([4.0, 3.0, 1.0])[0]))


def test_a_list_of_rows_is_read_in_order() -> None:
    assert list(run(np.eye(5), [make_row(SamplingParams(temperature=0))] * 5).ids) == [0, 1, 2, 3, 4]


# ------------------------------------------------------------------------------- distribution

CHI_SQUARE = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
    "adjusted": {"repetition_penalty": 1.3, "frequency_penalty": 0.7, "presence_penalty": -0.4, "logit_bias": {2: 1.0}},
}


@pytest.mark.parametrize("name", CHI_SQUARE)
def test_frequencies_follow_the_distribution(name: str) -> None:
    num, vocab = 20_000, 12
    logits = np.random.default_rng(3).uniform(-1.5, 1.5, vocab).astype(np.float32)
    params = SamplingParams(**CHI_SQUARE[name])
    us = rng.uniforms([2026] * num, [0] * num, range(100, 100 + num)).tolist()
    rows = [make_row(params, u, context=[1, 2, 3, 3, 4], num_prompt=2) for u in us]
    drawn = np.bincount(run(logits[None].repeat(num, axis=0), rows).ids, minlength=vocab)
    weights = kept(adjusted(logits.tolist(), rows[0]), params)
    assert len(weights) > 2
    assert set(np.flatnonzero(drawn)) <= set(weights)
    total = float(sum(weights.values()))
    frequencies = [float(w) / total * num for w in weights.values()]
    assert stats.chisquare(drawn[list(weights)], frequencies).pvalue > 1e-4


# --------------------------------------------------------------------------------- bad logits


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ([1.0, math.nan, 2.0, INF], "the runner returned NaN logits"),
        ([INF, math.nan, 2.0, 0.0], "the runner returned NaN logits"),
        ([1.0, INF, 2.0, -INF], "the runner returned an infinite logit"),
        ([-INF] * 4, "the runner returned no finite logit"),
    ],
)
@pytest.mark.parametrize("filters", [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5, "logprobs": 3}])
def test_a_bad_row_is_named_and_changes_no_neighbour(bad: list[float], why: str, filters: dict[str, Any]) -> None:
    good = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
    rows = [make_row(SamplingParams(**filters), u) for u in (0.1, 0.3, 0.5, 0.7, 0.9)]
    clean = run(good, rows)
    spoilt = good.copy()
    spoilt[[1, 4]] = bad
    sampled = run(spoilt, rows)
    assert sampled.errors == {1: why, 4: why}
    for r in (0, 2, 3):
        assert sampled.ids[r] == clean.ids[r]
        assert _logprob(sampled, r) == _logprob(clean, r)


def test_a_mask_does_not_hide_nan() -> None:
    row = make_row(SamplingParams(), mask=[True, False])
    assert run([[0.0, math.nan]], [row]).errors == {0: "the runner returned NaN logits"}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_draw(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=2, logprobs=1, min_tokens=5)
    rows = [
        make_row(params, mask=[False] * 3),
        make_row(params, stop_ids=[0, 1, 2]),
        make_row(params, mask=[True, False, False], stop_ids=[0]),
        make_row(params, mask=[False, False, True], stop_ids=[0]),
    ]
    sampled = run([[1.0, 2.0, 3.0]] * 4, rows)
    assert sampled.errors.keys() == {0, 1, 2}
    assert all("mask and min_tokens left no finite logit" in why for why in sampled.errors.values())
    assert sampled.ids[3] == 2
    assert [lp is None for lp in sampled.logprobs] == [True, True, True, False]


def test_a_penalty_that_overflows_fails_its_row_only() -> None:
    rows = [make_row(SamplingParams(repetition_penalty=1e-320)), make_row(SamplingParams(top_k=1))]
    sampled = run([[1.0, 2.0], [1.0, 2.0]], rows)
    assert sampled.errors.keys() == {0}
    assert "left an infinite logit" in sampled.errors[0]
    assert sampled.ids[1] == 1


# ----------------------------------------------------------------------------------- logprobs


@given(st.data())
def test_logprobs_are_of_the_raw_logits(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 40))
    logits = data.draw(st.lists(logit, min_size=vocab, max_size=vocab).filter(lambda x: max(x) > -INF))
    num_top = data.draw(st.integers(0, 20))
    token = data.draw(st.integers(0, vocab - 1))
    drawing = SamplingParams(logprobs=num_top, temperature=0.5, logit_bias={token: 3.0}, top_k=3)
    scoring = SamplingParams(prompt_logprobs=num_top, logprobs=1)
    rows = [make_row(drawing, 0.7), make_row(scoring, target=token), make_row(SamplingParams())]
    want = special.log_softmax(np.array(logits, np.float32).astype(np.float64))
    ranked = sorted(range(vocab), key=lambda t: (-logits[t], t))
    for sampled in (run([logits] * 3, rows), _with_tiny_chunks([logits] * 3, rows)):
        assert not sampled.errors
        assert sampled.ids[1] == token
        assert sampled.logprobs[2] is None
        for r in (0, 1):
            got = sampled.logprobs[r]
            assert got.token_id == sampled.ids[r]
            assert got.logprob == pytest.approx(want[got.token_id], rel=1e-12, abs=1e-12)
            assert ranked[got.rank - 1] == got.token_id
            assert [t for t, _ in got.top] == ranked[:num_top]
            assert [lp for _, lp in got.top] == pytest.approx(want[ranked[:num_top]].tolist(), rel=1e-12, abs=1e-12)


def test_logprobs_of_huge_logits() -> None:
    (got,) = run([[1e30, 1e30, -1e30]], [make_row(SamplingParams(logprobs=2), 0.9)]).logprobs
    assert got == TokenLogprob(1, -math.log(2), 2, ((0, -math.log(2)), (1, -math.log(2))))


def test_no_logprobs_unless_asked() -> None:
    assert run([[1.0, 2.0]], [make_row(SamplingParams())]).logprobs is None
    assert run([[1.0, 2.0]], [make_row(SamplingParams(temperature=0))]).logprobs is None
    assert run([[1.0, 2.0]], [make_row(SamplingParams(temperature=0, logprobs=0))]).logprobs[0].top == ()


def test_each_row_lists_as_many_as_it_asked_for() -> None:
    rows = [make_row(SamplingParams(logprobs=n), 0.0) for n in (0, 3, 1, 20)]
    sampled = run([[1.0, 2.0, 3.0, 4.0]] * 4, rows)
    assert [len(lp.top) for lp in sampled.logprobs] == [0, 3, 1, 4]


def test_logprobs_of_a_wide_row() -> None:
    logits: NDArray[np.float32] = np.random.default_rng(5).normal(size=(2, 40_000)).round(2).astype(np.float32)
    sampled = run(logits, [make_row(SamplingParams(logprobs=20), 0.9), make_row(SamplingParams(), target=7)])
    for x, got in zip(logits, sampled.logprobs, strict=True):
        want = special.log_softmax(x.astype(np.float64))
        order = np.lexsort((np.arange(len(x)), -x))
        assert got.logprob == pytest.approx(want[got.token_id], rel=1e-12)
        assert order[got.rank - 1] == got.token_id
        assert [t for t, _ in got.top] == order[: len(got.top)].tolist()
