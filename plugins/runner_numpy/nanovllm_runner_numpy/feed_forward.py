"""The feed-forward of a layer: one for all tokens, or a mixture of which every token passes a few.

Weights lie as in `model.py`: (in, out), gate and up side by side. Knows no attention and no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanovllm_models import Experts, FeedForward, Tensor

from .linear import LinearWeights
from .ops import ACTIVATIONS, FloatArray, softmax_


@dataclass(frozen=True, slots=True)
class Dense:
    spec: FeedForward
    gate_up: LinearWeights  # (hidden, gate | up), or (hidden, up) where nothing is gated
    down: LinearWeights

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], spec: FeedForward, name: str) -> Dense:
        parts = (f"{name}.gate", f"{name}.up") if spec.gated else (f"{name}.up",)
        return cls(spec, LinearWeights.load(weights, *parts), LinearWeights.load(weights, f"{name}.down"))

    @property
    def width(self) -> int:
        """Numbers of scratch per token."""
        return int(self.gate_up.weight.shape[1])

    def __call__(self, h: FloatArray, scratch: FloatArray) -> FloatArray:
        """(n, hidden) -> (n, hidden); `scratch` is flat and holds n * width numbers."""
        inner = self.gate_up(h, out=scratch[: len(h) * self.width].reshape(len(h), self.width))
        hidden = inner[:, : self.spec.size]
        ACTIVATIONS[self.spec.activation](hidden)
        if self.spec.gated:
            hidden *= inner[:, self.spec.size :]
        return self.down(hidden)


@dataclass(frozen=True, slots=True)
class Mixture:
    spec: Experts
    router: LinearWeights  # (hidden, num_experts)
    experts: tuple[Dense, ...]
    shared: Dense | None
    shared_gate: LinearWeights | None  # (hidden, 1)

    @classmethod
    def load(cls, weights: Mapping[str, Tensor], spec: Experts, name: str) -> Mixture:
        experts = range(spec.num_experts)
        return cls(
            spec,
            LinearWeights.load(weights, f"{name}.router"),
            tuple(Dense.load(weights, spec.expert, f"{name}.experts.{e}") for e in experts),
            None if spec.shared is None else Dense.load(weights, spec.shared, f"{name}.shared"),
            None if spec.shared is None else LinearWeights.load(weights, f"{name}.shared_gate"),
        )

    @property
    def width(self) -> int:
        return max(self.experts[0].width, 0 if self.shared is None else self.shared.width)

    def __call__(self, h: FloatArray, scratch: FloatArray) -> FloatArray:
        """(n, hidden) -> (n, hidden). One product for every expert that has tokens.

        A row is summed in the order of its experts, whatever other rows there are.
        """
        chosen, shares = self.route(h)
        owner = chosen.ravel()  # (n * top_k,) the expert of each pair of a token and an expert
        pairs = np.argsort(owner, kind="stable")  # by expert, then by token
        borders = np.searchsorted(owner[pairs], np.arange(len(self.experts) + 1))
        tokens, weights = pairs // self.spec.top_k, shares.ravel()[pairs][:, None]
        out = np.zeros_like(h)
        for e in np.flatnonzero(np.diff(borders)):
            own = slice(borders[e], borders[e + 1])
            y = self.experts[e](h[tokens[own]], scratch)
            y *= weights[own]
            out[tokens[own]] += y  # a token has an expert at most once
        if self.shared is not None and self.shared_gate is not None:
            y = self.shared(h, scratch)
            y /= 1 + np.exp(-self.shared_gate(h))
            out += y
        return out

    def route(self, h: FloatArray) -> tuple[NDArray[np.intp], FloatArray]:
        """The experts of every token, (n, top_k), best first (of equals the lowest index), and their shares."""
        probabilities = self.router(h)
        probabilities /= softmax_(probabilities)
        chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, : self.spec.top_k]
        shares = np.take_along_axis(probabilities, chosen, axis=-1)
        if self.spec.normalised:
            shares /= shares.sum(-1, keepdims=True)
        return chosen, shares


def load_feed_forward(weights: Mapping[str, Tensor], spec: FeedForward | Experts, name: str) -> Dense | Mixture:
    return Dense.load(weights, spec, name) if isinstance(spec, FeedForward) else Mixture.load(weights, spec, name)
