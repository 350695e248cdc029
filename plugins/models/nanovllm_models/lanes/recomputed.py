"""`Recomputed`: no past is kept, only the tokens; every run computes its sequences from the beginning.

For graphs without a past, and for those whose past does not do what it should. A chunk whose logits nobody
wants costs nothing: its tokens are noted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanovllm.batch import IntArray

from .decoder import Decoder, hand_out
from .work import Side, Work, square


class Recomputed:
    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._tokens: dict[int, IntArray] = {}  # lane -> (length,) token ids

    def columns(self, work: Work) -> int:
        return work.stop if len(work.out) else 0

    def order(self, work: Work) -> tuple[int, ...]:
        return self.columns(work), work.lane

    def can_join(self, group: Sequence[Work], work: Work) -> bool:
        return True

    def run(self, works: Sequence[Work], side: Side) -> None:
        for w in works:
            known = self._tokens[w.lane][: w.start] if w.start else w.ids[:0]
            self._tokens[w.lane] = np.concatenate([known, w.ids])
        works = [w for w in works if len(w.out)]
        if not works:
            return
        tokens = square([self._tokens[w.lane] for w in works], [0] * len(works), side)
        hand_out(self._decoder, self._decoder.run_fresh(tokens), works, tokens.real)

    def drop(self, lane: int) -> None:
        self._tokens.pop(lane, None)
