"""The modules of a decoder that look at one token at a time, as ONNX nodes: linear, norm, feed-forward.

Shapes are those of `nanovllm_models.spec`: x (n, in) -> (n, out). Knows no attention and no precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import UnsupportedModelError
from nanovllm_models import Experts, FeedForward, Norm, Tensor

from .graph import MICROSOFT, Graph
from .linears import Linears, as_float32

ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "gelu": lambda g, x: g.op("Gelu", x, approximate="none"),
    "gelu_tanh": lambda g, x: g.op("Gelu", x, approximate="tanh"),
    "relu": lambda g, x: g.op("Relu", x),
    "silu": lambda g, x: g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0),  # x * sigmoid(alpha * x)
}


@dataclass(frozen=True, slots=True)
class Modules:
    """Each method appends the nodes of a module; `name` is its canonical name in `DecoderSpec.shapes()`."""

    graph: Graph
    tensors: Mapping[str, Tensor]
    matrices: Linears  # in the precision of the weights
    floats: Linears  # what is never quantised
    activations: Mapping[str, Callable[[Graph, str], str]]  # by their names in a spec

    def linears(self, x: str, *names: str) -> list[str]:
        """Several that read the same x."""
        biases = [f"{name}.bias" for name in names] if f"{names[0]}.bias" in self.tensors else []
        return self.matrices.products(x, [f"{name}.weight" for name in names], biases)

    def linear(self, x: str, name: str) -> str:
        return self.linears(x, name)[0]

    def norm(self, x: str, name: str, norm: Norm) -> str:
        """Over the last axis of x."""
        weight = self._vector(f"{name}.weight")
        if norm.unit_offset:
            weight = weight + np.float32(1)
        scale = self.graph.weight(f"{name}.weight", weight)
        if norm.kind == "rms":
            return self.graph.op("SimplifiedLayerNormalization", x, scale, axis=-1, epsilon=norm.eps)
        if norm.kind == "layer":
            bias = self.graph.weight(f"{name}.bias", self._vector(f"{name}.bias"))
            return self.graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=norm.eps)
        raise UnsupportedModelError(f"the onnx runner has no norm of kind {norm.kind!r}", hint="use runner: numpy")

    def feed_forward(self, x: str, name: str, spec: FeedForward | Experts) -> str:
        if isinstance(spec, Experts):
            return self._experts(x, name, spec)
        activate = self.activations.get(spec.activation)
        if activate is None:
            raise UnsupportedModelError(
                f"the onnx runner has no activation {spec.activation!r}", hint="use runner: numpy"
            )
        if spec.gated:  # apart: one product of both would have to be split, which copies the widest matrix of the layer
            gate, up = (self.linear(x, f"{name}.{part}") for part in ("gate", "up"))
            inner = self.graph.op("Mul", activate(self.graph, gate), up)
        else:
            inner = activate(self.graph, self.linear(x, f"{name}.up"))
        return self.linear(inner, f"{name}.down")

    def _experts(self, x: str, name: str, spec: Experts) -> str:
        """One product for every expert, of the tokens that chose it, which may be none.

        A pair is a token and one of its experts. Pairs are sorted by expert, split, computed, and put
        back in the order of the tokens, where each row sums its own.
        """
        g, k = self.graph, spec.top_k
        # 1. Which experts (n, k), best first and of equals the lowest index, and how much of each.
        p = g.op("Softmax", self._small(x, f"{name}.router"), axis=-1)
        shares, chosen = g.ops("TopK", p, g.constant([k]), axis=-1, names=[f"{name}.shares", f"{name}.chosen"])
        if spec.normalised:
            shares = g.op("Div", shares, self._sum(shares, k, f"{name}.share"))

        # 2. The pairs, numbered token * k + choice, by expert and then by number: (num_experts, n * k) is
        # True where the pair is the expert's, and NonZero walks it row by row.
        pairs = g.op("Reshape", chosen, g.constant([1, -1]))
        is_own = g.op("Equal", pairs, g.constant(np.arange(spec.num_experts)[:, None]))
        counts = g.op("ReduceSum", g.cast(is_own, np.int64), g.constant([1]), keepdims=0)
        order = g.op("Gather", g.op("NonZero", is_own), g.constant(1), axis=0)  # (n * k,)
        rows = g.op("Gather", x, g.op("Div", order, g.constant(k)), axis=0)  # (n * k, hidden)

        # 3. Every expert on its rows.
        names = [f"{name}.rows.{e}" for e in range(spec.num_experts)]
        parts = g.ops("Split", rows, counts, axis=0, names=names)
        done = [self.feed_forward(part, f"{name}.experts.{e}", spec.expert) for e, part in enumerate(parts)]

        # 4. Back to the tokens: pair order[i] is row i.
        place = g.op("Reshape", order, g.constant([-1, 1]))
        count = g.op("Shape", order)
        numbers = g.op("Range", g.constant(0), g.op("Squeeze", count), g.constant(1))
        row_of_pair = g.op("ScatterND", numbers, place, numbers)
        y = g.op("Gather", g.op("Concat", *done, axis=0), row_of_pair, axis=0)
        y = g.op("Reshape", y, g.constant([-1, k, self.tensors[f"{name}.router.weight"].shape[1]]))
        y = g.op("Mul", y, g.op("Unsqueeze", shares, g.constant([2])))
        y = g.op("Squeeze", self._sum(y, k, f"{name}.term"), g.constant([1]))  # (n, hidden)
        if spec.shared is None:
            return y
        gate = g.op("Sigmoid", self._small(x, f"{name}.shared_gate"))
        return g.op("Add", y, g.op("Mul", self.feed_forward(x, f"{name}.shared", spec.shared), gate))

    def _sum(self, x: str, k: int, name: str) -> str:
        """(n, k, ...) -> (n, 1, ...), term by term: ReduceSum adds in another order where n is 1."""
        names = [f"{name}.{i}" for i in range(k)]
        return self.graph.op("Sum", *self.graph.ops("Split", x, self.graph.constant([1] * k), axis=1, names=names))

    def _small(self, x: str, name: str) -> str:
        """A linear of few outputs that decide much: always in float."""
        return self.floats.products(x, [f"{name}.weight"], [])[0]

    def _vector(self, name: str) -> NDArray[np.float32]:
        return as_float32(self.tensors[name])
