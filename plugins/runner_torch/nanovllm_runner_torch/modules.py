"""The modules of a decoder that look at one token at a time: norm, feed-forward, mixture of experts.

Shapes are those of `nanovllm_models.spec`: x (n, in) -> (n, out). Norms compute in float32. Knows no attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nanovllm.errors import UnsupportedModelError
from nanovllm_models import Experts, FeedForward, Norm

from .weights import Weights

ROWS = 256  # tokens that a feed-forward takes at once on a CPU: more leave its cache, fewer read the weights too often

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class NormLayer:
    """Over the last axis of a float32 x."""

    def __init__(self, weights: Weights, name: str, norm: Norm, order: Tensor | None = None) -> None:
        """`order` (n,): number i of the file becomes number order[i]."""
        self._kind, self._eps = norm.kind, norm.eps
        weight = weights.vector(f"{name}.weight")
        bias = weights.vector(f"{name}.bias") if norm.kind == "layer" else None
        if norm.kind not in ("layer", "rms"):
            raise UnsupportedModelError(f"the torch runner has no norm of kind {norm.kind!r}", hint="use runner: numpy")
        if norm.unit_offset:
            weight += 1
        if order is not None:
            place = order.argsort().to(weight.device)
            weight, bias = weight[place], None if bias is None else bias[place]
        self._weight, self._bias, self._shape = weight, bias, weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        if self._kind == "rms":
            return F.rms_norm(x, self._shape, self._weight, self._eps)
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)


class Dense:
    """One feed-forward."""

    def __init__(self, weights: Weights, name: str, spec: FeedForward) -> None:
        activation = ACTIVATIONS.get(spec.activation)
        if activation is None:
            raise UnsupportedModelError(
                f"the torch runner has no activation {spec.activation!r}", hint="use runner: numpy"
            )
        self._activate, self._is_gated, self._size = activation, spec.gated, spec.size
        parts = (f"{name}.gate", f"{name}.up") if spec.gated else (f"{name}.up",)
        self._gate_up = weights.linear(*parts)
        self._down = weights.linear(f"{name}.down")
        self._rows = ROWS if weights.device.type == "cpu" else None

    def __call__(self, h: Tensor) -> Tensor:
        if self._rows is None or len(h) <= self._rows:
            return self._compute(h)
        return torch.cat([self._compute(part) for part in h.split(self._rows)])

    def _compute(self, h: Tensor) -> Tensor:
        inner = self._gate_up(h)
        if self._is_gated:
            inner = self._activate(inner[:, : self._size]).mul_(inner[:, self._size :])
        else:
            inner = self._activate(inner)
        return self._down(inner)


class Mixture:
    """Many feed-forwards, of which every token passes those that the router picks.

    How many tokens an expert has is looked up on the host, once per layer.
    """

    def __init__(self, weights: Weights, name: str, spec: Experts) -> None:
        self._spec = spec
        self._router = weights.table(f"{name}.router.weight", torch.float32)  # small, and it chooses
        self._experts = [Dense(weights, f"{name}.experts.{e}", spec.expert) for e in range(spec.num_experts)]
        self._shared = None
        if spec.shared is not None:
            self._shared = Dense(weights, f"{name}.shared", spec.shared)
            self._shared_gate = weights.table(f"{name}.shared_gate.weight", torch.float32)

    def __call__(self, h: Tensor) -> Tensor:
        spec = self._spec
        # 1. The experts of every token, best first and of equals the lowest index, and how much of each.
        shares, chosen = F.linear(h, self._router).softmax(-1).sort(dim=-1, descending=True, stable=True)
        shares, chosen = shares[:, : spec.top_k], chosen[:, : spec.top_k]
        if spec.normalised:
            shares = shares / shares.sum(-1, keepdim=True)

        # 2. The pairs of a token and an expert, by expert and then by token, and how many each expert has.
        owner = chosen.reshape(-1)  # (n * top_k,)
        pairs = owner.argsort(stable=True)
        tokens, factors = pairs // spec.top_k, shares.reshape(-1)[pairs, None]
        counts = torch.bincount(owner, minlength=spec.num_experts).tolist()

        # 3. One product for every expert that has tokens. A token is summed in the order of its experts.
        out = torch.zeros_like(h)
        own = zip(tokens.split(counts), factors.split(counts), self._experts, strict=True)
        for part, factor, expert in own:
            if len(part):
                out.index_add_(0, part, expert(h[part]) * factor)
        if self._shared is not None:
            out += self._shared(h) * F.linear(h, self._shared_gate).sigmoid_()
        return out


def feed_forward(weights: Weights, name: str, spec: FeedForward | Experts) -> Dense | Mixture:
    return Dense(weights, name, spec) if isinstance(spec, FeedForward) else Mixture(weights, name, spec)
