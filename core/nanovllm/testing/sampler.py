"""SamplerConformance: the one order of docs/sampling-parameters.md, turned into tests.

    class TestAcme(SamplerConformance):
        @pytest.fixture(scope="class")
        @classmethod
        def config(cls):
            return {"sampler": "acme"}

`NumpySampler` is the reference: for the same logits and the same uniform number, the same token, except where
rounding decides on which side of a border a number lies. This file knows no array library: `to_logits` does.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ..batch import FloatArray, Sampled, SampleRow
from ..request import SamplingParams
from ..rng import uniforms
from ..sampler import NumpySampler
from .fresh import plugin_name
from .hygiene import Hygiene
from .sampler_rows import LAST, WIDE, crowd, make_row, moved, said
from .suite import level, searched

_VOCAB = 24  # of the small examples
_NUMBERS = 16  # uniform numbers that each of them is drawn with
_FILTERS: tuple[dict[str, Any], ...] = ({}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.5})

Draw: TypeAlias = Callable[[FloatArray, Sequence[SampleRow]], Sampled]  # logits (R, vocab) float32

_uniform = st.sampled_from([0.0, 0.25, 0.5, 0.75, LAST]) | st.floats(0, LAST)
_logit = st.integers(-3, 3).map(float) | st.floats(-30, 30, width=32) | st.just(-math.inf)  # whole numbers tie
_logits = st.lists(_logit, min_size=_VOCAB, max_size=_VOCAB).filter(lambda x: max(x) > -math.inf) | st.lists(
    st.floats(-9, -1, width=32), min_size=_VOCAB, max_size=_VOCAB
)
_token = st.integers(0, _VOCAB - 1)
_temperature = st.sampled_from([0.3, 1.0, 2.5, 100.0])
_penalties = {
    "repetition_penalty": st.floats(0.5, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
}
_bias = st.dictionaries(_token, st.floats(-20, 20), min_size=1, max_size=4)
_top_p = st.sampled_from([0.25, 0.5, 0.9, LAST]) | st.floats(0.01, 1)
_min_p = st.sampled_from([0.1, 0.5, 1.0]) | st.floats(0, 1)
_mask = st.lists(st.booleans(), min_size=_VOCAB, max_size=_VOCAB).filter(any)


class SamplerConformance(Hygiene):
    """Whether a sampler draws what NumpySampler draws: the same token for the same logits, row and uniform number.

    `rounding`: how near to a border, relatively, either side of it is right.
    """

    group = "samplers"
    rounding: ClassVar[float] = 1e-9

    @classmethod
    def to_logits(cls, logits: FloatArray, kind: str) -> Any:
        """The same numbers in the sampler's own array type; by default, the library's that it is named after."""
        if kind == "numpy":
            return logits
        return importlib.import_module(kind).from_dlpack(logits)

    @pytest.fixture(scope="class")
    @classmethod
    def sampler(cls, config: Mapping[str, Any], makeable: None) -> Any:
        return cls.make(config)

    @pytest.fixture(scope="class")
    @classmethod
    def kind(cls, config: Mapping[str, Any]) -> str:
        return plugin_name(cls.group, config).partition("@")[0]

    @pytest.fixture(scope="class")
    @classmethod
    def draw(cls, sampler: Any, kind: str) -> Draw:
        """The sampler, as a function of NumPy logits."""
        return lambda logits, rows: sampler.sample(cls.to_logits(np.array(logits, np.float32), kind), rows)

    # ------------------------------------------------------------------- basic: the order, step by step

    @level("basic")
    def test_greedy_takes_the_largest_and_of_equals_the_first(self, draw: Draw) -> None:
        logits = np.array([[1, 5, 5, 2], [3, 3, 3, 3], [-9, -8, -7, -7]], np.float32)
        rows = [make_row(SamplingParams(temperature=0))] * 3
        sampled = draw(logits, rows)
        assert [int(i) for i in sampled.ids] == [1, 0, 2], f"greedy draws {_ids(sampled)} where [1, 0, 2] is right"
        assert not sampled.errors, f"greedy rows have errors: {dict(sampled.errors)}"
        assert sampled.logprobs is None, "nobody asked for logprobs"

    @level("basic")
    def test_repetition_penalty(self, draw: Draw) -> None:
        """Over prompt and answer; a negative logit is multiplied."""
        self._compare(draw, st.fixed_dictionaries({"repetition_penalty": st.floats(0.5, 2)}))

    @level("basic")
    def test_presence_and_frequency_penalties(self, draw: Draw) -> None:
        """Over the answer alone."""
        self._compare(draw, st.fixed_dictionaries({k: v for k, v in _penalties.items() if "repetition" not in k}))

    @level("basic")
    def test_logit_bias(self, draw: Draw) -> None:
        self._compare(draw, st.fixed_dictionaries({"logit_bias": _bias}), temperature=st.sampled_from([0.0, 1.0]))

    @level("basic")
    def test_mask(self, draw: Draw) -> None:
        self._compare(draw, st.just({}), temperature=st.sampled_from([0.0, 1.0]), mask=_mask)

    @level("basic")
    def test_min_tokens(self, draw: Draw) -> None:
        """No stop id before the answer has so many; a stop id may lie outside the vocabulary."""
        options = st.fixed_dictionaries({"min_tokens": st.integers(1, 4)})
        self._compare(draw, options, stop_ids=st.lists(st.integers(0, _VOCAB + 3), max_size=3))

    @level("basic")
    def test_temperature(self, draw: Draw) -> None:
        self._compare(draw, st.just({}))

    @level("basic")
    def test_top_k(self, draw: Draw) -> None:
        self._compare(draw, st.fixed_dictionaries({"top_k": st.integers(1, _VOCAB + 2)}))

    @level("basic")
    def test_top_p(self, draw: Draw) -> None:
        self._compare(draw, st.fixed_dictionaries({"top_p": _top_p}))

    @level("basic")
    def test_min_p(self, draw: Draw) -> None:
        self._compare(draw, st.fixed_dictionaries({"min_p": _min_p}))

    @level("basic")
    def test_the_order_of_all(self, draw: Draw) -> None:
        every = _penalties | {
            "logit_bias": _bias, "top_k": st.integers(1, _VOCAB), "top_p": _top_p, "min_p": _min_p,
            "min_tokens": st.integers(0, 4),
        }  # fmt: skip
        self._compare(
            draw,
            st.fixed_dictionaries({}, optional=every),
            mask=st.none() | _mask,
            stop_ids=st.lists(_token, max_size=2),
        )

    @level("basic")
    def test_logprobs_are_of_the_raw_logits(self, draw: Draw) -> None:
        """With rank and best tokens; before penalties, bias and temperature."""

        @searched
        @given(_logits, st.integers(0, 20), _token, _uniform)
        def check(logits: list[float], num_top: int, target: int, uniform: float) -> None:
            params = SamplingParams(
                logprobs=num_top, prompt_logprobs=num_top, temperature=0.5, top_k=3, logit_bias={1: 2.0}
            )
            rows = [make_row(params, uniform), make_row(params, target=target), make_row(SamplingParams(), uniform)]
            x = np.array([logits] * 3, np.float32)
            got = draw(x, rows)
            assert got.logprobs is not None, "logprobs were asked for and did not come"
            assert len(got.logprobs) == 3, f"there are {len(got.logprobs)} logprobs for 3 rows"
            assert got.logprobs[2] is None, "a row that asked for no logprobs has some"
            assert int(got.ids[1]) == target, f"a scoring row has the id {got.ids[1]}, not its target {target}"
            for r, row in enumerate(rows[:2]):
                # Score what was drawn: which token that is, other tests ask.
                scored = NumpySampler().sample(x[r : r + 1], [row._replace(target=int(got.ids[r]))]).logprobs
                assert scored is not None, "a scoring row always has a logprob"
                self._same_logprob(got.logprobs[r], scored[0])

        check()

    # ------------------------------------------------------------------------------------ batched

    @level("batched")
    def test_a_row_is_the_same_alone_and_in_any_order(self, draw: Draw) -> None:
        logits, rows = crowd()
        together = draw(logits, rows)
        order = np.random.default_rng(1).permutation(len(rows))
        shuffled = draw(logits[order], [rows[r] for r in order])
        for place, r in enumerate(order.tolist()):
            alone = int(draw(logits[r : r + 1], [rows[r]]).ids[0])
            among = {int(together.ids[r]), int(shuffled.ids[place])}
            assert among == {alone}, f"{said(rows[r])} draws {alone} alone and {sorted(among)} in company"

    @level("batched")
    def test_a_crowd_draws_what_the_reference_draws(self, draw: Draw) -> None:
        """Every kind of row in one batch of a wide vocabulary, with logits that tie by the hundred."""
        logits, rows = crowd()
        self._check(draw(logits, rows), logits, rows)

    @level("batched")
    def test_hundreds_of_rows(self, draw: Draw) -> None:
        rng = np.random.default_rng(2)
        logits = rng.normal(size=(300, _VOCAB)).astype(np.float32)
        rows = [make_row(SamplingParams(temperature=n % 3), rng.random()) for n in range(len(logits))]
        self._check(draw(logits, rows), logits, rows)

    # ------------------------------------------------------------------------------------- robust

    @level("robust")
    def test_bad_logits_stay_in_their_row(self, draw: Draw) -> None:
        for options in ({"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"logprobs": 1}):
            rows = [make_row(SamplingParams(**({"temperature": 1.0} | options)), 0.6) for _ in range(3)]
            for bad in ([np.nan, 1, 2], [1, np.inf, 2], [-np.inf] * 3):
                logits = np.array([[1, 2, 3], bad, [3, 2, 1]], np.float32)
                got, wanted = draw(logits, rows), NumpySampler().sample(logits, rows)
                assert set(got.errors) == {1}, f"of rows 0 to 2, row 1 with {bad} is bad; errors: {dict(got.errors)}"
                assert isinstance(got.errors[1], str), f"an error is {got.errors[1]!r}, not a sentence"
                pairs = [(int(got.ids[r]), int(wanted.ids[r])) for r in (0, 2)]
                assert all(one == other for one, other in pairs), f"the neighbours of a row with {bad} draw otherwise"

    @level("robust")
    def test_a_row_with_nothing_allowed_is_an_error(self, draw: Draw) -> None:
        for temperature in (0.0, 1.0):
            params = SamplingParams(temperature=temperature)
            rows = [make_row(params), make_row(params, mask=[False] * 3), make_row(params)]
            got = draw(np.array([[0, 0, 9]] * 3, np.float32), rows)
            assert set(got.errors) == {1}, f"row 1 may draw nothing; errors: {dict(got.errors)}"
            assert [int(got.ids[r]) for r in (0, 2)] == [2, 2], "its neighbours draw otherwise"

    @level("robust")
    def test_the_logits_are_not_changed(self, sampler: Any, kind: str) -> None:
        """They are the runner's own memory, and a step may look at them again."""
        numbers = np.random.default_rng(0).normal(size=(4, _VOCAB)).astype(np.float32)
        logits = self.to_logits(numbers.copy(), kind)
        changing = SamplingParams(
            temperature=0.5, logprobs=3, logit_bias={0: 5.0, 3: -5.0}, top_k=2, top_p=0.7, repetition_penalty=1.5
        )
        sampler.sample(logits, [make_row(changing, 0.9)] * 4)
        # What it says about them afterwards, with every token's log-probability.
        rows = [make_row(SamplingParams(prompt_logprobs=20), target=i) for i in range(4)]
        after, wanted = sampler.sample(logits, rows).logprobs, NumpySampler().sample(numbers, rows).logprobs
        assert after is not None, "scoring rows have no logprobs"
        assert wanted is not None, "a scoring row always has a logprob"
        for one, other in zip(after, wanted, strict=True):
            assert one is not None, "a scoring row has no logprob"
            close = math.isclose(one.logprob, other.logprob, abs_tol=1e-4) if other else False
            assert close, "the logits are others after sampling: adjust a copy"

    @level("robust")
    def test_extreme_numbers(self, draw: Draw) -> None:
        """Weights that vanish, logits as large as float32 has, temperatures next to nothing."""
        for logits in ([3e38, -3e38, 0, 3e38], [-1e30, -1e30, -math.inf, -1e30], [1e-38, 0, -1e-38, 1e-45]):
            for temperature in (1e-300, 1e-3, 1.0, 100.0):
                for uniform in (0.0, 0.5, LAST):
                    for filters in _FILTERS:
                        rows = [make_row(SamplingParams(**filters, temperature=temperature), uniform)]
                        x = np.array([logits], np.float32)
                        self._check(draw(x, rows), x, rows)

    # ------------------------------------------------------------------------------ deterministic

    @level("deterministic")
    def test_the_number_decides(self, draw: Draw) -> None:
        """The core draws one number per seed and position; a sampler draws none of its own."""
        numbers = uniforms([7, 7, 8, 2**63], [0, 1, 0, 0], [5, 5, 5, 6])
        rows = [make_row(SamplingParams(temperature=1.0, seed=7), float(u)) for u in numbers]
        logits = np.zeros((len(rows), WIDE), np.float32)
        first, second = _ids(draw(logits, rows)), _ids(draw(logits, rows))
        assert first == second, f"the same numbers draw {first} and then {second}"
        wanted = [min(int(u * WIDE), WIDE - 1) for u in numbers]  # all weights are one
        off = max(abs(one - other) for one, other in zip(first, wanted, strict=True))
        assert off <= 1, f"of {WIDE} equal tokens, the numbers {numbers.round(4).tolist()} draw {first}, not {wanted}"

    @level("deterministic")
    def test_two_samplers_agree(self, draw: Draw, config: Mapping[str, Any], kind: str) -> None:
        logits, rows = crowd()
        other = self.make(config).sample(self.to_logits(logits, kind), rows)
        assert _ids(draw(logits, rows)) == _ids(other), "two samplers of one configuration draw different tokens"

    # --------------------------------------------------------------------------------------- fast

    @level("fast")
    def test_speed(self, draw: Draw, record_property: Any) -> None:
        """Says the speed, and asks for none."""
        rows = [make_row(SamplingParams(temperature=0.8, top_k=40, top_p=0.95), u / 32) for u in range(32)]
        logits = np.random.default_rng(0).normal(size=(32, 32_000)).astype(np.float32) * 3
        seconds = {}
        for name, one in (("this", draw), ("numpy", NumpySampler().sample)):
            assert len(one(logits, rows).ids) == 32, "32 rows are 32 ids"  # the first call may compile something
            started = time.perf_counter()
            one(logits, rows)
            seconds[name] = time.perf_counter() - started
        record_property(
            "note",
            f"32 rows of 32,000 logits in {seconds['this'] * 1e3:.2g} ms, copy included: "
            f"{seconds['numpy'] / seconds['this']:.2g} times the speed of the NumPy sampler",
        )

    # ------------------------------------------------------------------------------------ helpers

    def _compare(
        self,
        draw: Draw,
        options: st.SearchStrategy[dict[str, Any]],
        temperature: st.SearchStrategy[float] = _temperature,
        mask: st.SearchStrategy[list[bool] | None] = st.none(),  # noqa: B008 (immutable)
        stop_ids: st.SearchStrategy[list[int]] = st.just([]),  # noqa: B008
    ) -> None:
        """Search for a row that draws another token than the reference does."""

        @searched
        @given(st.data())
        def check(data: st.DataObject) -> None:
            context = data.draw(st.lists(_token, min_size=1, max_size=16))
            row = make_row(
                SamplingParams(temperature=data.draw(temperature), **data.draw(options)),
                data.draw(_uniform),
                context,
                data.draw(st.integers(1, len(context))),
                data.draw(mask),
                data.draw(stop_ids),
            )
            logits = np.array([data.draw(_logits)] * _NUMBERS, np.float32)
            # The number that was searched for, and others all over the distribution.
            rows = [row, *(row._replace(uniform=(i + 0.5) / _NUMBERS) for i in range(1, _NUMBERS))]
            sampled = draw(logits, rows)
            if 0 in NumpySampler().sample(logits, rows).errors:  # the mask left only -inf
                assert 0 in sampled.errors, f"{said(row)} may draw nothing, and draws something"
            else:
                self._check(sampled, logits, rows)

        check()

    def _check(self, sampled: Sampled, logits: FloatArray, rows: Sequence[SampleRow]) -> None:
        """Every token is the reference's, or would be on the other side of a border."""
        assert len(sampled.ids) == len(rows), f"there are {len(sampled.ids)} ids for {len(rows)} rows"
        if sampled.errors:
            r, error = next(iter(sampled.errors.items()))
            pytest.fail(f"{said(rows[r])} ends in an error: {error}")
        sides = (-self.rounding, 0.0, self.rounding)
        for r, wanted in enumerate(NumpySampler().sample(logits, rows).ids):
            token, row = int(sampled.ids[r]), rows[r]
            if token != wanted:
                near = [moved(row, u, 1 + b) for u in sides for b in sides]
                right = {int(i) for i in NumpySampler().sample(np.stack([logits[r]] * len(near)), near).ids}
                assert token in right, f"{said(row)} draws {token}, the reference {wanted}"

    def _same_logprob(self, got: Any, wanted: Any) -> None:
        assert got is not None, "a row that asked for logprobs has none"
        assert (got.token_id, got.rank) == (wanted.token_id, wanted.rank), (
            f"token {wanted.token_id} has rank {wanted.rank}; the sampler says token {got.token_id}, rank {got.rank}"
        )
        assert [i for i, _ in got.top] == [i for i, _ in wanted.top], (
            f"the best tokens are {[i for i, _ in wanted.top]}, ties by the lowest id, not {[i for i, _ in got.top]}"
        )
        values = [(got.logprob, wanted.logprob), *zip((v for _, v in got.top), (v for _, v in wanted.top), strict=True)]
        wrong = next((pair for pair in values if not math.isclose(*pair, rel_tol=1e-5, abs_tol=1e-5)), None)
        assert wrong is None, f"a log-probability is {wrong and wrong[0]}, by the raw logits it is {wrong and wrong[1]}"


def _ids(sampled: Sampled) -> list[int]:
    return [int(i) for i in sampled.ids]
