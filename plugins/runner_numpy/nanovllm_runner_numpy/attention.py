"""Paged attention: where keys and values lie, and how the tokens of a step look at them.

A pool has `num_blocks` blocks of `block_size` slots; the engine says which blocks belong to a
sequence, in order. Position p of a sequence lies in slot blocks[p // block_size] * block_size +
p % block_size. Whatever a sequence may see is one span of positions; `plan_attention` turns a batch
into spans once per step, and every layer then follows the same plan.

Two shapes of work, each on large contiguous operands:
- A sequence that computes several tokens (prefill) attends alone, in chunks of query rows.
- Sequences that compute one token each (decode) attend in groups of similar length: their blocks
  are gathered into a scratch array small enough to stay in the cache, padded to the longest.

Masked slots are never multiplied. They may hold anything, NaN included, from an earlier owner:
scores are overwritten with -inf and values with 0 before use. Nothing here knows weights or tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import IntArray, Packed

from .blas import Blas
from .ops import FloatArray, soft_cap_, softmax_

SCRATCH = 524_288  # numbers of gathered K (and as many of V) per decode group: 2 MiB each
SCORES = 262_144  # scores at once per prefill chunk: 1 MiB


@dataclass(frozen=True, slots=True)
class KVPool:
    """The keys and values of one layer."""

    k: FloatArray  # (num_blocks, block_size, kv_heads, head_size), rotated
    v: FloatArray  # the same

    def write(self, slots: IntArray, k: FloatArray, v: FloatArray) -> None:
        """k, v (T, kv_heads, head_size) into slots (T,)."""
        shape = (-1, *self.k.shape[2:])
        self.k.reshape(shape)[slots] = k
        self.v.reshape(shape)[slots] = v


@dataclass(frozen=True, slots=True)
class Prefill:
    """Query tokens [first, last) of the step, positions [start, start + last - first), of one sequence."""

    first: int
    last: int
    start: int
    begin: int  # first position that any of them sees
    span: Span


@dataclass(frozen=True, slots=True)
class Decode:
    """One query token each of several sequences, which see up to `span.length` positions."""

    tokens: IntArray | slice  # (n,) which tokens of the step
    span: Span
    begins: IntArray  # (n,) the position of each span's first column
    hidden: NDArray[np.bool_] | None  # (n, length) True = not to be seen; None = all is seen
    first_hidden: int  # columns [0, first_hidden) are seen by all


@dataclass(frozen=True, slots=True)
class Span:
    """Positions of n sequences, as slots: n equally long runs of blocks, [offset, offset + length) of each."""

    blocks: IntArray  # (n, m); entries past a sequence's end are clamped to a valid block
    offset: int  # slots to skip in the first block
    length: int
    is_run: bool  # n == 1 and its blocks follow one another: the pool itself can be viewed

    def read(self, pool: FloatArray, scratch: FloatArray) -> FloatArray:
        """(n, length, kv_heads, head_size): a view of the pool, or gathered into `scratch` (flat)."""
        n, m = self.blocks.shape
        row = pool.shape[1:]  # (block_size, kv_heads, head_size)
        if self.is_run:
            slots = pool.reshape(1, -1, *row[1:])
            begin = int(self.blocks[0, 0]) * row[0] + self.offset
            return slots[:, begin : begin + self.length]
        out = scratch[: n * m * row[0] * row[1] * row[2]].reshape(n * m, *row)
        pool.take(self.blocks.reshape(-1), axis=0, out=out, mode="clip")
        return out.reshape(n, m * row[0], *row[1:])[:, self.offset : self.offset + self.length]


@dataclass(frozen=True, slots=True)
class Scoring:
    """What happens to q k^T of scaled q before the softmax, the same in all layers."""

    soft_cap: float | None
    bias: FloatArray | None  # (kv_heads, group, max_len): added for a key at a position

    def apply_(self, scores: FloatArray, bias: FloatArray | None) -> None:
        if bias is not None:
            scores += bias
        if self.soft_cap is not None:
            soft_cap_(scores, self.soft_cap)


@dataclass(frozen=True)
class Plan:
    """How the tokens of one step attend, under one window."""

    window: int | None
    scoring: Scoring
    prefills: list[Prefill]
    decodes: list[Decode]
    block_numbers: int  # in one block of K (or of V): block_size * kv_heads * head_size

    @cached_property
    def scratch(self) -> tuple[FloatArray, FloatArray]:
        """For K and for V, as large as the largest span that must be gathered."""
        spans = [work.span for work in self.prefills] + [work.span for work in self.decodes]
        size = max((span.blocks.size for span in spans if not span.is_run), default=0) * self.block_numbers
        return np.empty(size, np.float32), np.empty(size, np.float32)


def plan_attention(packed: Packed, window: int | None, pool: KVPool, scoring: Scoring) -> Plan:
    block_size, block_numbers = pool.k.shape[1], pool.k[0].size
    starts, stops = packed.positions[packed.q_start[:-1]], packed.kv_lens  # (S,)
    begins = np.zeros_like(starts) if window is None else np.maximum(starts - (window - 1), 0)
    counts = np.diff(packed.q_start)
    prefills = [
        Prefill(
            int(packed.q_start[s]),
            int(packed.q_start[s + 1]),
            int(starts[s]),
            int(begins[s]),
            _span(packed.tables[s : s + 1], int(begins[s]), int(stops[s]), block_size),
        )
        for s in np.flatnonzero(counts > 1)
    ]
    single = np.flatnonzero(counts == 1)
    # A group's spans begin at a block's border, so that gathered rows line up.
    borders = begins // block_size * block_size
    single = single[np.argsort((stops - borders)[single], kind="stable")]
    decodes = [
        _decode(packed, group, begins[group], borders[group], block_size)
        for group in _groups(single, stops - borders, max(1, SCRATCH // block_numbers) * block_size)
    ]
    return Plan(window, scoring, prefills, decodes, block_numbers)


def _groups(members: NDArray[np.intp], lengths: IntArray, budget: int) -> Iterator[NDArray[np.intp]]:
    """Split members, sorted by length, so that padding at most doubles a group and it fits the budget (slots)."""
    first = 0
    for i in range(1, len(members) + 1):
        longest = lengths[members[i]] if i < len(members) else None
        if longest is None or (i + 1 - first) * longest > budget or longest > 2 * lengths[members[first]] + 64:
            yield members[first:i]
            first = i


def _decode(packed: Packed, group: NDArray[np.intp], begins: IntArray, borders: IntArray, block_size: int) -> Decode:
    tokens, stops = packed.q_start[group], packed.kv_lens[group]
    if len(group) == 1:
        span = _span(packed.tables[group], int(begins[0]), int(stops[0]), block_size)
        return Decode(tokens, span, begins, None, span.length)
    length = int((stops - borders).max())
    columns = borders[:, None] // block_size + np.arange(-(-length // block_size), dtype=np.int32)
    tables = packed.tables[group]
    blocks = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), axis=1)
    positions = borders[:, None] + np.arange(length, dtype=np.int32)  # (n, length)
    hidden = (positions >= stops[:, None]) | (positions < begins[:, None])
    seen_by_all = np.flatnonzero(hidden.any(0))
    span = Span(np.maximum(blocks, 0), 0, length, False)
    if not len(seen_by_all):
        return Decode(tokens, span, borders, None, length)
    return Decode(tokens, span, borders, hidden, int(seen_by_all[0]))


def _span(table: IntArray, begin: int, stop: int, block_size: int) -> Span:
    """Positions [begin, stop) of one sequence; table (1, max_blocks)."""
    blocks = table[:, begin // block_size : -(-stop // block_size)]
    is_run = bool((blocks[0] == np.arange(blocks[0, 0], blocks[0, 0] + blocks.shape[1])).all())
    return Span(blocks, begin % block_size, stop - begin, is_run)


def attend(plan: Plan, q: FloatArray, pool: KVPool, out: FloatArray, blas: Blas) -> None:
    """softmax(q k^T) v for every token of the step.

    q (T, heads, head_size), already scaled and rotated; out the same shape. K and V of the step's own
    tokens must be in the pool.
    """
    tokens, heads, size = q.shape
    kv_heads = pool.k.shape[2]
    q = q.reshape(tokens, kv_heads, heads // kv_heads, size)  # query heads that share a kv head, together
    out = out.reshape(q.shape)
    for prefill in plan.prefills:
        _attend_prefill(plan, prefill, q, pool, out)
    if plan.decodes:
        # A product per sequence and kv head, each too small to share: waking a second thread costs more.
        with blas.limit(1):
            for decode in plan.decodes:
                _attend_decode(plan, decode, q, pool, out)


def _attend_prefill(plan: Plan, work: Prefill, q: FloatArray, pool: KVPool, out: FloatArray) -> None:
    k, v = work.span.read(pool.k, plan.scratch[0])[0], work.span.read(pool.v, plan.scratch[1])[0]
    k = k.transpose(1, 2, 0)[:, None]  # (kv_heads, 1, head_size, length)
    v = v.transpose(1, 0, 2)[:, None]  # (kv_heads, 1, length, head_size)
    heads = q.shape[1] * q.shape[2]
    step = max(16, SCORES // (heads * work.span.length))
    for first in range(work.first, work.last, step):
        last = min(first + step, work.last)
        start, stop = (work.start + first - work.first, work.start + last - work.first)  # positions [start, stop)
        low = work.begin if plan.window is None else max(start - (plan.window - 1), work.begin)
        left, right = low - work.begin, stop - work.begin  # columns of the span that this chunk can see
        scores = q[first:last].transpose(1, 2, 0, 3) @ k[..., left:right]  # (kv_heads, group, rows, columns)
        bias = plan.scoring.bias
        plan.scoring.apply_(scores, None if bias is None else bias[:, :, None, low:stop])
        rows, columns = np.arange(start, stop)[:, None], np.arange(low, stop)
        hidden = columns > rows
        if plan.window is not None:
            hidden |= columns <= rows - plan.window
        np.copyto(scores, -np.inf, where=hidden)
        sums = softmax_(scores)
        result = out[first:last].transpose(1, 2, 0, 3)
        np.matmul(scores, v[..., left:right, :], out=result)
        result /= sums


def _attend_decode(plan: Plan, work: Decode, q: FloatArray, pool: KVPool, out: FloatArray) -> None:
    k, v = work.span.read(pool.k, plan.scratch[0]), work.span.read(pool.v, plan.scratch[1])
    scores = q[work.tokens] @ k.transpose(0, 2, 3, 1)  # (n, kv_heads, group, length)
    bias = plan.scoring.bias
    if bias is not None:  # (n, kv_heads, group, length)
        positions = work.begins[:, None] + np.arange(work.span.length, dtype=np.int32)
        positions = np.minimum(positions, bias.shape[-1] - 1)  # a padded column may lie past the last; it is hidden
        bias = bias[:, :, positions].transpose(2, 0, 1, 3)
    plan.scoring.apply_(scores, bias)
    if work.hidden is not None:
        at = slice(work.first_hidden, None)
        np.copyto(scores[..., at], -np.inf, where=work.hidden[:, None, None, at])
        v[:, at][work.hidden[:, at]] = 0
    sums = softmax_(scores)
    result = scores @ v.transpose(0, 2, 1, 3)  # (n, kv_heads, group, head_size)
    result /= sums
    out[work.tokens] = result
