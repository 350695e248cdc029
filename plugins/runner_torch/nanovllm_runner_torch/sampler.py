"""TorchSampler: rows of logits on any device to token ids, in the one order of docs/sampling-parameters.md.

    penalties → logit_bias → mask, min_tokens → temperature → top-k → top-p → min-p → inverse CDF

`nanovllm.sampler.NumpySampler` is the reference: the same distribution, the same token for the same uniform
number, ties to the lowest id, arithmetic in float64. Everything is computed where the logits are, and
comes back in one transfer, which is the step's only wait for the device. Draws no random numbers.

On a CPU, rows go in chunks that stay in the cache, and top-k and top-p look at the best tokens first and at
more only if these do not decide; looking costs an accelerator a wait, so there they rank the whole row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nanovllm.batch import Sampled, SampleRow, TokenLogprob
from nanovllm.request import SamplingParams

from .device import send

CHUNK = 2**20  # float64 numbers at once on a CPU: 8 MiB
NUCLEUS = 1024  # tokens ranked for top-p at first

_NOT_FINITE = {"nan": "NaN logits", "inf": "an infinite logit", "-inf": "no finite logit"}  # by a row's maximum
_ADJUSTMENTS = "the request's penalties, logit_bias, mask and min_tokens left"


class TorchSampler:
    """Implements runner.Sampler for torch tensors. Has no state."""

    @torch.inference_mode()
    def sample(self, logits: Tensor, rows: Sequence[SampleRow]) -> Sampled:
        """Draw or score one token per row; `logits` (R, vocab) is computed with as float32 and never written to."""
        logits = logits.float()
        ids = _argmax(logits)  # (R,); NaN counts as the largest, so that row's maximum is NaN
        maxima = logits.gather(1, ids[:, None])[:, 0]  # (R,)
        plain = all(row.sampling.is_greedy and row.target is None for row in rows)

        # 1. Which rows are drawn, and which have logprobs. A plain greedy row is done.
        drawn = [] if plain else [r for r, row in enumerate(rows) if row.target is None and not _is_argmax(row)]
        scored = [] if plain else [r for r, row in enumerate(rows) if row.target is not None or _wants_logprobs(row)]
        by_kind: list[list[int]] = [[] for _ in _DRAWS]
        for r in drawn:
            by_kind[_kind(rows[r], logits.shape[1])].append(r)
        drawn = [r for own in by_kind for r in own]

        # 2. Draw, kind by kind; then what was drawn or asked about is known, and its log-probabilities too.
        left = []  # the largest adjusted logit of each drawn row
        for draw, own in zip(_DRAWS, by_kind, strict=True):
            for chunk in _chunks(own, logits):
                index, asked = _index(chunk, logits), [rows[r] for r in chunk]
                x = logits[index].double()
                _adjust(x, asked)
                left.append(x.amax(1))
                ids[index] = draw(x, asked)
        targets = {r: row.target for r, row in enumerate(rows) if row.target is not None}
        if targets:
            ids[_index(list(targets), logits)] = _index(list(targets.values()), logits)
        most = min(max((_num_top(rows[r]) for r in scored), default=0), logits.shape[1])
        scores = [
            _score(logits[index], ids[index], most)
            for index in (_index(chunk, logits) for chunk in _chunks(scored, logits))
        ]

        # 3. One transfer, and what it says.
        parts = [ids.double(), maxima.double(), *left, *(score.flatten() for score in scores)]
        numbers = torch.cat(parts).cpu().numpy()
        num = len(rows)
        errors = _unusable(numbers[num : 2 * num], range(num), "the runner returned")
        after = numbers[2 * num : 2 * num + len(drawn)]
        errors = {**_unusable(after, drawn, _ADJUSTMENTS), **errors}
        tokens = numbers[:num].astype(np.int64).tolist()
        if not scored:
            return Sampled(tokens, None, errors)
        logprobs: list[TokenLogprob | None] = [None] * num
        found = numbers[2 * num + len(drawn) :].reshape(len(scored), 2 + 2 * most)
        for r, (logprob, rank, *top) in zip(scored, found.tolist(), strict=True):
            if r not in errors:
                n = min(_num_top(rows[r]), most)
                best = tuple((int(i), value) for i, value in zip(top[:n], top[most : most + n], strict=True))
                logprobs[r] = TokenLogprob(tokens[r], logprob, int(rank), best)
        return Sampled(tokens, logprobs, errors)


def _argmax(x: Tensor) -> Tensor:
    """(r, vocab) -> (r,) int64, ties to the lowest. NumPy's is five times faster than torch's on a CPU."""
    return torch.from_numpy(x.numpy().argmax(1)) if x.device.type == "cpu" else x.argmax(1)


def _unusable(maxima: NDArray[np.float64], rows: Sequence[int], cause: str) -> dict[int, str]:
    """What is wrong with each of the rows whose largest logit is not finite."""
    bad = np.flatnonzero(~np.isfinite(maxima)).tolist()
    return {rows[i]: f"{cause} {_NOT_FINITE[str(maxima[i])]}" for i in bad}


def _chunks(rows: list[int], logits: Tensor) -> list[list[int]]:
    size = len(rows) if logits.device.type != "cpu" else max(1, CHUNK // logits.shape[1])
    return [rows[i : i + size] for i in range(0, len(rows), size or 1)]


def _index(numbers: Sequence[int], like: Tensor) -> Tensor:
    return send(np.array(numbers, np.int64), like.device)


# ------------------------------------------------------------------------------ what a row asks for


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


def _is_argmax(row: SampleRow) -> bool:
    """Is its token the largest of the raw logits?"""
    return row.sampling.params.temperature == 0 and not _is_adjusted(row)


def _wants_logprobs(row: SampleRow) -> bool:
    return row.sampling.params.logprobs is not None


def _num_top(row: SampleRow) -> int:
    """How many of the most likely tokens this row's TokenLogprob lists."""
    params = row.sampling.params
    return (params.logprobs if row.target is None else params.prompt_logprobs) or 0


def _kind(row: SampleRow, vocab: int) -> int:
    """0: argmax of adjusted logits; 1: drawn from all tokens; 2: from the top k; 3: from the nucleus of all."""
    params = row.sampling.params
    if params.temperature == 0:
        return 0
    if 0 < params.top_k < vocab:
        return 2
    return 3 if params.top_p < 1 else 1


# ------------------------------------------------------------- penalties, bias, mask, min_tokens


def _adjust(x: Tensor, rows: Sequence[SampleRow]) -> None:
    """Change adjusted logits (r, vocab) float64 in place, all rows at once: what to change is listed on the host."""
    repeated, used, biased, banned = _Entries(), _Entries(), _Entries(), _Entries()
    for i, row in enumerate(rows):
        params, generated = row.sampling.params, row.context[row.num_prompt :]
        if params.repetition_penalty != 1:
            repeated.add(i, row.context, params.repetition_penalty)
        if params.presence_penalty != 0 or params.frequency_penalty != 0:
            ids, counts = np.unique(generated, return_counts=True)
            used.add(i, ids, params.presence_penalty + params.frequency_penalty * counts)
        if params.logit_bias:
            biased.add(i, list(params.logit_bias), list(params.logit_bias.values()))
        if row.sampling.mask is not None:
            banned.add(i, np.flatnonzero(~row.sampling.mask), -np.inf)
        if len(generated) < params.min_tokens:  # a wider id cannot be drawn anyway
            banned.add(i, [id for id in row.sampling.stop_ids if id < x.shape[1]], -np.inf)
    # An id of the context that repeats is read before and written after, so that it counts once.
    repeated.apply(x, lambda seen, penalty: torch.where(seen > 0, seen / penalty, seen * penalty))
    used.apply(x, torch.sub)
    biased.apply(x, torch.add)
    banned.apply(x, lambda _, value: value)


class _Entries:
    """Places (row, id) of a matrix, with a number for each."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []  # (3, n): rows, ids, numbers

    def add(self, row: int, ids: ArrayLike, numbers: ArrayLike) -> None:
        self._parts.append(np.stack(np.broadcast_arrays(np.float64(row), np.asarray(ids, np.float64), numbers)))

    def apply(self, x: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        if self._parts:
            rows, ids, numbers = send(np.concatenate(self._parts, axis=1), x.device).unbind()
            place = rows.long(), ids.long()
            x[place] = change(x[place], numbers)


# ------------------------------------------------------------ temperature, top-k, top-p, min-p
#
# Each of these takes adjusted logits x (r, vocab) float64 and returns ids (r,). Weights are probabilities times
# an unknown constant: exp((logit - largest) / temperature), so the best one's is 1.


def _argmax_of(x: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return _argmax(x)


def _draw(x: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    return _invert(_weigher(x, rows)(x), rows)


def _draw_ranked(x: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Top-k, perhaps with top-p."""
    weigh = _weigher(x, rows)
    top_k = _column(rows, lambda p: p.top_k, x).long()

    def num_kept(weights: Tensor) -> Tensor:
        cumulative = weights.cumsum(1)
        total = cumulative.gather(1, top_k.clamp(max=weights.shape[1]) - 1)  # of the top k
        return torch.minimum(_num_inside(cumulative, rows, total), top_k)

    # One more than k shows whether the last of them has ties outside.
    return _draw_best(x, rows, weigh, num_kept, max(row.sampling.params.top_k for row in rows) + 1)


def _draw_nucleus(x: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Top-p of all tokens."""
    weigh = _weigher(x, rows)
    total = weigh(x).sum(1, keepdim=True)

    def num_kept(weights: Tensor) -> Tensor:
        return _num_inside(weights.cumsum(1), rows, total).clamp_(max=x.shape[1])

    return _draw_best(x, rows, weigh, num_kept, NUCLEUS)


def _draw_best(
    x: Tensor,
    rows: Sequence[SampleRow],
    weigh: Callable[[Tensor], Tensor],
    num_kept: Callable[[Tensor], Tensor],
    num: int,
) -> Tensor:
    """Draw from each row's best tokens, as many as `num_kept` says of their weights (r, m), best first: (r, 1).

    It looks at the best `num`, and at more if some row keeps them all or the last that it keeps may have ties outside.
    """
    vocab = x.shape[1]
    num = min(num, vocab) if x.device.type == "cpu" else vocab
    while True:
        ordered, ids = x.topk(num)  # of ties, any
        kept = num_kept(weigh(ordered))
        last = ordered.gather(1, kept.clamp(max=num) - 1)  # (r, 1) the smallest logit kept
        may_tie = (ordered[:, -1:] >= last) & (last > -torch.inf)  # what has no weight may tie as it likes
        if num == vocab or not ((kept > num) | may_tie).any():
            break
        num = min(8 * num, vocab)
    ids = ids.sort(1).values  # (r, num) ascending, all that may be kept among them
    x = x.gather(1, ids)
    above, ties = x > last, x == last
    inside = above | (ties & (ties.cumsum(1) <= kept - above.sum(1, keepdim=True)))
    return ids.gather(1, _invert(weigh(x) * inside, rows)[:, None])[:, 0]


def _column(rows: Sequence[SampleRow], value: Callable[[SamplingParams], float], like: Tensor) -> Tensor:
    return send(np.array([[value(row.sampling.params)] for row in rows], np.float64), like.device)


def _weigher(x: Tensor, rows: Sequence[SampleRow]) -> Callable[[Tensor], Tensor]:
    """The function from these rows' logits (r, any width) to weights."""
    best = x.amax(1, keepdim=True)
    temperature = _column(rows, lambda p: p.temperature, x)
    return lambda x: (x - best).div_(temperature).exp_()  # not times 1/temperature, which overflows


def _num_inside(cumulative: Tensor, rows: Sequence[SampleRow], total: Tensor) -> Tensor:
    """How many tokens, best first, reach top_p * total: (r, 1). The one that crosses it is inside."""
    top_p = _column(rows, lambda p: p.top_p, cumulative)
    return 1 + ((cumulative < top_p * total) | (top_p == 1)).sum(1, keepdim=True)  # 1 drops none, however small


def _invert(weights: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """Drop what min-p drops (in place); the first place whose cumulative weight exceeds uniform * total: (r,).

    Since uniform <= 1 - 2**-53, uniform * total < total also after rounding: there is such a place.
    """
    weights.masked_fill_(weights < _column(rows, lambda p: p.min_p, weights), 0)  # the best token's weight is 1
    uniform = send(np.array([[row.uniform] for row in rows], np.float64), weights.device)
    cumulative = weights.cumsum(1)
    places = (cumulative <= uniform * cumulative[:, -1:]).sum(1)
    places.clamp_(max=weights.shape[1] - 1)  # NaN compares as it likes, and its row is an error anyway
    return places if weights.device.type == "cpu" else _with_weight(places, weights)


def _with_weight(places: Tensor, weights: Tensor) -> Tensor:
    """`places` (r,), but the best token's for one without weight.

    A GPU adds up to every place in an order of its own, so by rounding one without weight may exceed the one before.
    """
    own = weights.gather(1, places[:, None])[:, 0]
    return torch.where(own > 0, places, weights.argmax(1))


_DRAWS = (_argmax_of, _draw, _draw_ranked, _draw_nucleus)  # by kind


# ----------------------------------------------------------------------------------- logprobs


def _score(x: Tensor, ids: Tensor, num_top: int) -> Tensor:
    """Of raw logits x (r, vocab) float32 and a token each: (r, 2 + 2 * num_top) float64.

    The token's log-probability and rank; the ids and the log-probabilities of the best `num_top`. Rank and list
    agree: larger logits come first, then equal ones with a lower id.
    """
    ids = ids[:, None]
    wide = x.double()
    best = wide.amax(1, keepdim=True)
    norm = (wide - best).exp_().sum(1, keepdim=True).log_()
    own = x.gather(1, ids)
    numbers = torch.arange(x.shape[1], device=x.device)
    rank = 1 + (x > own).sum(1, keepdim=True) + ((x == own) & (numbers < ids)).sum(1, keepdim=True)
    parts = [own - best - norm, rank]  # in this order: best may dwarf norm
    if num_top:
        # A float's bits, the lower 31 flipped where it is negative, are ordered as it is; + 0 makes -0 a 0.
        bits = (x + 0.0).view(torch.int32).long()
        keys = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32 | (0xFFFFFFFF - numbers)  # all different
        order = keys.topk(num_top).indices
        parts += [order, x.gather(1, order) - best - norm]
    return torch.cat([part.double() for part in parts], 1)
