"""The elementwise steps of a decoder, on float32 arrays. Nothing here knows a model or a cache.

Every function that ends in `_` works in place. Big arrays are walked in blocks of rows that stay in
the processor's cache, because each of these functions passes over its data several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

BLOCK = 65_536  # elements: 256 KiB

# -log(2 * (1 - Phi(x))) = x * P(x) for x >= 0, Phi the normal distribution function: the coefficients of
# P, lowest first. Fitted on [0, 5.66] for the least error of Phi; Phi is within 1e-7 everywhere.
_NORMAL_TAIL = (
    0.7978853277, 0.3182988658, 0.03638758101, -0.004895994063,
    9.492023382e-05, 1.290490997e-04, -2.729431472e-05, 1.964997196e-06,
)  # fmt: skip


def layer_norm(x: FloatArray, weight: FloatArray, bias: FloatArray | None, eps: float) -> FloatArray:
    """(..., n) -> (..., n): mean 0 and variance 1 over the last axis, then weight and bias."""
    y: FloatArray = x - x.mean(-1, keepdims=True)
    y *= _inverse_rms(y, eps)
    y *= weight
    if bias is not None:
        y += bias
    return y


def rms_norm(x: FloatArray, weight: FloatArray, bias: FloatArray | None, eps: float) -> FloatArray:
    """(..., n) -> (..., n): mean square 1 over the last axis, then weight and bias."""
    y = x * _inverse_rms(x, eps)
    y *= weight
    if bias is not None:
        y += bias
    return y


def _inverse_rms(x: FloatArray, eps: float) -> FloatArray:
    """(..., n) -> (..., 1): 1 / sqrt(mean(x^2) + eps)."""
    mean_square: FloatArray = np.einsum("...i,...i->...", x, x)[..., None]
    mean_square /= x.shape[-1]
    mean_square += eps
    return np.reciprocal(np.sqrt(mean_square, out=mean_square), out=mean_square)


NORMS: dict[str, Callable[[FloatArray, FloatArray, FloatArray | None, float], FloatArray]] = {
    "layer": layer_norm,
    "rms": rms_norm,
}


def relu_(x: FloatArray) -> None:
    np.maximum(x, 0, out=x)


def silu_(x: FloatArray) -> None:
    """x / (1 + exp(-x)). exp overflows to inf below -88, and x / inf is the right -0."""
    for block in _blocks(x):
        t = np.negative(block)
        np.exp(t, out=t)
        t += 1
        block /= t


def gelu_(x: FloatArray) -> None:
    """x * Phi(x), exactly; computed as max(x, 0) - |x| * (1 - Phi(|x|)), which loses nothing to cancellation."""
    for block in _blocks(x):
        magnitude = np.abs(block)
        t = np.full_like(magnitude, _NORMAL_TAIL[-1])
        for coefficient in reversed(_NORMAL_TAIL[:-1]):
            t *= magnitude
            t += coefficient
        magnitude_half = magnitude * -0.5
        np.negative(magnitude, out=magnitude)
        t *= magnitude
        np.exp(t, out=t)
        t *= magnitude_half
        np.maximum(block, 0, out=block)
        block += t


def gelu_tanh_(x: FloatArray) -> None:
    """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))."""
    for block in _blocks(x):
        t = np.square(block)
        t *= 0.7978845608 * 0.044715
        t += 0.7978845608
        t *= block
        np.tanh(t, out=t)
        t += 1
        block *= 0.5
        block *= t


ACTIVATIONS: dict[str, Callable[[FloatArray], None]] = {
    "gelu": gelu_,
    "gelu_tanh": gelu_tanh_,
    "relu": relu_,
    "silu": silu_,
}


def soft_cap_(x: FloatArray, cap: float) -> None:
    """cap * tanh(x / cap)."""
    x *= np.float32(1 / cap)
    np.tanh(x, out=x)
    x *= np.float32(cap)


def softmax_(scores: FloatArray) -> FloatArray:
    """Turn the last axis into exp(score - max) and return the sums (..., 1); dividing is left to the caller.

    At least one score of each row must be finite; -inf becomes exactly 0.
    """
    scores -= scores.max(-1, keepdims=True)
    np.exp(scores, out=scores)
    sums: FloatArray = scores.sum(-1, keepdims=True)
    return sums


def rotate_(x: FloatArray, cos: FloatArray, sin: FloatArray) -> None:
    """Rotate the pairs (j, j + h) of the first 2h numbers of every head.

    x (T, heads, head_size) by cos, sin (T, 1, h); the rest of the head stays.
    """
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half : 2 * half]
    rotated = a * cos
    rotated -= b * sin
    b *= cos
    b += a * sin
    a[...] = rotated


def _blocks(x: FloatArray) -> Iterator[FloatArray]:
    """(rows, n) in views of about BLOCK elements."""
    step = max(1, BLOCK // x.shape[1])
    for i in range(0, len(x), step):
        yield x[i : i + step]
