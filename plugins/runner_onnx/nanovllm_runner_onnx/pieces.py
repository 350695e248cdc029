"""Cutting a step whose attention would need too much memory into several, one after the other.

Attention makes all scores of a group of sequences at once, each padded to the group's longest. What it
needs so grows with tokens * context, for which there is no bound but this one. A sequence that is cut
computes the same, because a later piece finds the K and V of an earlier one in the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nanovllm.batch import IntArray, Packed

SCRATCH = 2**26  # numbers of scores, gathered K and gathered V at once: 256 MiB


@dataclass(frozen=True, slots=True)
class Cutter:
    num_heads: int
    kv_numbers: int  # of K and V of one token in one layer

    def __call__(self, packed: Packed) -> list[Packed]:
        """Pieces of at most SCRATCH numbers, or of one token, in the order of the step's tokens."""
        counts = np.diff(packed.q_start)
        if self._numbers(counts, packed.kv_lens) <= SCRATCH:
            return [packed]
        borders: list[int] = []  # the first token of each piece
        members: list[tuple[int, int]] = []  # tokens and context of the current piece's sequences
        for first, last, context in zip(packed.q_start, packed.q_start[1:], packed.kv_lens, strict=False):
            num_rows = max(1, (SCRATCH // int(context) - self.kv_numbers) // self.num_heads)
            for start in range(first, last, num_rows):
                member = (min(num_rows, last - start), int(context))
                if start > first or not members or self._numbers(*np.array([*members, member]).T) > SCRATCH:
                    borders.append(start)
                    members = []
                members.append(member)
        return [_piece(packed, a, b) for a, b in zip(borders, [*borders[1:], len(packed.input_ids)], strict=True)]

    def _numbers(self, counts: IntArray, contexts: IntArray) -> int:
        """What sequences of so many new tokens and so much context need, in the two groups of `step.py`."""
        total = 0
        for is_member in (counts == 1, counts > 1):
            if is_member.any():
                width = self.num_heads * int(counts[is_member].max()) + self.kv_numbers
                total += int(is_member.sum()) * int(contexts[is_member].max()) * width
        return total


def _piece(packed: Packed, a: int, b: int) -> Packed:
    """Tokens [a, b) of the step."""
    s = slice(np.searchsorted(packed.q_start, a, "right") - 1, np.searchsorted(packed.q_start, b, "left"))
    q_start = np.clip(packed.q_start[s.start : s.stop + 1], a, b) - np.int32(a)
    positions = packed.positions[a:b]
    rows = packed.rows[(packed.rows >= a) & (packed.rows < b)] - np.int32(a)
    kv_lens = positions[q_start[1:] - 1] + np.int32(1)
    return Packed(
        packed.input_ids[a:b], positions, packed.slots[a:b], q_start, kv_lens, packed.lanes[s], packed.tables[s], rows
    )
