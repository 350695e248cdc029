"""`Work`: what one sequence computes in one run; and how several are squared off. Knows no runtime and no past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import FloatArray, IntArray

Side = Literal["left", "right"]  # where padding goes


class Work(NamedTuple):
    """Tokens [start, stop) of the sequence in a lane. One that starts at 0 starts fresh."""

    lane: int
    ids: IntArray  # (stop - start,) at least one
    start: int
    out: FloatArray  # (n, vocab): where the logits of the last n tokens go

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)

    @property
    def kind(self) -> Literal["prompt", "decode", "chunk"]:
        """A beginning, one token more, or several."""
        return "prompt" if self.start == 0 else "decode" if len(self.ids) == 1 else "chunk"

    def cut(self, count: int) -> tuple[Work, Work]:
        """The first `count` tokens, fewer than all, and the rest."""
        rows = max(0, len(self.out) - (len(self.ids) - count))
        return (
            Work(self.lane, self.ids[:count], self.start, self.out[:rows]),
            Work(self.lane, self.ids[count:], self.start + count, self.out[rows:]),
        )


def fits(works: Sequence[Work], max_len: int) -> bool:
    """Does the longest past have room for the most new tokens? They are padded to that, in every row."""
    return max(w.start for w in works) + max(len(w.ids) for w in works) <= max_len


class Square(NamedTuple):
    """Rows of tokens, padded to the longest: B rows, S columns."""

    ids: IntArray  # (B, S) 0 where padded
    positions: IntArray  # (B, S) 0 where padded
    real: NDArray[np.bool_]  # (B, S)


def square(rows: Sequence[IntArray], starts: Sequence[int], side: Side) -> Square:
    """`rows`: of each sequence the ids from position `start` on."""
    lens = np.array([len(row) for row in rows])
    columns = np.arange(lens.max())
    if side == "left":
        columns = columns - (lens.max() - lens)[:, None]  # (B, S): the how-manieth token it is
    real = (columns >= 0) & (columns < lens[:, None])
    ids, positions = np.zeros(real.shape, np.int32), np.zeros(real.shape, np.int32)
    ids[real] = np.concatenate(rows)
    positions[real] = (columns + np.array(starts)[:, None])[real]
    return Square(ids, positions, real)
