"""Weights as the runner holds them: float32, laid out for BLAS. Knows no model and no file format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nanovllm_models import Norm, Tensor

from .ops import NORMS, FloatArray


@dataclass(frozen=True, slots=True)
class NormWeights:
    norm: Norm
    weight: FloatArray  # (n,) what multiplies: 1 is added already where the norm's weight is an offset
    bias: FloatArray | None

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], name: str, norm: Norm) -> NormWeights:
        weight, bias = weights[f"{name}.weight"].to_float32(), weights.get(f"{name}.bias")
        if norm.unit_offset:
            weight += 1
        return cls(norm, weight, None if bias is None else bias.to_float32())

    def __call__(self, x: FloatArray) -> FloatArray:
        return NORMS[self.norm.kind](x, self.weight, self.bias, self.norm.eps)


@dataclass(frozen=True, slots=True)
class LinearWeights:
    weight: FloatArray  # (in, out)
    bias: FloatArray | None  # (out,)

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], *names: str) -> LinearWeights:
        """Several linear modules of the same input, side by side: (in, out_1 | out_2 | ...)."""
        parts = [weights[f"{name}.weight"] for name in names]
        weight = np.empty((parts[0].shape[1], sum(part.shape[0] for part in parts)), np.float32)
        column = 0
        for part in parts:
            part.to_float32(weight[:, column : column + part.shape[0]].T)
            column += part.shape[0]
        biases = [weights[f"{name}.bias"].to_float32() for name in names if f"{name}.bias" in weights]
        return cls(weight, np.concatenate(biases) if biases else None)

    def __call__(self, x: FloatArray, out: FloatArray | None = None) -> FloatArray:
        y = np.matmul(x, self.weight, out=out)
        if self.bias is not None:
            y += self.bias
        return y
