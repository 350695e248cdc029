"""Rotary frequencies of every scaling rule, as numbers: what `Rotary` means.

The formulas are those of transformers' modeling_rope_utils, with one deviation. Dynamic NTK and
LongRoPE make the frequencies a function of the length of the sequence. Keys are cached rotated, so
a frequency that changed while a sequence grows would make its answer depend on how it was chunked.
Here the length is `max_len`, fixed when the model is loaded. Hence for LongRoPE: the short factors
if max_len <= original_len, else the long ones for all sequences; for dynamic NTK: the base that
transformers uses for a sequence of max_len tokens (nothing changes up to original_len).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .positions import DynamicNTK, Linear, Llama3, LongRope, Rotary, Yarn

FloatArray = NDArray[np.float32]


def rotary_frequencies(rotary: Rotary, max_len: int) -> tuple[FloatArray, float]:
    """Radians per position, (dim / 2,) float32, and the factor that multiplies cos and sin."""
    scaling, half = rotary.scaling, rotary.dim // 2
    exponents = np.arange(half, dtype=np.float64) * 2 / rotary.dim
    freqs = rotary.theta**-exponents
    attention_factor = 1.0
    if isinstance(scaling, Linear):
        freqs /= scaling.factor
    elif isinstance(scaling, DynamicNTK):
        growth = scaling.factor * max(max_len, scaling.original_len) / scaling.original_len - (scaling.factor - 1)
        freqs = (rotary.theta * growth ** (rotary.dim / (rotary.dim - 2))) ** -exponents
    elif isinstance(scaling, Yarn):
        freqs, attention_factor = _yarn(freqs, rotary, scaling), scaling.attention_factor
    elif isinstance(scaling, LongRope):
        freqs /= scaling.long_factors if max_len > scaling.original_len else scaling.short_factors
        attention_factor = scaling.attention_factor
    elif isinstance(scaling, Llama3):
        freqs = _llama3(freqs, scaling)
    return freqs.astype(np.float32), attention_factor


def _yarn(freqs: NDArray[np.float64], rotary: Rotary, yarn: Yarn) -> NDArray[np.float64]:
    def dimension(rotations: float) -> float:
        """Where a frequency makes that many rotations over original_len positions."""
        return rotary.dim * math.log(yarn.original_len / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))

    low, high = dimension(yarn.beta_fast), dimension(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary.dim - 1)
    ramp = (np.arange(len(freqs)) - low) / (high - low or 0.001)  # 0.001: transformers' guard for a step
    divided: NDArray[np.float64] = np.clip(ramp, 0, 1)
    return freqs / yarn.factor * divided + freqs * (1 - divided)


def _llama3(freqs: NDArray[np.float64], rule: Llama3) -> NDArray[np.float64]:
    rotations = rule.original_len * freqs / (2 * math.pi)  # over the original length
    ramp = (rotations - rule.low_freq_factor) / (rule.high_freq_factor - rule.low_freq_factor)
    kept: NDArray[np.float64] = np.clip(ramp, 0, 1)
    return freqs / rule.factor * (1 - kept) + freqs * kept
