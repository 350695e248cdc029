"""`Precision`, and how a matrix of float weights becomes whole numbers. Knows no graph and no model.

    int8    one scale per output: w ~ q * scale, q in [-127, 127]
    int4    one scale per block of inputs of an output: w ~ (q - 8) * scale, q in [0, 15]

A matrix is read in bands of rows, so that no more than a band of it exists in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import ModelError
from nanovllm_models import Tensor

BAND = 2**17  # numbers that are quantised at once, which fit in a processor's cache


@dataclass(frozen=True, slots=True)
class Precision:
    weights: str = "fp32"  # fp32, fp16, int8 or int4
    block: int = 32  # int4: so many inputs of an output share one scale


FP32 = Precision()


def float_type(precision: Precision, device: str) -> type[np.floating[Any]]:
    """Of the activations and of the KV pool."""
    return np.float32 if device == "cpu" or precision.weights == "fp32" else np.float16


class Quantised(NamedTuple):
    values: NDArray[np.int8] | NDArray[np.uint8]  # int8 (in, out); uint8 (out, blocks, block / 2): two numbers a byte
    scales: NDArray[np.float32]  # int8 (out,); int4 (out, blocks)


def to_int8(tensors: list[Tensor]) -> Quantised:
    """Matrices (out, in) of equal `in`, one below the other. Raises ModelError where one is not finite."""
    num_out = sum(t.shape[0] for t in tensors)
    values = np.empty((tensors[0].shape[1], num_out), np.int8)
    scales = np.empty(num_out, np.float32)
    for at, band, name in _bands(tensors):
        here = slice(at, at + len(band))
        peaks = np.maximum(band.max(axis=1), -band.min(axis=1))
        _check(peaks, name)
        scales[here] = np.maximum(peaks, np.float32(1e-30)) / np.float32(127)  # a row of zeros has some scale
        values[:, here] = np.rint(band / scales[here, None]).T
    return Quantised(values, scales)


def to_int4(tensors: list[Tensor], block: int) -> Quantised:
    """As above. The peak of a block, of either sign, becomes -8 exactly; the last block is padded with zeros.

    What ONNX Runtime's own quantiser gives, to the bit, in half of the time.
    """
    num_out, num_in = sum(t.shape[0] for t in tensors), tensors[0].shape[1]
    num_blocks = -(-num_in // block)
    values = np.empty((num_out, num_blocks, block // 2), np.uint8)
    scales = np.empty((num_out, num_blocks), np.float32)
    for at, band, name in _bands(tensors):
        if num_in % block:
            band = np.pad(band, ((0, 0), (0, num_blocks * block - num_in)))
        blocks = band.reshape(-1, block)
        high, low = blocks.max(axis=1), blocks.min(axis=1)
        peaks = np.where(high > -low, high, low)
        _check(peaks, name)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = -8 / peaks
        inverse[~np.isfinite(inverse)] = 0  # of a block of zeros, or of numbers that are as good as zeros
        q = blocks * inverse[:, None]
        q += np.float32(8.5)  # cut off below, which rounds
        q = np.minimum(q, np.float32(15)).astype(np.uint8)
        here = slice(at, at + len(band))
        values[here] = (q[:, 0::2] | q[:, 1::2] << 4).reshape(-1, num_blocks, block // 2)
        scales[here] = (peaks / -8).reshape(-1, num_blocks)
    return Quantised(values, scales)


def _bands(tensors: list[Tensor]) -> Iterator[tuple[int, NDArray[np.float32], str]]:
    """The rows of all of them in float32, some at a time: the first one's number, the rows, where they are from."""
    at = 0
    for tensor in tensors:
        num_rows, width = tensor.shape
        for first, band in tensor.bands(max(1, BAND // width)):
            yield at + first, band, tensor.name
        at += num_rows


def _check(peaks: NDArray[np.float32], name: str) -> None:
    if not np.isfinite(peaks).all():
        raise ModelError(f"{name} holds NaN or inf, which cannot be quantised", hint="choose weights: fp32")
