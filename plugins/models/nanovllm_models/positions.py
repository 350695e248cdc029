"""How a decoder knows the order of its tokens, as frozen data: rotation, its scaling rules, and ALiBi.

What the fields mean as numbers is in `rope.py` and `alibi.py`. Nothing here knows a config key.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linear:
    """Every frequency divided by `factor` (kaiokendev)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicNTK:
    """The base grows with the length, from `original_len` on (arXiv:2306.15595 and bloc97's NTK)."""

    factor: float
    original_len: int  # positions the model was trained on


@dataclass(frozen=True, slots=True)
class Yarn:
    """High frequencies kept, low ones divided by `factor`, a ramp between (arXiv:2309.00071)."""

    factor: float
    original_len: int
    beta_fast: float  # rotations over original_len above which a frequency is kept
    beta_slow: float  # rotations below which it is divided
    truncate: bool  # round the ramp's ends to whole dimensions
    attention_factor: float  # multiplies cos and sin


@dataclass(frozen=True, slots=True)
class LongRope:
    """One divisor per frequency, from one of two lists (arXiv:2402.13753)."""

    short_factors: tuple[float, ...]  # (dim / 2,) for lengths up to original_len
    long_factors: tuple[float, ...]  # (dim / 2,) beyond
    original_len: int
    attention_factor: float  # multiplies cos and sin


@dataclass(frozen=True, slots=True)
class Llama3:
    """Wavelengths above original_len / low_freq_factor divided by `factor`, a ramp below (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int


Scaling = Linear | DynamicNTK | Yarn | LongRope | Llama3


@dataclass(frozen=True, slots=True)
class Rotary:
    """The first `dim` numbers of every q and k head are rotated by the position."""

    dim: int  # even, <= head_size
    theta: float  # base wavelength
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Alibi:
    """A bias for every key, growing with its position at a slope of each head's own (arXiv:2108.12409).

    It is added to q k^T before that is scaled; `alibi_bias` computes it.
    """

    slopes: tuple[float, ...]  # (num_heads,)
