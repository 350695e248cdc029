"""What is otherwise about the products with a model's matrices on CUDA and DirectML. See `linears.py`.

Activations are float16 there (on DirectML also float32), and int4's products leave the bias to a node of its
own: of the providers' kernels only the CPU's is known to add it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nanovllm.errors import ConfigError
from nanovllm_models import Tensor

from .graph import Graph
from .linears import FloatLinears, Int4Linears, Linears, as_float32
from .precision import Precision


class DeviceInt4Linears(Int4Linears):
    def _product(self, x: str, weights: Sequence[str], bias: str | None) -> str:
        y = super()._product(x, weights, None)
        return y if bias is None else self._graph.op("Add", y, bias)


class DirectMLInt4Linears(DeviceInt4Linears):
    """Nothing there looks up quantised rows: an embedding is float, beside the same numbers as output matrix."""

    def rows(self, table: str, ids: str) -> str:
        rows = self._graph.weight(f"{table}.rows", np.ascontiguousarray(as_float32(self._tensors[table])))
        return self._graph.op("Gather", rows, ids, axis=0)


def make_device_linears(graph: Graph, tensors: Mapping[str, Tensor], precision: Precision, device: str) -> Linears:
    """`linears.make_linears` of a device other than the CPU."""
    if precision.weights == "int8":
        raise ConfigError(
            f"weights: int8 is not for {device}, where ONNX Runtime has no products of our kind",
            hint="choose weights: int4 or fp16",
        )
    if precision.weights == "fp32" and device == "cuda":
        raise ConfigError(
            "weights: fp32 is not for cuda, where paged attention computes in fp16",
            hint="choose weights: fp16 or int4",
        )
    if precision.weights == "int4":
        linears = DirectMLInt4Linears if device == "directml" else DeviceInt4Linears
        return linears(graph, tensors, precision.block)
    return FloatLinears(graph, tensors)
