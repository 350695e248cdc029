"""The products with a model's matrices, in each precision: x (n, in) -> x @ W.T + bias (n, out).

A precision is a class with two methods: `products`, of several matrices that read the same x, and
`rows` of an embedding. int8 quantises x with a scale of its own for every row, and int4's operator with
one for every block of a row: never with one that is shared, which would couple the requests of a batch.
Knows no module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import ConfigError
from nanovllm_models import Tensor

from .graph import MICROSOFT, Graph
from .precision import Precision, to_int4, to_int8


class Linears(ABC):
    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        self._graph, self._tensors = graph, tensors

    @abstractmethod
    def products(self, x: str, weights: Sequence[str], biases: Sequence[str]) -> list[str]:
        """x @ W.T + bias of each; `biases` has a name for every weight or is empty. The weights exist once."""

    @abstractmethod
    def rows(self, table: str, ids: str) -> str:
        """Rows (n, hidden) of an embedding (num, hidden)."""


class FloatLinears(Linears):
    """A weight keeps the orientation of the file, so that a float32 file is used as it is mapped."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(graph, tensors)
        self._is_transposed: dict[str, bool] = {}  # name -> (in, out), as in GPT-2's files, instead of (out, in)

    def products(self, x: str, weights: Sequence[str], biases: Sequence[str]) -> list[str]:
        outputs = []
        for i, name in enumerate(weights):
            inputs = [x, self._weight(name)]
            if biases:
                inputs.append(self._weight(biases[i]))
            outputs.append(self._graph.op("Gemm", *inputs, transB=int(not self._is_transposed[name])))
        return outputs

    def rows(self, table: str, ids: str) -> str:
        return self._graph.op("Gather", self._weight(table), ids, axis=0)

    def _weight(self, name: str) -> str:
        """A tied embedding is widened once."""
        if name not in self._is_transposed:
            array = as_float32(self._tensors[name])
            self._is_transposed[name] = not array.flags.c_contiguous
            self._graph.weight(name, array.T if self._is_transposed[name] else array)
        return name


class QuantisedLinears(Linears):
    """Matrices that read the same x are one, because few large products are faster than many small ones."""

    def products(self, x: str, weights: Sequence[str], biases: Sequence[str]) -> list[str]:
        g = self._graph
        y = self._product(x, weights, self._joined(biases))
        if len(weights) == 1:
            return [y]
        sizes = g.constant([self._tensors[name].shape[0] for name in weights])
        return g.ops("Split", y, sizes, axis=1, names=[f"{y}.{i}" for i in range(len(weights))])

    @abstractmethod
    def _product(self, x: str, weights: Sequence[str], bias: str | None) -> str:
        """Of the matrices one below the other."""

    def _joined(self, biases: Sequence[str]) -> str | None:
        if not biases:
            return None
        return self._graph.weight("+".join(biases), np.concatenate([as_float32(self._tensors[b]) for b in biases]))


class Int8Linears(QuantisedLinears):
    """W8A8. x is divided by its row's peak and multiplied by 127; whole numbers are multiplied and added up
    exactly; the scales come last. A row of zeros becomes 0 / 0, anything at all as a whole number, times 0. Where a
    row has inf, so has its product; a NaN among numbers is lost, but it is the row's own loss."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(graph, tensors)
        self._quantised: dict[str, tuple[str, str]] = {}  # x -> its whole numbers and its rows' peaks

    def _product(self, x: str, weights: Sequence[str], bias: str | None) -> str:
        g, name = self._graph, "+".join(weights)
        if not g.has_weight(name):
            values, scales = to_int8([self._tensors[w] for w in weights])
            g.weight(name, values)
            g.weight(f"{name}.scales", scales / np.float32(127))
        zero, one = g.constant(128, np.uint8), g.scalar(1)
        if x not in self._quantised:
            peaks = g.op("ReduceMax", g.op("Abs", x), g.constant([1]))
            self._quantised[x] = g.op("QuantizeLinear", g.op("Div", x, peaks), g.scalar(1 / 127), zero), peaks
        q, peaks = self._quantised[x]
        y = g.op("MatMulIntegerToFloat", q, name, one, f"{name}.scales", zero, domain=MICROSOFT)
        y = g.op("Mul", y, peaks)
        return y if bias is None else g.op("Add", y, bias)

    def rows(self, table: str, ids: str) -> str:
        g, name = self._graph, f"{table}.rows"
        values, scales = to_int8([self._tensors[table]])  # once more where it is the output matrix too
        rows = g.op("Gather", g.weight(name, np.ascontiguousarray(values.T)), ids, axis=0)
        scales = g.op("Gather", g.weight(f"{name}.scales", scales[:, None]), ids, axis=0)
        return g.op("Mul", g.cast(rows, np.float32), scales)


class Int4Linears(QuantisedLinears):
    """An embedding that is also the output matrix is held once."""

    def __init__(self, graph: Graph, tensors: Mapping[str, Tensor], block: int) -> None:
        super().__init__(graph, tensors)
        self._block = block

    def _weights(self, names: Sequence[str]) -> tuple[str, str]:
        g, name = self._graph, "+".join(names)
        if not g.has_weight(name):
            values, scales = to_int4([self._tensors[w] for w in names], self._block)
            g.weight(name, values)
            g.weight(f"{name}.scales", scales)
        return name, f"{name}.scales"

    def _product(self, x: str, weights: Sequence[str], bias: str | None) -> str:
        values, scales = self._weights(weights)
        num_out, num_in = sum(self._tensors[w].shape[0] for w in weights), self._tensors[weights[0]].shape[1]
        return self._graph.op(
            "MatMulNBits", x, values, scales, *([] if bias is None else ["", "", bias]),
            domain=MICROSOFT, K=num_in, N=num_out, bits=4, block_size=self._block, accuracy_level=4,
        )  # fmt: skip

    def rows(self, table: str, ids: str) -> str:
        g, (num_rows, width) = self._graph, self._tensors[table].shape
        values, scales = self._weights([table])
        values = g.op("Reshape", values, g.constant([num_rows, -1]))
        rows = g.op(
            "GatherBlockQuantized", values, ids, scales,
            domain=MICROSOFT, bits=4, block_size=self._block, gather_axis=0, quantize_axis=1,
        )  # fmt: skip
        if width % self._block:
            rows = g.op("Slice", rows, g.constant([0]), g.constant([width]), g.constant([1]))
        return rows


def make_linears(graph: Graph, tensors: Mapping[str, Tensor], precision: Precision, device: str) -> Linears:
    """Raises ConfigError for a precision that the device has no operators for."""
    if device != "cpu":
        from .device_linears import make_device_linears

        return make_device_linears(graph, tensors, precision, device)
    if precision.weights == "int8":
        return Int8Linears(graph, tensors)
    if precision.weights == "int4":
        return Int4Linears(graph, tensors, precision.block)
    if precision.weights == "fp16":
        raise ConfigError(
            "weights: fp16 is not for the cpu, where ONNX Runtime has no product of fp16 matrices",
            hint="choose weights: int8 or fp32",
        )
    return FloatLinears(graph, tensors)


def as_float32(tensor: Tensor) -> NDArray[np.float32]:
    """The mapped file itself where that is float32 in one piece, as it is or transposed; else a copy."""
    array = tensor.array
    is_whole = array.flags.c_contiguous or array.T.flags.c_contiguous
    if tensor.dtype == "F32" and is_whole and array.flags.aligned and not tensor.is_grouped:
        return array
    return tensor.to_float32()
