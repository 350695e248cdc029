"""`Decoder`: what a runtime has to offer so that its graphs run as lanes. Knows neither lanes nor how a past is kept.

Tensors and logits are of the runtime's own array type, wherever they lie; what goes in and what is fetched is NumPy's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import FloatArray

from .past import Past
from .work import Square, Work

Index = NDArray[np.intp]


class Moves(NamedTuple):
    """Where n tokens of some tensors go: from (row, column) to (row, column) of new ones."""

    tensors: Sequence[Any]  # one for each Past
    from_rows: Index  # (n,)
    from_columns: Index  # (n,)
    to_rows: Index  # (n,)
    to_columns: Index  # (n,)


class Decoder(Protocol):
    @property
    def past(self) -> Sequence[Past]:
        """What a run takes and gives back, in the order of both; nothing if the graph keeps no past."""

    @property
    def dtypes(self) -> frozenset[str]:
        """The NUMBER_TYPES of the logits and of what is computed before them."""

    @property
    def takes_positions(self) -> bool: ...

    def run(self, tokens: Square, seen: NDArray[np.bool_], before: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
        """Logits (B, S, vocab), or of the last column only (B, 1, vocab); and the present that continues each past.

        `seen` (B, past + S): the columns that hold tokens; `before`: a tensor for each Past. None of them is
        changed. Raises RunnerError.
        """

    def run_fresh(self, tokens: Square) -> Any:
        """The logits of sequences from their beginning, on an empty past. Raises RunnerError."""

    def fetch(self, logits: Any, rows: Index, columns: Index) -> FloatArray:
        """(n, vocab) of `logits` (B, S, vocab), at n pairs of row and column."""

    def pack(self, batch: int, time: int, fill: float, moves: Sequence[Moves]) -> Sequence[Any]:
        """A new tensor for each Past, full of `fill` but where tokens are moved to."""


def are_logits(shape: Sequence[int], tokens: Square) -> bool:
    """Is that what a run of these tokens gives: of each of them, or of the last column only?"""
    batch, columns = tokens.ids.shape
    return len(shape) == 3 and shape[0] == batch and shape[1] in (1, columns) and shape[2] > 0


def hand_out(decoder: Decoder, logits: Any, works: Sequence[Work], real: NDArray[np.bool_]) -> None:
    """Of each work's last real columns, as many rows of logits as are wanted -> `Work.out`."""
    wanted = [len(w.out) for w in works]
    rows = np.repeat(np.arange(len(works)), wanted)
    if not len(rows):
        return
    if logits.shape[1] == 1:
        columns = np.zeros_like(rows)
    else:
        of_each = zip(real, wanted, strict=True)
        columns = np.concatenate([np.flatnonzero(r)[r.sum() - n :] for r, n in of_each])
    found = decoder.fetch(logits, rows, columns)
    first = 0
    for work, n in zip(works, wanted, strict=True):
        if n:
            work.out[...] = found[first : first + n]
        first += n
