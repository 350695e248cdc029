"""What can be wrong with a sampler, one thing at a time; each is NumpySampler but for that."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nanovllm.batch import Sampled, SampleRow, TokenLogprob
from nanovllm.sampler import NumpySampler


def with_params(row: SampleRow, **changes: Any) -> SampleRow:
    return row._replace(sampling=row.sampling._replace(params=replace(row.sampling.params, **changes)))


class Changed:
    """NumpySampler on other logits and rows."""

    def logits(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> np.ndarray:
        return logits

    def row(self, row: SampleRow) -> SampleRow:
        return row

    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        return NumpySampler().sample(self.logits(logits, rows), [self.row(row) for row in rows])


class LastOfEquals(Changed):
    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        sampled = super().sample(logits, rows)
        last = logits.shape[1] - 1 - logits[:, ::-1].argmax(axis=1)
        ids = [int(last[r]) if row.sampling.is_greedy else sampled.ids[r] for r, row in enumerate(rows)]
        return sampled._replace(ids=ids)


class PenaltyRewardsNegatives(Changed):
    """Divides by the repetition penalty whatever the sign."""

    def logits(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> np.ndarray:
        logits = logits.copy()
        for x, row in zip(logits, rows, strict=True):
            x[np.unique(row.context)] /= row.sampling.params.repetition_penalty
        return logits

    def row(self, row: SampleRow) -> SampleRow:
        return with_params(row, repetition_penalty=1.0)


class FrequencyCountsThePrompt(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        return row._replace(num_prompt=0) if row.sampling.params.frequency_penalty else row


class IgnoresTheBias(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        return with_params(row, logit_bias=None)


class IgnoresTheMask(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        return row._replace(sampling=row.sampling._replace(mask=None))


class IgnoresMinTokens(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        return with_params(row, min_tokens=0)


class MultipliesByTheTemperature(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        temperature = row.sampling.params.temperature
        return with_params(row, temperature=min(100.0, 1 / temperature)) if temperature else row


class OneMoreThanTopK(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        top_k = row.sampling.params.top_k
        return with_params(row, top_k=top_k + 1) if top_k else row


class TopPWithoutTheLast(Changed):
    """Leaves out the token that crosses top_p."""

    def row(self, row: SampleRow) -> SampleRow:
        top_p = row.sampling.params.top_p
        return with_params(row, top_p=top_p / 2) if top_p < 1 else row


class MinPOfTheWhole(Changed):
    """Compares probabilities with min_p, and not with min_p times the best one's."""

    def logits(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> np.ndarray:
        logits = logits.copy()
        for x, row in zip(logits, rows, strict=True):
            params = row.sampling.params
            if params.min_p and params.temperature:
                weights = np.exp((x - x.max()) / params.temperature)
                x[(weights / weights.sum() < params.min_p) & (x < x.max())] = -np.inf
        return logits


class BiasAfterTemperature(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        params = row.sampling.params
        if not params.logit_bias or not params.temperature:
            return row
        return with_params(row, logit_bias={i: b * params.temperature for i, b in params.logit_bias.items()})


class DrawsItsOwnNumbers(Changed):
    def row(self, row: SampleRow) -> SampleRow:
        return row._replace(uniform=random.random())


class SeededByItself(Changed):
    def __init__(self) -> None:
        self.shift = random.random()

    def row(self, row: SampleRow) -> SampleRow:
        return row._replace(uniform=(row.uniform + self.shift) % 1)


class OneTopKForAll(Changed):
    """The first row's."""

    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        top_k = rows[0].sampling.params.top_k
        return super().sample(logits, [with_params(row, top_k=top_k) for row in rows])


class RaisesOnNaN(Changed):
    def logits(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> np.ndarray:
        if not np.isfinite(logits.max(axis=1)).all():
            raise ValueError("the logits are not finite")
        return logits


class DrawsFromNothing(Changed):
    """Where all is masked, the mask is forgotten."""

    def row(self, row: SampleRow) -> SampleRow:
        mask = row.sampling.mask
        return row if mask is None or mask.any() else row._replace(sampling=row.sampling._replace(mask=None))


class WritesIntoTheLogits(Changed):
    def logits(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> np.ndarray:
        for x, row in zip(logits, rows, strict=True):
            for token, bias in (row.sampling.params.logit_bias or {}).items():
                x[token] += bias
        return logits

    def row(self, row: SampleRow) -> SampleRow:
        return with_params(row, logit_bias=None)


class LogprobsAfterTemperature(Changed):
    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        temperatures = np.array([[row.sampling.params.temperature or 1.0] for row in rows], np.float32)
        return (
            super().sample(logits, rows)._replace(logprobs=NumpySampler().sample(logits / temperatures, rows).logprobs)
        )


class RanksCountEquals(Changed):
    """Of equal logits, all have the rank of the last."""

    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        sampled = super().sample(logits, rows)
        if sampled.logprobs is None:
            return sampled

        def ranked(x: np.ndarray, logprob: TokenLogprob | None) -> TokenLogprob | None:
            return logprob and logprob._replace(rank=int((x >= x[logprob.token_id]).sum()))

        return sampled._replace(logprobs=[ranked(x, lp) for x, lp in zip(logits, sampled.logprobs, strict=True)])


class SixteenBits(Changed):
    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        sampled = super().sample(logits, rows)
        return sampled._replace(ids=[i % 2**16 for i in sampled.ids])


class OneWarp(Changed):
    """Of threads: rows behind it draw nothing."""

    def sample(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> Sampled:
        sampled = super().sample(logits, rows)
        return sampled._replace(ids=[i if r < 128 else 0 for r, i in enumerate(sampled.ids)])


class HalfPrecision(Changed):
    def logits(self, logits: np.ndarray, rows: Sequence[SampleRow]) -> np.ndarray:
        with np.errstate(over="ignore"):
            return logits.astype(np.float16).astype(np.float32)


# What is wrong -> the test that says so.
CAUGHT_BY: dict[Callable[[], Any], str] = {
    LastOfEquals: "test_greedy_takes_the_largest_and_of_equals_the_first",
    PenaltyRewardsNegatives: "test_repetition_penalty",
    FrequencyCountsThePrompt: "test_presence_and_frequency_penalties",
    IgnoresTheBias: "test_logit_bias",
    IgnoresTheMask: "test_mask",
    IgnoresMinTokens: "test_min_tokens",
    MultipliesByTheTemperature: "test_temperature",
    OneMoreThanTopK: "test_top_k",
    TopPWithoutTheLast: "test_top_p",
    MinPOfTheWhole: "test_min_p",
    BiasAfterTemperature: "test_the_order_of_all",
    DrawsItsOwnNumbers: "test_the_number_decides",
    SeededByItself: "test_two_samplers_agree",
    OneTopKForAll: "test_a_row_is_the_same_alone_and_in_any_order",
    RaisesOnNaN: "test_bad_logits_stay_in_their_row",
    DrawsFromNothing: "test_a_row_with_nothing_allowed_is_an_error",
    WritesIntoTheLogits: "test_the_logits_are_not_changed",
    LogprobsAfterTemperature: "test_logprobs_are_of_the_raw_logits",
    RanksCountEquals: "test_logprobs_are_of_the_raw_logits",
    SixteenBits: "test_a_crowd_draws_what_the_reference_draws",
    OneWarp: "test_hundreds_of_rows",
    HalfPrecision: "test_extreme_numbers",
}
