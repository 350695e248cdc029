"""Cutting a step into several runs of the graph, one after the other, where one would cost too much.

Attention makes all scores of a group of sequences at once, each padded to the group's longest (`step.py`).

- Memory: what it needs so grows with tokens * context, for which there is no bound but this one. A sequence that
  is cut computes the same, because a later piece finds the K and V of an earlier one in the pool.
- Time: one long context makes all others as dear as itself. Sequences of similar context are run together where
  the padding that this saves outweighs another run. No sequence reads what another computes in the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import IntArray, Packed

SCRATCH = 2**26  # numbers of scores, gathered K and gathered V at once: 256 MiB

# What takes as long as reading so many bytes of weights does, 0.02 to 0.034 ns a byte with float32, int8 and int4, on
# two cores of an AMD EPYC (Zen 5) and in Qwen2-0.5B's sizes. The ratios are what counts, and they need no precision.
KV_BYTES = 8  # a number of K or V, 0.22 ns: copied out of the pool, then an operand of a product
SCORE_BYTES = 32  # a score, 1.0 ns: two products with a head's vector, a mask and a softmax
RUN_BYTES = 2**20  # a layer's dozens of operators, 0.03 ms: what a run costs even where its weights are few

Int64Array = NDArray[np.int64]


class Piece(NamedTuple):
    packed: Packed
    rows: IntArray  # (R of the piece,) which of the step's rows of logits these are


@dataclass(frozen=True, slots=True)
class Cutter:
    num_heads: int
    kv_numbers: int  # of K and V of one token in one layer
    layer_bytes: int  # of weights: all that a run reads, divided by the layers
    windows: tuple[int | None, ...]  # that layers have

    def __call__(self, packed: Packed) -> list[Piece]:
        """Each of at most SCRATCH numbers, or of one token. A sequence's tokens come in their order."""
        counts, contexts = np.diff(packed.q_start).astype(np.int64), packed.kv_lens.astype(np.int64)
        groups = self._similar(counts, contexts)
        if len(groups) == 1 and self._numbers(counts, contexts)[-1] <= SCRATCH:
            return [Piece(packed, np.arange(len(packed.rows), dtype=np.int32))]
        return [_piece(packed, tokens) for members in groups for tokens in self._bounded(packed, members)]

    def _similar(self, counts: Int64Array, contexts: Int64Array) -> list[NDArray[np.intp]]:
        """Sequences that run together, ascending: of all cuts of their order by context, that which costs least."""
        # 1. What a sequence sees: in the mean, where layers have several windows.
        sights = [contexts if w is None else np.minimum(contexts, counts + (w - 1)) for w in self.windows]
        seen: Int64Array = np.sum(sights, axis=0) // len(sights)
        # 2. Most steps end here: the padding costs less than another run would.
        run = self.layer_bytes + RUN_BYTES
        unpadded = seen * (SCORE_BYTES * self.num_heads * counts + KV_BYTES * self.kv_numbers)
        if self._numbers(counts, seen, SCORE_BYTES, KV_BYTES)[-1] - unpadded.sum() <= run:
            return [np.arange(len(counts))]
        # 3. The least that the first n sequences cost, and where the last run of these begins.
        order = np.lexsort((counts, seen))
        least, begins = np.zeros(len(order) + 1, np.int64), np.zeros(len(order) + 1, np.int64)
        for n in range(1, len(order) + 1):
            backwards = order[:n][::-1]
            last = self._numbers(counts[backwards], seen[backwards], SCORE_BYTES, KV_BYTES)[::-1]  # if it begins at i
            begins[n] = np.argmin(least[:n] + last)
            least[n] = least[begins[n]] + last[begins[n]] + run
        groups, end = [], len(order)
        while end:
            groups.append(np.sort(order[begins[end] : end]))
            end = begins[end]
        return groups

    def _bounded(self, packed: Packed, members: NDArray[np.intp]) -> list[NDArray[np.intp]]:
        """The members' tokens, in pieces that SCRATCH allows."""
        parts = []  # first token, one past the last, context; of a sequence's parts, no two fit in one piece
        for s in members:
            first, stop, context = int(packed.q_start[s]), int(packed.q_start[s + 1]), int(packed.kv_lens[s])
            num_rows = max(1, (SCRATCH // context - self.kv_numbers) // self.num_heads)
            parts += [(start, min(start + num_rows, stop), context) for start in range(first, stop, num_rows)]
        pieces = []
        while parts:
            starts, stops, contexts = np.array(parts).T
            is_over = self._numbers(stops - starts, contexts) > SCRATCH
            num_parts = 1 + int(np.argmax(np.append(is_over[1:], True)))
            pieces.append(np.concatenate([np.arange(start, stop) for start, stop, _ in parts[:num_parts]]))
            parts = parts[num_parts:]
        return pieces

    def _numbers(self, counts: Int64Array, contexts: Int64Array, score: int = 1, kv: int = 1) -> Int64Array:
        """What the first one, two, ... of these sequences need in one run, in the two groups of `step.py`.

        Of so many new tokens and so much context, scores and numbers of K and V weighted.
        """
        total = np.zeros(len(counts), np.int64)
        for is_member in (counts == 1, counts > 1):
            most, longest = np.maximum.accumulate((counts * is_member, contexts * is_member), axis=1)
            total += np.cumsum(is_member) * longest * (score * self.num_heads * most + kv * self.kv_numbers)
        return total


def _piece(packed: Packed, tokens: NDArray[np.intp]) -> Piece:
    """These tokens of the step, ascending; those of one sequence without a gap."""
    seqs, first = np.unique(np.searchsorted(packed.q_start, tokens, "right") - 1, return_index=True)
    q_start = np.append(first, len(tokens)).astype(np.int32)
    positions = packed.positions[tokens]
    kv_lens = positions[q_start[1:] - 1] + np.int32(1)
    is_here = np.isin(packed.rows, tokens)
    rows = np.searchsorted(tokens, packed.rows[is_here]).astype(np.int32)
    piece = Packed(
        packed.input_ids[tokens], positions, packed.slots[tokens],
        q_start, kv_lens, packed.lanes[seqs], packed.tables[seqs], rows,
    )  # fmt: skip
    return Piece(piece, np.flatnonzero(is_here).astype(np.int32))
