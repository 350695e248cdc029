"""What is known of the distribution over the next token, and how far apart two of them are. Numbers only."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..batch import TokenLogprob

Doubles = NDArray[np.float64]


class Scores(NamedTuple):
    """Logits of the whole vocabulary, or the log-probabilities of a few tokens where that is all that is shown."""

    ids: NDArray[np.int64]  # (n,) ascending
    values: Doubles  # (n,)
    is_whole: bool  # True: values are logits of ids 0..n-1; False: log-probabilities


class Gap(NamedTuple):
    """Two distributions over the token at which two answers part."""

    unit: str  # "logits", or "log-probabilities" where one of the two shows no logits
    largest: float  # largest difference over the ids that both show
    at: int  # the id that differs most
    tokens: tuple[int, int]  # what the reference drew, and what the other one drew
    reference: tuple[float | None, float | None]  # the reference's scores of these two tokens; None: not shown
    other: tuple[float | None, float | None]  # the other one's
    margins: tuple[float, float]  # best minus second best, of either


def of_logits(row: NDArray[np.float32]) -> Scores:
    return Scores(np.arange(len(row)), row.astype(np.float64), is_whole=True)


def of_logprobs(logprob: TokenLogprob) -> Scores:
    known = dict(sorted({**dict(logprob.top), logprob.token_id: logprob.logprob}.items()))
    return Scores(np.array(list(known), np.int64), np.array(list(known.values()), np.float64), is_whole=False)


def gap(reference: Scores, other: Scores, tokens: tuple[int, int]) -> Gap:
    with np.errstate(invalid="ignore"):  # infinities of one sign have no difference
        unit, a, b = _alike(reference, other)
        largest, at = _largest(a, b)
        return Gap(unit, largest, at, tokens, _values(a, tokens), _values(b, tokens), (_margin(a), _margin(b)))


def _alike(a: Scores, b: Scores) -> tuple[str, Scores, Scores]:
    """Both as logits if both are, else both as log-probabilities."""
    if a.is_whole and b.is_whole:
        return "logits", a, b
    return "log-probabilities", _as_logprobs(a), _as_logprobs(b)


def _as_logprobs(scores: Scores) -> Scores:
    if not scores.is_whole:
        return scores
    best = scores.values.max()
    return scores._replace(values=scores.values - best - np.log(np.exp(scores.values - best).sum()))


def _largest(a: Scores, b: Scores) -> tuple[float, int]:
    """The largest difference and its id. Two infinities of one sign do not differ; NaN, and lists without a common
    id, differ infinitely."""
    if a.is_whole and b.is_whole:  # widths may differ by padding
        width = min(len(a.ids), len(b.ids))
        ids, x, y = a.ids[:width], a.values[:width], b.values[:width]
    else:
        ids, at_a, at_b = np.intersect1d(a.ids, b.ids, assume_unique=True, return_indices=True)
        x, y = a.values[at_a], b.values[at_b]
    if not len(ids):
        return math.inf, int(b.ids[b.values.argmax()])
    differences = np.where(x == y, 0.0, np.abs(x - y))
    differences[np.isnan(differences)] = np.inf
    at = int(differences.argmax())
    return float(differences[at]), int(ids[at])


def _values(scores: Scores, tokens: tuple[int, int]) -> tuple[float | None, float | None]:
    first, second = (
        float(scores.values[i]) if (i := int(np.searchsorted(scores.ids, token))) < len(scores.ids)
        and scores.ids[i] == token else None
        for token in tokens
    )  # fmt: skip
    return first, second


def _margin(scores: Scores) -> float:
    second, best = np.partition(scores.values, -2)[-2:] if len(scores.values) > 1 else (-np.inf, scores.values[0])
    return float(best - second)
