"""The biases of ALiBi, as numbers: what `Alibi` means.

Formulas and rounding are those of transformers' Falcon, the family that uses them: slope, position
and product are each rounded to bfloat16, as the model was trained.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .positions import Alibi

FloatArray = NDArray[np.float32]


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^-8/n, 2^-16/n, ... for n heads; where n is no power of two, the rest from the next one's odd steps."""
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return tuple(slopes)


def alibi_bias(alibi: Alibi, max_len: int) -> FloatArray:
    """(num_heads, max_len) float32: what is added to q k^T of a head for a key at a position."""
    slopes = _to_bfloat16(np.array(alibi.slopes, np.float32))
    return _to_bfloat16(slopes[:, None] * _to_bfloat16(np.arange(max_len, dtype=np.float32)))


def _to_bfloat16(x: FloatArray) -> FloatArray:
    """Rounded to the nearest bfloat16, ties to even; finite x only."""
    bits = x.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)).astype(np.uint32).view(np.float32)
