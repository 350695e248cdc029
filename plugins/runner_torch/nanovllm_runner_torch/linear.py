"""Products with weights, one class per precision: x (n, in) of any float type -> (n, out).

On a CPU the weights are laid out once for oneDNN's kernels, which read them at the speed of the memory for one row
and are several times faster than torch's `F.linear` for a few. Elsewhere they stay as they are. Knows no
model and no file.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .device import has_onednn

TINY = 1e-30  # the least "largest number of a row", so that a row of zeros divides by something


class FloatLinear:
    """Products in the weights' type, which is also the result's."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """`weight` (out, in), `bias` (out,)."""
        self.nbytes = weight.nbytes
        self._dtype, self._bias = weight.dtype, bias
        self._is_packed = weight.device.type == "cpu" and has_onednn()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self._dtype)
        if self._is_packed:
            return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)


class Int8Linear:
    """W8A8: products of 8-bit integers, one scale per output channel and one per row of x; float32 results.

    The largest magnitude of a channel, or of a row, is 127. A row's scale depends on that row alone. oneDNN has a
    fast kernel for unsigned x only, so rows are shifted by 128, which it takes back.
    """

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """`weight` (out, in) int8, `scales` (out,) float32, `bias` (out,) float32."""
        self.nbytes = weight.nbytes + scales.nbytes
        self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scales = scales / 127  # what a row is divided by, here where it costs nothing
        self._zero_points = torch.zeros(len(scales), dtype=torch.int64)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        x = x.float()
        largest = x.abs().amax(-1, keepdim=True).clamp_min_(TINY)  # (n, 1); NaN stays
        # To int8 and then by its sign bit to uint8: torch's own conversion to uint8 is seven times slower.
        rows = (x * largest.reciprocal().mul_(127)).round_().char().bitwise_xor_(-128).view(torch.uint8)
        y = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, 128, self._weight, self._scales, self._zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y.mul_(largest) if self._bias is None else torch.addcmul(self._bias, y, largest)


Linear = FloatLinear | Int8Linear


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(n, in) float32 -> int8 and the scales (n,): a row is about integers * scale, the largest of them 127."""
    scales = weight.abs().amax(-1, keepdim=True).clamp_min_(TINY) / 127
    return (weight / scales).round_().to(torch.int8), scales[:, 0]
