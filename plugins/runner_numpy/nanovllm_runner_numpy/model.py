"""The decoder itself: a DecoderSpec and its weights, interpreted layer by layer.

Read `forward` first; it is the whole computation, in the order of the pseudocode in
`nanovllm_models/spec.py`. Weights are widened to float32 once, at load, and laid out for BLAS: linear
weights as (in, out), so that tokens @ weight walks both in order; q, k, v side by side in one matrix,
gate and up in another. The token embedding stays (vocab, hidden), for both its lookup and, when tied,
the logits. Knows no engine, no file format and no family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.batch import IntArray, Packed
from nanovllm_models import DecoderSpec, Rotary, Tensor, alibi_bias, rotary_frequencies

from .attention import KVPool, Plan, Scoring, attend, plan_attention
from .blas import Blas
from .feed_forward import Dense, Mixture, load_feed_forward
from .linear import LinearWeights, NormWeights
from .ops import FloatArray, rotate_, soft_cap_


@dataclass(frozen=True, slots=True)
class Layer:
    """A norm that the spec does not have is None."""

    window: int | None
    rotary: Rotary | None
    attn_norm: NormWeights | None
    qkv: LinearWeights  # (hidden, q heads | k heads | v heads)
    q_norm: NormWeights | None
    k_norm: NormWeights | None
    attn_out: LinearWeights
    attn_post_norm: NormWeights | None
    mlp_norm: NormWeights | None
    mlp: Dense | Mixture
    mlp_post_norm: NormWeights | None


@dataclass(frozen=True, slots=True)
class Angles:
    cos: FloatArray  # (T, 1, dim / 2)
    sin: FloatArray

    @classmethod
    def at(cls, positions: IntArray, frequencies: FloatArray, factor: float) -> Angles:
        angles = positions[:, None, None].astype(np.float32) * frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        cos *= factor
        sin *= factor
        return cls(cos, sin)


class Model:
    """`max_len` fixes the frequencies of length-dependent rotary rules (see nanovllm_models.rope)."""

    def __init__(self, spec: DecoderSpec, weights: Mapping[str, Tensor], max_len: int, blas: Blas) -> None:
        attention = spec.attention
        self.spec = spec
        self._blas = blas
        self._tokens = weights["embed.tokens.weight"].to_float32()  # (vocab, hidden)
        self._positions = weights["embed.positions.weight"].to_float32() if spec.learned_positions else None
        self._lm_head = self._tokens if spec.tied_embeddings else weights["lm_head.weight"].to_float32()
        self._lm_head_bias = weights["lm_head.bias"].to_float32() if spec.lm_head_bias else None
        self._frequencies = {r: rotary_frequencies(r, max_len) for r in set(attention.rotary) if r is not None}
        bias = None
        if attention.alibi is not None:
            bias = alibi_bias(attention.alibi, max_len) * np.float32(attention.scale)
            bias = bias.reshape(attention.num_kv_heads, -1, max_len)
        self._scoring = Scoring(attention.soft_cap, bias)
        self._final_norm = NormWeights.load(weights, "final_norm", spec.norm)
        self._layers = [_layer(weights, spec, i) for i in range(spec.num_layers)]
        self._inner_width = max(layer.mlp.width for layer in self._layers)

    def forward(self, packed: Packed, pools: Sequence[KVPool]) -> FloatArray:
        """Write K and V of the T tokens into the pools (one per layer); return logits (R, vocab)."""
        spec, block, attention = self.spec, self.spec.block, self.spec.attention
        num_tokens, size = len(packed.input_ids), attention.head_size
        num_q, num_kv = attention.num_heads, attention.num_kv_heads

        # 1. What every layer of this step shares: the angles, the attention plans, the big buffers.
        angles = {r: Angles.at(packed.positions, *found) for r, found in self._frequencies.items()}
        plans = {w: plan_attention(packed, w, pools[0], self._scoring) for w in set(attention.windows)}
        qkv = np.empty((num_tokens, (num_q + 2 * num_kv) * size), np.float32)
        mixed = np.empty((num_tokens, num_q, size), np.float32)  # what attention returns
        inner = np.empty(num_tokens * self._inner_width, np.float32)  # of the feed-forward

        # 2. The residual stream x (T, hidden), through every layer.
        x = self._tokens[packed.input_ids]
        if spec.embedding_scale != 1:
            x *= np.float32(spec.embedding_scale)
        if self._positions is not None:
            x += self._positions[packed.positions]
        for layer, pool in zip(self._layers, pools, strict=True):
            h = x if layer.attn_norm is None else layer.attn_norm(x)
            layer.qkv(h, out=qkv)
            self._attend(
                layer,
                qkv,
                None if layer.rotary is None else angles[layer.rotary],
                packed.slots,
                plans[layer.window],
                pool,
                mixed,
            )
            attended = mixed.reshape(num_tokens, num_q * size)
            if pool is pools[-1]:  # nothing after the last attention mixes tokens: go on with the wanted ones
                attended, x, h = attended[packed.rows], x[packed.rows], h[packed.rows]
            a = self._branch(layer.attn_out(attended), layer.attn_post_norm)
            if not block.parallel:
                x += a
                h = x
            if layer.mlp_norm is not None:
                h = layer.mlp_norm(x)
            f = self._branch(layer.mlp(h, inner), layer.mlp_post_norm)
            if block.parallel:
                x += a
            x += f

        # 3. Logits (R, vocab).
        logits = self._final_norm(x) @ self._lm_head.T
        if self._lm_head_bias is not None:
            logits += self._lm_head_bias
        if spec.logits_scale != 1:
            logits *= np.float32(spec.logits_scale)
        if spec.logits_soft_cap is not None:
            soft_cap_(logits, spec.logits_soft_cap)
        return logits

    def _attend(
        self,
        layer: Layer,
        qkv: FloatArray,
        angles: Angles | None,
        slots: IntArray,
        plan: Plan,
        pool: KVPool,
        out: FloatArray,
    ) -> None:
        """Norm and rotate q and k inside `qkv`, store k and v, and write the attention of all heads to `out`."""
        attention = self.spec.attention
        num_q, num_kv, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        heads = qkv.reshape(len(qkv), num_q + 2 * num_kv, size)
        q, k, v = heads[:, :num_q], heads[:, num_q : num_q + num_kv], heads[:, num_q + num_kv :]
        if layer.q_norm is not None and layer.k_norm is not None:
            if attention.qk_norm_whole:
                whole_q, whole_k = qkv[:, : num_q * size], qkv[:, num_q * size : (num_q + num_kv) * size]
                whole_q[...], whole_k[...] = layer.q_norm(whole_q), layer.k_norm(whole_k)
            else:
                q[...], k[...] = layer.q_norm(q), layer.k_norm(k)
        if angles is not None:
            rotate_(heads[:, : num_q + num_kv], angles.cos, angles.sin)
        q *= np.float32(attention.scale)
        pool.write(slots, k, v)
        attend(plan, q, pool, out, self._blas)

    def _branch(self, y: FloatArray, post_norm: NormWeights | None) -> FloatArray:
        """What attention or feed-forward adds to the residual stream."""
        if post_norm is not None:
            y = post_norm(y)
        if self.spec.residual_scale != 1:
            y *= np.float32(self.spec.residual_scale)
        return y


def _layer(weights: Mapping[str, Tensor], spec: DecoderSpec, i: int) -> Layer:
    attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
    block, qk_norm = spec.block, spec.attention.qk_norm

    def norm(name: str, exists: bool) -> NormWeights | None:
        return NormWeights.load(weights, name, spec.norm) if exists else None

    return Layer(
        window=spec.attention.windows[i],
        rotary=spec.attention.rotary[i],
        attn_norm=norm(f"{attn}_norm", block.pre_norms),
        qkv=LinearWeights.load(weights, f"{attn}.q", f"{attn}.k", f"{attn}.v"),
        q_norm=None if qk_norm is None else NormWeights.load(weights, f"{attn}.q_norm", qk_norm),
        k_norm=None if qk_norm is None else NormWeights.load(weights, f"{attn}.k_norm", qk_norm),
        attn_out=LinearWeights.load(weights, f"{attn}.out"),
        attn_post_norm=norm(f"{attn}_post_norm", block.post_norms),
        mlp_norm=norm(f"{mlp}_norm", block.pre_norms and not block.shared_norm),
        mlp=load_feed_forward(weights, spec.mlps[i], mlp),
        mlp_post_norm=norm(f"{mlp}_post_norm", block.post_norms),
    )
