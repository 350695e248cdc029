"""The random numbers of sampling: one uniform per (seed, completion, position), and no state.

Philox4x32-10 is a pure function from a counter and a key to four random words, so a token's number
depends on nothing but its own place: not on the batch, the step, a preemption or the runner. This
file knows no request and no logits.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011; the
constants and known answers are those of the authors' library Random123.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_U64 = np.uint64
_ROUNDS = 10
_SHIFT = _U64(32)
_LOW = _U64(0xFFFFFFFF)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], _U64)  # (2, 1): of words 0 and 2
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], _U64)  # (2, 1): added to the key's words each round
_KEY_STEPS = np.arange(_ROUNDS, dtype=_U64)[:, None, None] * _WEYL  # (rounds, 2, 1), below 2**36


def uniforms(seeds: Sequence[int], indices: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) for each of R rows: (R,) float64.

    `seeds` (R,) are the keys, 0 <= seed < 2**64. The counter's words, low to high, are (position mod
    2**32, position >> 32, index, 0) with 0 <= position < 2**64 and 0 <= index < 2**32. The number is
    the first 53 of the 64 bits of words 0 and 1, word 0 first, over 2**53.
    """
    keys = np.array(seeds, _U64)
    at = np.array(positions, _U64)
    counter = np.zeros((4, len(keys)), _U64)
    counter[0] = at & _LOW
    counter[1] = at >> _SHIFT
    counter[2] = indices
    words = philox(counter, np.stack((keys & _LOW, keys >> _SHIFT)))
    numbers: NDArray[np.float64] = ((words[0] << _SHIFT | words[1]) >> _U64(11)) * 2.0**-53
    return numbers


def philox(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10. `counter` (4, R) and `key` (2, R) hold 32-bit words; returns (4, R) 32-bit words."""
    keys = (key + _KEY_STEPS) & _LOW  # (rounds, 2, R)
    multipliers = _MULTIPLIERS.repeat(counter.shape[1], axis=1)  # (2, R): numpy is slower when it broadcasts
    even, odd = counter[0::2], counter[1::2]  # (2, R): words 0 and 2, words 1 and 3
    for round_key in keys:
        product = (even * multipliers)[::-1]  # (2, R) 64 bits: of word 2, then of word 0
        even, odd = (product >> _SHIFT) ^ (odd ^ round_key), product & _LOW
    return np.stack((even[0], odd[0], even[1], odd[1]))
