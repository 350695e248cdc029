"""The decoder itself: a DecoderSpec and its weights, interpreted layer by layer.

Read `forward` first; it is the whole computation. Weights are widened to float32 once, at load, and
laid out for BLAS: linear weights as (in, out), so that tokens @ weight walks both in order; q, k, v
side by side in one matrix, gate and up in another. The token embedding stays (vocab, hidden), for
both its lookup and, when tied, the logits. Knows no engine, no file format and no family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.batch import Packed
from nanovllm_models import DecoderSpec, Norm, Rotary, Tensor, rotary_frequencies

from .attention import KVPool, attend, plan_attention
from .blas import Blas
from .ops import ACTIVATIONS, NORMS, FloatArray, rotate_


@dataclass(frozen=True, slots=True)
class NormWeights:
    norm: Norm
    weight: FloatArray
    bias: FloatArray | None

    def __call__(self, x: FloatArray) -> FloatArray:
        return NORMS[self.norm.kind](x, self.weight, self.bias, self.norm.eps)


@dataclass(frozen=True, slots=True)
class LinearWeights:
    weight: FloatArray  # (in, out)
    bias: FloatArray | None  # (out,)

    def __call__(self, x: FloatArray, out: FloatArray | None = None) -> FloatArray:
        y = np.matmul(x, self.weight, out=out)
        if self.bias is not None:
            y += self.bias
        return y


@dataclass(frozen=True, slots=True)
class Layer:
    attn_norm: NormWeights
    qkv: LinearWeights  # (hidden, q heads | k heads | v heads)
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    attn_out: LinearWeights
    mlp_norm: NormWeights
    gate_up: LinearWeights  # (hidden, gate | up), or (hidden, up) where nothing is gated
    down: LinearWeights


class Model:
    """`max_len` fixes the frequencies of length-dependent rotary rules (see nanovllm_models.rope)."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Tensor], max_len: int, blas: Blas) -> None:
        self.spec = spec
        self._blas = blas
        self._activate = ACTIVATIONS[spec.mlp.activation]
        self._tokens = weights["embed.tokens.weight"].to_float32()  # (vocab, hidden)
        self._lm_head = self._tokens if spec.tied_embeddings else weights["lm_head.weight"].to_float32()
        if isinstance(spec.positions, Rotary):
            self._frequencies, self._rotary_factor = rotary_frequencies(spec.positions, max_len)
        else:
            self._positions = weights["embed.positions.weight"].to_float32()  # (max_positions, hidden)
        self._final_norm = _norm(weights, "final_norm", spec.norm)
        self._layers = [_layer(weights, spec, f"layers.{i}") for i in range(spec.num_layers)]

    def forward(self, packed: Packed, pools: Sequence[KVPool]) -> FloatArray:
        """Write K and V of the T tokens into the pools (one per layer); return logits (R, vocab)."""
        spec, attention = self.spec, self.spec.attention
        num_tokens, size = len(packed.input_ids), attention.head_size
        num_q, num_kv = attention.num_heads, attention.num_kv_heads

        # 1. What every layer of this step shares: the angles, the attention plans, the big buffers.
        if isinstance(spec.positions, Rotary):
            angles = packed.positions[:, None, None].astype(np.float32) * self._frequencies  # (T, 1, dim / 2)
            cos, sin = np.cos(angles), np.sin(angles)
            cos *= self._rotary_factor
            sin *= self._rotary_factor
        plans = {window: plan_attention(packed, window, pools[0]) for window in set(attention.windows)}
        qkv = np.empty((num_tokens, (num_q + 2 * num_kv) * size), np.float32)
        heads = qkv.reshape(num_tokens, num_q + 2 * num_kv, size)
        q, k, v = heads[:, :num_q], heads[:, num_q : num_q + num_kv], heads[:, num_q + num_kv :]
        mixed = np.empty((num_tokens, num_q, size), np.float32)  # what attention returns
        inner = np.empty((num_tokens, (2 if spec.mlp.gated else 1) * spec.mlp.size), np.float32)

        # 2. The residual stream x (T, hidden), through every layer.
        x = self._tokens[packed.input_ids]
        if not isinstance(spec.positions, Rotary):
            x += self._positions[packed.positions]
        for layer, window, pool in zip(self._layers, attention.windows, pools, strict=True):
            layer.qkv(layer.attn_norm(x), out=qkv)
            if layer.q_norm is not None and layer.k_norm is not None:
                q[...], k[...] = layer.q_norm(q), layer.k_norm(k)
            if isinstance(spec.positions, Rotary):
                rotate_(heads[:, : num_q + num_kv], cos, sin)
            np.multiply(q, attention.scale, out=q)
            pool.write(packed.slots, k, v)
            attend(plans[window], q, pool, mixed, self._blas)
            attended = mixed.reshape(num_tokens, num_q * size)
            if pool is pools[-1]:  # nothing after the last attention mixes tokens: go on with the wanted ones
                attended, x, inner = attended[packed.rows], x[packed.rows], inner[: len(packed.rows)]
            x += layer.attn_out(attended)
            layer.gate_up(layer.mlp_norm(x), out=inner)
            hidden = inner[:, : spec.mlp.size]
            self._activate(hidden)
            if spec.mlp.gated:
                hidden *= inner[:, spec.mlp.size :]
            x += layer.down(hidden)

        # 3. Logits (R, vocab).
        return self._final_norm(x) @ self._lm_head.T


def _layer(weights: Mapping[str, Tensor], spec: DecoderSpec, name: str) -> Layer:
    attn, mlp = f"{name}.attn", f"{name}.mlp"
    qk_norm = spec.attention.qk_norm
    return Layer(
        attn_norm=_norm(weights, f"{attn}_norm", spec.norm),
        qkv=_linear(weights, f"{attn}.q", f"{attn}.k", f"{attn}.v"),
        q_norm=None if qk_norm is None else _norm(weights, f"{attn}.q_norm", qk_norm),
        k_norm=None if qk_norm is None else _norm(weights, f"{attn}.k_norm", qk_norm),
        attn_out=_linear(weights, f"{attn}.out"),
        mlp_norm=_norm(weights, f"{mlp}_norm", spec.norm),
        gate_up=_linear(weights, *([f"{mlp}.gate"] if spec.mlp.gated else []), f"{mlp}.up"),
        down=_linear(weights, f"{mlp}.down"),
    )


def _norm(weights: Mapping[str, Tensor], name: str, norm: Norm) -> NormWeights:
    bias = weights.get(f"{name}.bias")
    return NormWeights(norm, weights[f"{name}.weight"].to_float32(), None if bias is None else bias.to_float32())


def _linear(weights: Mapping[str, Tensor], *names: str) -> LinearWeights:
    """Several linear modules of the same input, side by side: (in, out_1 | out_2 | ...)."""
    parts = [weights[f"{name}.weight"] for name in names]
    weight = np.empty((parts[0].shape[1], sum(part.shape[0] for part in parts)), np.float32)
    column = 0
    for part in parts:
        part.to_float32(weight[:, column : column + part.shape[0]].T)
        column += part.shape[0]
    biases = [weights[f"{name}.bias"].to_float32() for name in names if f"{name}.bias" in weights]
    return LinearWeights(weight, np.concatenate(biases) if biases else None)
