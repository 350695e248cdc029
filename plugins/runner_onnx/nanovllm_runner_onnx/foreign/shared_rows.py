"""`SharedRows`: one row of memory per lane, into which GroupQueryAttention writes the new tokens in place.

A run covers neighbouring rows. The operator finds the length of each past by counting the mask, which is padded
on the right, and writes behind it. A row in between that is not to be computed gets a throw-away token: it is
written where the row's next token will go, and overwritten by that. Slots past a row's length are never read.
Past and present must be the same memory, at an address that can be counted from: not on DirectML.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanovllm_models.lanes import Side, Work, fits, hand_out, square

from .decoder import ForeignDecoder

MAX_HOLES = 4  # throw-away rows of a run; beyond, another run is cheaper


class SharedRows:
    def __init__(self, decoder: ForeignDecoder, num_lanes: int, max_len: int, *, dirty: bool = False) -> None:
        """`dirty`: rows hold NaN, as an earlier owner may leave there. Raises MemoryError or ValueError."""
        self._decoder, self._max_len = decoder, max_len
        self._lens = np.zeros(num_lanes, np.int32)  # tokens in each row
        self._rows = []
        for p in decoder.past:
            # zeros: the system hands out such pages when they are first written.
            array = np.zeros(p.shape(num_lanes, max_len), np.dtype(p.dtype))
            if dirty:
                array[...] = np.nan
            self._rows.append(decoder.value(array))

    def columns(self, work: Work) -> int:
        return len(work.ids)

    def order(self, work: Work) -> tuple[int, ...]:
        return (work.lane,)

    def can_join(self, group: Sequence[Work], work: Work) -> bool:
        if not fits([*group, work], self._max_len):  # padding would be written into the next row
            return False
        holes = range(group[-1].lane + 1, work.lane)
        if not holes:
            return True
        if any(w.kind != "decode" for w in (*group, work)):
            return False
        num_holes = work.lane - group[0].lane - len(group)
        return num_holes <= MAX_HOLES and bool((self._lens[holes] < self._max_len).all())

    def run(self, works: Sequence[Work], side: Side) -> None:
        """`works` in the order of their lanes."""
        decoder, first, last = self._decoder, works[0].lane, works[-1].lane
        of_lane = {w.lane: w for w in works}
        nobody = np.empty((0, 0), np.float32)
        all_works = [
            of_lane.get(lane) or Work(lane, np.zeros(1, np.int32), int(self._lens[lane]), nobody)
            for lane in range(first, last + 1)
        ]
        tokens = square([w.ids for w in all_works], [w.start for w in all_works], side)
        stops = np.array([w.stop for w in all_works])
        width = stops.max()
        seen = np.arange(width) < stops[:, None]
        binding = decoder.bind(tokens, seen, use_cache=True)
        for p, rows in zip(decoder.past, self._rows, strict=True):
            shape = p.shape(len(all_works), self._max_len)
            address = rows.data_ptr() + first * self._max_len * p.token_bytes
            place = (decoder.device, decoder.device_id, np.dtype(p.dtype).type, shape, address)
            binding.bind_input(p.past, *place)
            binding.bind_output(p.present, *place)
        logits = decoder.compute(binding, tokens)
        for w in works:
            self._lens[w.lane] = w.stop
        hand_out(decoder, logits, all_works, tokens.real)

    def drop(self, lane: int) -> None:
        self._lens[lane] = 0
