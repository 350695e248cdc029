"""`Grown`: the past is what the last run gave back, longer by its tokens, and goes into the next run as it is.

Sequences that were computed together are a cohort: one tensor per layer, a row each, padded on the left
where a past is shorter. While the same sequences go on together, nothing is moved. When one joins or
leaves, or a run of unequal lengths has left holes, the rows are packed anew. What is padded holds zeros or
numbers of the row's own sequence, so that NaN of one sequence never meets another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .decoder import Decoder, Moves, hand_out
from .work import Side, Work, fits, square

DIRT = 30.0  # a number that shows wherever it gets


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    lanes: tuple[int, ...]  # (B,)
    seen: NDArray[np.bool_]  # (B, length): the columns that hold tokens
    tensors: Sequence[Any]  # one for each Past of the decoder

    def find(self, lane: int, count: int) -> tuple[int, NDArray[np.intp]]:
        """The lane's row, and the columns of its first `count` tokens."""
        row = self.lanes.index(lane)
        columns = np.flatnonzero(self.seen[row])[:count]
        assert len(columns) == count, f"lane {lane} holds {len(columns)} tokens, not {count}"
        return row, columns


class Grown:
    def __init__(self, decoder: Decoder, max_len: int, *, dirty: bool = False) -> None:
        """`max_len` columns. `dirty`: padding holds large numbers, which shows whether the graph looks at it."""
        self._decoder, self._max_len, self._fill = decoder, max_len, DIRT if dirty else 0.0
        self._homes: dict[int, Cohort] = {}  # by lane

    def columns(self, work: Work) -> int:
        return len(work.ids)

    def order(self, work: Work) -> tuple[int, ...]:
        return len(work.ids), work.lane

    def can_join(self, group: Sequence[Work], work: Work) -> bool:
        """The padded whole has to fit too: some graphs have tables of max_len columns."""
        return fits([*group, work], self._max_len)

    def run(self, works: Sequence[Work], side: Side) -> None:
        tokens = square([w.ids for w in works], [w.start for w in works], side)
        before = self._before(works)
        seen = np.concatenate([before.seen, tokens.real], axis=1)
        logits, tensors = self._decoder.run(tokens, seen, before.tensors)
        cohort = Cohort(tuple(w.lane for w in works), seen, tensors)
        self._homes.update(dict.fromkeys(cohort.lanes, cohort))
        hand_out(self._decoder, logits, works, tokens.real)

    def drop(self, lane: int) -> None:
        self._homes.pop(lane, None)

    def _before(self, works: Sequence[Work]) -> Cohort:
        """What exactly these sequences have computed, in this order, padded on the left only."""
        lanes, starts = tuple(w.lane for w in works), np.array([w.start for w in works])
        longest = int(starts.max())
        seen = np.arange(longest) >= longest - starts[:, None]  # (B, longest)
        homes = [self._homes[w.lane] if w.start else None for w in works]  # None: nothing yet
        first = homes[0]
        if first is not None and first.lanes == lanes and np.array_equal(first.seen, seen):
            return first
        moves = []
        for home in dict.fromkeys(home for home in homes if home is not None):
            rows = [row for row, of_row in enumerate(homes) if of_row is home]
            found = [home.find(works[row].lane, works[row].start) for row in rows]
            from_rows = np.repeat([row for row, _ in found], starts[rows])
            from_columns = np.concatenate([columns for _, columns in found])
            to_rows, to_columns = np.nonzero(seen[rows])
            moves.append(Moves(home.tensors, from_rows, from_columns, np.array(rows)[to_rows], to_columns))
        return Cohort(lanes, seen, self._decoder.pack(len(works), longest, self._fill, moves))
