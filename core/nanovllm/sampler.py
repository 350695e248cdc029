"""The numpy sampler: from rows of logits to token ids, in the one order that every sampler follows.

    penalties → logit_bias → mask, min_tokens → temperature → top-k → top-p → min-p → inverse CDF

docs/sampling-parameters.md is the definition; this is its reference implementation. All arithmetic is
float64 whatever the logits' dtype, and a row's result depends on nothing outside the row. Tokens are
ranked by adjusted logit, ties by the lowest id. This file draws no random numbers (rng.py does) and
knows no sequence beyond its row.

A wide vocabulary is sorted whole only where it must be: for a top-k above a sixteenth of it, and for a
top-p that the best 1,024 tokens do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .batch import Sampled, SampleRow, TokenLogprob
from .request import SamplingParams

Floats: TypeAlias = NDArray[np.floating[Any]]
Doubles: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int64]

_CHUNK = 2**15  # elements worked on at once (256 KiB of float64)
_WIDE = _CHUNK // 2  # a row wider than this is always alone in its chunk
_NUCLEUS = 1024  # tokens tried for top-p before the whole row is sorted
_BLOCK = 256  # ids per partial sum when a wide row is inverted

_NOT_FINITE = {"nan": "NaN logits", "inf": "an infinite logit", "-inf": "no finite logit"}  # by a row's maximum
_ADJUSTMENTS = "the request's penalties, logit_bias, mask and min_tokens left"


class NumpySampler:
    """Implements runner.Sampler for numpy arrays (and whatever np.asarray takes). Has no state."""

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        """Draw or score one token per row; `logits` (R, vocab) is never written to."""
        logits = np.asarray(logits)
        if logits.dtype not in (np.float32, np.float64):
            logits = logits.astype(np.float32)
        best = logits.argmax(axis=1)  # (R,); NaN counts as the largest, so that row's maximum is NaN
        errors = _unusable(logits[np.arange(len(best)), best], "the runner returned")
        ids: list[int] = best.tolist()
        if all(sampling.is_greedy and target is None for sampling, _, _, _, target in rows):
            return Sampled(ids, None, errors)

        # 1. Sort the rows by the work they need. A plain greedy row is done.
        vocab = logits.shape[1]
        greedy: list[int] = []  # argmax of adjusted logits
        plain: list[int] = []  # drawn from all tokens, or from those above min_p
        ranked: list[int] = []  # top-k, perhaps with top-p
        nucleus: list[int] = []  # top-p alone
        scored: list[int] = []  # with logprobs
        for r, row in enumerate(rows):
            if r in errors:
                continue
            params = row.sampling.params
            if row.target is not None:
                ids[r] = row.target
                scored.append(r)
                continue
            if params.logprobs is not None:
                scored.append(r)
            if params.temperature == 0:
                if _is_adjusted(row):
                    greedy.append(r)
            elif 0 < params.top_k < vocab:
                ranked.append(r)
            elif params.top_p < 1:
                nucleus.append(r)
            else:
                plain.append(r)

        # 2. Draw, kind by kind; an adjustment may leave nothing to draw from.
        with np.errstate(over="ignore", under="ignore"):  # weights may vanish, scaled logits may be -inf
            for kind, draw in ((greedy, _argmax), (plain, _draw), (ranked, _draw_ranked), (nucleus, _draw_nucleus)):
                for chunk in _chunks(kind, vocab):
                    x = _adjusted(logits, rows, chunk)
                    if bad := _unusable(x.max(axis=1), _ADJUSTMENTS):
                        errors.update((chunk[i], why) for i, why in bad.items())
                        usable = [i for i in range(len(chunk)) if i not in bad]
                        chunk, x = [chunk[i] for i in usable], x[usable]
                        if not chunk:
                            continue
                    for r, token in zip(chunk, draw(x, [rows[r] for r in chunk]).tolist(), strict=True):
                        ids[r] = token

            # 3. Log-probabilities of what was drawn or asked about.
            if not scored:
                return Sampled(ids, None, errors)
            logprobs: list[TokenLogprob | None] = [None] * len(rows)
            for chunk in _chunks([r for r in scored if r not in errors], vocab):
                num_top = [_num_top(rows[r]) for r in chunk]
                for r, logprob in zip(chunk, _score(logits[chunk], [ids[r] for r in chunk], num_top), strict=True):
                    logprobs[r] = logprob
        return Sampled(ids, logprobs, errors)


def _unusable(maxima: Floats, cause: str) -> dict[int, str]:
    """What is wrong with each row whose largest logit is not finite. `maxima`: (R,)."""
    return {int(r): f"{cause} {_NOT_FINITE[str(maxima[r])]}" for r in np.flatnonzero(~np.isfinite(maxima))}


def _chunks(rows: list[int], vocab: int) -> Iterator[list[int]]:
    """Rows in groups of at most _CHUNK logits; one by one where they are wide."""
    size = max(1, _CHUNK // vocab)
    return (rows[i : i + size] for i in range(0, len(rows), size))


# ---------------------------------------------------------------- penalties, bias, mask, min_tokens


def _is_adjusted(row: SampleRow) -> bool:
    params = row.sampling.params
    return (
        params.repetition_penalty != 1
        or params.presence_penalty != 0
        or params.frequency_penalty != 0
        or bool(params.logit_bias)
        or row.sampling.mask is not None
        or len(row.context) - row.num_prompt < params.min_tokens
    )


def _adjusted(logits: Floats, rows: Sequence[SampleRow], chunk: list[int]) -> Floats:
    """A copy of the chunk's logits, (r, vocab), ready for temperature. float64 where anything changed."""
    x: Floats = logits[chunk]
    adjusted = [i for i, r in enumerate(chunk) if _is_adjusted(rows[r])]
    if adjusted:
        x = x.astype(np.float64)
        for i in adjusted:
            _adjust(x[i], rows[chunk[i]])
    return x


def _adjust(x: Floats, row: SampleRow) -> None:
    """Change one row of logits in place. `x`: (vocab,) float64."""
    params = row.sampling.params
    # 1. Repetition, over prompt and answer. A repeated id is read before and written after, so counts once.
    if params.repetition_penalty != 1:
        seen = x[row.context]
        x[row.context] = np.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    # 2. Presence and frequency, over the answer.
    generated = row.context[row.num_prompt :]
    if params.presence_penalty != 0 or params.frequency_penalty != 0:
        used, counts = np.unique(generated, return_counts=True)
        x[used] -= params.presence_penalty + params.frequency_penalty * counts
    # 3. Bias.
    if params.logit_bias:
        x[list(params.logit_bias)] += list(params.logit_bias.values())
    # 4. What may not be drawn at all.
    if row.sampling.mask is not None:
        x[~row.sampling.mask] = -np.inf
    if len(generated) < params.min_tokens:
        x[[i for i in row.sampling.stop_ids if i < len(x)]] = -np.inf  # a wider id cannot be drawn anyway


# ------------------------------------------------------------------ temperature, top-k, top-p, min-p
#
# Each of these takes adjusted logits x (r, vocab) with a finite maximum, and returns ids (r,). Weights are
# probabilities times an unknown constant: exp((logit - largest) / temperature), so the best one's is 1.


def _argmax(x: Floats, rows: Sequence[SampleRow]) -> Ids:
    ids: Ids = x.argmax(axis=1)
    return ids


def _draw(x: Floats, rows: Sequence[SampleRow]) -> Ids:
    return _invert(_weigher(x, rows)(x), rows)


def _draw_ranked(x: Floats, rows: Sequence[SampleRow]) -> Ids:
    weigh = _weigher(x, rows)
    top_k = _column(rows, lambda p: p.top_k).astype(np.int64)
    ids = _candidates(x, int(top_k.max()))
    x = x[:, ids]
    ordered = _descending(x)
    cumulative = weigh(ordered).cumsum(axis=1)
    total = np.take_along_axis(cumulative, top_k - 1, axis=1)  # (r, 1) of the top k
    kept = np.minimum(_num_inside(cumulative, _column(rows, lambda p: p.top_p), total), top_k)
    return ids[_invert(weigh(x) * _first(x, ordered, kept), rows)]


def _draw_nucleus(x: Floats, rows: Sequence[SampleRow]) -> Ids:
    weigh = _weigher(x, rows)
    weights = weigh(x)
    total = weights.sum(axis=1, keepdims=True)  # (r, 1)
    top_p = _column(rows, lambda p: p.top_p)
    ids = _candidates(x, _NUCLEUS)
    ordered = _descending(x[:, ids])
    kept = _num_inside(weigh(ordered).cumsum(axis=1), top_p, total)
    if kept.max() > len(ids):  # these candidates do not hold top_p
        ids = np.arange(x.shape[1])
        ordered = _descending(x)
        kept = np.minimum(_num_inside(weigh(ordered).cumsum(axis=1), top_p, total), len(ids))
    return ids[_invert(weights[:, ids] * _first(x[:, ids], ordered, kept), rows)]


def _column(rows: Sequence[SampleRow], value: Callable[[SamplingParams], float]) -> Doubles:
    return np.array([[value(row.sampling.params)] for row in rows], np.float64)  # (r, 1)


def _weigher(x: Floats, rows: Sequence[SampleRow]) -> Callable[[Floats], Doubles]:
    """The function from these rows' logits (r, any width) to weights."""
    best = x.max(axis=1, keepdims=True)  # (r, 1)
    temperature = _column(rows, lambda p: p.temperature)

    def weigh(x: Floats) -> Doubles:
        weights: Doubles = np.subtract(x, best, dtype=np.float64)
        weights /= temperature  # not times 1/temperature, which overflows
        return np.exp(weights, out=weights)

    return weigh


def _descending(x: Floats) -> Floats:
    return np.sort(x, axis=1)[:, ::-1]


def _candidates(x: Floats, num: int) -> Ids:
    """Ids, ascending, among which are each row's best `num`: all ids, or for one wide row a few more than `num`.

    The wide row is cut into groups. The num-th largest of the groups' maxima is exceeded or equalled by
    `num` tokens, so the best `num` (and all their ties) are at least as large.
    """
    groups = 4 * num
    size = x.shape[1] // groups
    if x.shape[1] <= _WIDE or size < 4:
        return np.arange(x.shape[1])
    maxima = x[0, : groups * size].reshape(size, groups).max(axis=0)  # (groups,) group g: ids g, g + groups, ...
    return np.flatnonzero(x[0] >= np.partition(maxima, groups - num)[groups - num])


def _num_inside(cumulative: Doubles, top_p: Doubles, total: Doubles) -> Ids:
    """How many tokens, best first, reach top_p × total: (r, 1). m + 1 where all m do not.

    `cumulative` (r, m) weights, best first. The token that crosses top_p is inside: one more than do not reach it.
    A top_p of 1 drops none, not even one that is too small to change the sum.
    """
    inside: Ids = 1 + np.count_nonzero((cumulative < top_p * total) | (top_p == 1), axis=1, keepdims=True)
    return inside


def _first(x: Floats, ordered: Floats, num: Ids) -> NDArray[np.bool_]:
    """Which tokens are each row's best `num` (r, 1), ties to the lowest id: (r, m) bool."""
    last = np.take_along_axis(ordered, num - 1, axis=1)  # (r, 1) the smallest logit kept
    kept: NDArray[np.bool_] = x >= last
    if (np.count_nonzero(kept, axis=1, keepdims=True) > num).any():  # more ties of the last than places
        above, ties = x > last, x == last
        places = num - np.count_nonzero(above, axis=1, keepdims=True)
        kept = above | (ties & (ties.cumsum(axis=1) <= places))
    return kept


def _invert(weights: Doubles, rows: Sequence[SampleRow]) -> Ids:
    """Drop what min-p drops (in place) and return the first id whose cumulative weight exceeds uniform × total.

    Since uniform <= 1 - 2**-53, uniform × total < total also after rounding: there is such an id, and its
    weight is not 0.
    """
    weights[weights < _column(rows, lambda p: p.min_p)] = 0  # the best token's weight is 1 and stays
    uniform = np.array([[row.uniform] for row in rows], np.float64)
    if weights.shape[1] <= _WIDE:
        cumulative = weights.cumsum(axis=1)
        ids: Ids = (cumulative > uniform * cumulative[:, -1:]).argmax(axis=1)
        return ids
    # One wide row: find the block of ids first. Summing blocks is many times faster than a running sum.
    wide = weights[0]
    cumulative = np.add.reduceat(wide, np.arange(0, len(wide), _BLOCK)).cumsum()
    goal = uniform[0, 0] * cumulative[-1]
    block = int((cumulative > goal).argmax())
    inside = wide[block * _BLOCK : (block + 1) * _BLOCK].cumsum()
    if block:
        inside += cumulative[block - 1]
    above = np.flatnonzero(inside > goal)
    # A block's sum and its running sum differ in rounding: past the end, the block's last drawable token it is.
    pick = above[0] if len(above) else np.flatnonzero(wide[block * _BLOCK : (block + 1) * _BLOCK])[-1]
    return np.array([block * _BLOCK + pick])


# ----------------------------------------------------------------------------------- logprobs


def _num_top(row: SampleRow) -> int:
    """How many of the most likely tokens this row's TokenLogprob lists."""
    params = row.sampling.params
    return (params.logprobs if row.target is None else params.prompt_logprobs) or 0


def _score(x: Floats, ids: list[int], num_top: list[int]) -> Iterator[TokenLogprob]:
    """TokenLogprob of one token per row of raw logits x (r, vocab)."""
    best = x.max(axis=1, keepdims=True).astype(np.float64)  # (r, 1)
    weights: Doubles = np.subtract(x, best, dtype=np.float64)
    norm = np.log(np.exp(weights, out=weights).sum(axis=1, keepdims=True))  # (r, 1)
    most = max(num_top)
    pool = _candidates(x, most) if most else np.arange(0)
    order = pool[np.argsort(-x[:, pool], axis=1, kind="stable")[:, :most]]  # (r, most)
    values = np.take_along_axis(x, order, axis=1) - best - norm  # in this order: best may dwarf norm
    for r, (token, n) in enumerate(zip(ids, num_top, strict=True)):
        # Rank and top list agree: larger logits come first, then equal ones with a lower id.
        rank = 1 + np.count_nonzero(x[r] > x[r, token]) + np.count_nonzero(x[r, :token] == x[r, token])
        top = tuple(zip(order[r, :n].tolist(), values[r, :n].tolist(), strict=True))
        yield TokenLogprob(token, float(x[r, token] - best[r, 0] - norm[r, 0]), int(rank), top)
