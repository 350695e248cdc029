"""`Grown`: the past is what the last run gave back, longer by its tokens, and goes into the next run as it is.

Sequences that were computed together are a cohort: one tensor per layer, a row each, padded on the left
where a past is shorter. While the same sequences go on together, nothing is moved. When one joins or
leaves, or a run of unequal lengths has left holes, the rows are packed anew. What is padded holds zeros or
numbers of the row's own sequence, so that NaN of one sequence never meets another's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import RunnerError

from .decoder import ForeignDecoder
from .work import Side, Work, fits, hand_out, square

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

DIRT = 30.0  # a number that shows wherever it gets


@dataclass(frozen=True, slots=True, eq=False)
class Cohort:
    lanes: tuple[int, ...]  # (B,)
    seen: NDArray[np.bool_]  # (B, length): the columns that hold tokens
    tensors: list[ort.OrtValue]  # one for each Past of the signature

    def find(self, lane: int, count: int) -> tuple[int, NDArray[np.intp]]:
        """The lane's row, and the columns of its first `count` tokens."""
        row = self.lanes.index(lane)
        columns = np.flatnonzero(self.seen[row])[:count]
        assert len(columns) == count, f"lane {lane} holds {len(columns)} tokens, not {count}"
        return row, columns


class Grown:
    def __init__(self, decoder: ForeignDecoder, max_len: int, *, dirty: bool = False) -> None:
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
        decoder, pasts = self._decoder, self._decoder.signature.past
        tokens = square([w.ids for w in works], [w.start for w in works], side)
        before = self._before(works)
        seen = np.concatenate([before.seen, tokens.real], axis=1)
        binding = decoder.bind(tokens, seen, use_cache=before.seen.shape[1] > 0)
        for p, tensor in zip(pasts, before.tensors, strict=True):
            binding.bind_ortvalue_input(p.past, tensor)
            binding.bind_output(p.present, decoder.device, decoder.device_id)
        logits = decoder.run(binding, tokens)
        _, *tensors = binding.get_outputs()
        for p, tensor in zip(pasts, tensors, strict=True):
            found, wanted = tensor.shape(), p.shape(*seen.shape)
            if found != wanted:
                raise RunnerError(f"the graph gives {p.present!r} the shape {found} where {wanted} is due")
        cohort = Cohort(tuple(w.lane for w in works), seen, tensors)
        self._homes.update(dict.fromkeys(cohort.lanes, cohort))
        hand_out(logits, works, tokens.real)

    def drop(self, lane: int) -> None:
        self._homes.pop(lane, None)

    def _before(self, works: Sequence[Work]) -> Cohort:
        """What exactly these sequences have computed, in this order, padded on the left only."""
        lanes, starts = tuple(w.lane for w in works), np.array([w.start for w in works])
        seen = np.arange(starts.max()) >= starts.max() - starts[:, None]  # (B, longest)
        homes = [self._homes[w.lane] if w.start else None for w in works]  # None: nothing yet
        first = homes[0]
        if first is not None and first.lanes == lanes and np.array_equal(first.seen, seen):
            return first
        found = [None if home is None else home.find(w.lane, w.start) for home, w in zip(homes, works, strict=True)]
        tensors = []
        for i, p in enumerate(self._decoder.signature.past):
            packed = np.full(p.shape(*seen.shape), self._fill, np.dtype(p.dtype))
            arrays = {home: p.by_row(home.tensors[i].numpy()) for home in homes if home is not None}
            for row, is_token, home, place in zip(p.by_row(packed), seen, homes, found, strict=True):
                if home is not None and place is not None:
                    row[is_token] = arrays[home][place]
            tensors.append(self._decoder.value(packed))
        return Cohort(lanes, seen, tensors)
