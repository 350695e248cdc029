"""The decoder itself: a DecoderSpec and its weights as torch modules, computed layer by layer.

Read `forward` first; it is the whole computation, in the order of the pseudocode in
`nanovllm_models/spec.py`. The residual stream, norms and rotations are float32, whatever the products are
computed in. q, k, v are one product, gate and up another. Knows no engine, no file format and no family.

One rearrangement: a rotary pair (j, j + dim/2) lies side by side here, in the rows of q and k, so that a
rotation is one product of complex numbers. Scores do not change: q and k are rearranged alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanovllm.batch import Packed
from nanovllm_models import DecoderSpec, Rotary, rotary_frequencies

from .attention import PagedAttention
from .kv_pool import KVPool
from .modules import NormLayer, feed_forward
from .weights import Weights


class Layer:
    """The modules of one layer. A norm that the spec does not have is None."""

    def __init__(self, weights: Weights, spec: DecoderSpec, i: int) -> None:
        attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
        block, attention = spec.block, spec.attention

        def norm(name: str, exists: bool) -> NormLayer | None:
            return NormLayer(weights, name, spec.norm) if exists else None

        self.window, self.rotary = attention.windows[i], attention.rotary[i]
        order_q, order_k = (
            _pairs_together(num_heads, attention.head_size, self.rotary)
            for num_heads in (attention.num_heads, attention.num_kv_heads)
        )
        num_q, num_k = len(order_q), len(order_k)
        order = torch.cat((order_q, num_q + order_k, num_q + num_k + torch.arange(num_k)))
        self.attn_norm = norm(f"{attn}_norm", block.pre_norms)
        self.qkv = weights.linear(f"{attn}.q", f"{attn}.k", f"{attn}.v", order=order)
        self.q_norm = self.k_norm = None
        if attention.qk_norm is not None:
            if not attention.qk_norm_whole:
                order_q, order_k = order_q[: attention.head_size], order_k[: attention.head_size]
            self.q_norm = NormLayer(weights, f"{attn}.q_norm", attention.qk_norm, order_q)
            self.k_norm = NormLayer(weights, f"{attn}.k_norm", attention.qk_norm, order_k)
        self.attn_out = weights.linear(f"{attn}.out")
        self.attn_post_norm = norm(f"{attn}_post_norm", block.post_norms)
        self.mlp_norm = norm(f"{mlp}_norm", block.pre_norms and not block.shared_norm)
        self.mlp = feed_forward(weights, mlp, spec.mlps[i])
        self.mlp_post_norm = norm(f"{mlp}_post_norm", block.post_norms)


class Model:
    """A decoder on a device; `max_len` fixes the frequencies of length-dependent rotary rules."""

    def __init__(self, spec: DecoderSpec, weights: Weights, max_len: int) -> None:
        self.spec = spec
        self._device = weights.device
        self._max_len = max_len
        self._tokens = weights.table("embed.tokens.weight")  # (vocab, hidden)
        self._positions = weights.table("embed.positions.weight") if spec.learned_positions else None
        self._layers = [Layer(weights, spec, i) for i in range(spec.num_layers)]
        self._final_norm = NormLayer(weights, "final_norm", spec.norm)
        self._lm_head = weights.linear("lm_head", weight="embed.tokens.weight" if spec.tied_embeddings else None)
        self._frequencies = {}
        for rotary in {r for r in spec.attention.rotary if r is not None}:
            frequencies, factor = rotary_frequencies(rotary, max_len)
            self._frequencies[rotary] = torch.from_numpy(frequencies).to(self._device), factor

    def open(self, pool: KVPool) -> None:
        """Keys and values lie there from now on."""
        self._pool = pool
        self._attention = PagedAttention(self.spec.attention, self._max_len, pool)

    def close(self) -> None:
        """Let go of the pool."""
        del self._pool, self._attention

    @torch.inference_mode()
    def forward(self, packed: Packed) -> Tensor:
        """Write K and V of the T tokens into the pool; return logits (R, vocab) float32 on the device."""
        spec, block, pool = self.spec, self.spec.block, self._pool

        # 1. What every layer of this step shares: the plans of attention, the angles, where K and V go.
        pool.clear_ahead(packed)
        slots = pool.rows_of_slots(packed.slots)
        plans = {window: self._attention.plan(packed, window) for window in set(spec.attention.windows)}
        ids, positions, rows = (
            torch.from_numpy(array).to(self._device) for array in (packed.input_ids, packed.positions, packed.rows)
        )
        angles: dict[Rotary | None, Tensor | None] = {None: None}
        for rotary, (frequencies, factor) in self._frequencies.items():
            angle = positions[:, None, None] * frequencies  # (T, 1, dim / 2) float32
            angles[rotary] = torch.complex(angle.cos() * factor, angle.sin() * factor)

        # 2. The residual stream x (T, hidden) float32, through every layer.
        x = self._tokens[ids].float()
        if spec.embedding_scale != 1:
            x *= spec.embedding_scale
        if self._positions is not None:
            x += self._positions[positions]
        for i, layer in enumerate(self._layers):
            h = x if layer.attn_norm is None else layer.attn_norm(x)
            q = self._store(i, layer, layer.qkv(h).float(), angles[layer.rotary], slots)
            if i == spec.num_layers - 1 and not len(rows):  # a chunk that nobody samples from has done its work
                return x.new_empty(0, spec.vocab_size)
            mixed = self._attention(plans[layer.window], i, q)
            if i == spec.num_layers - 1:  # nothing after the last attention mixes tokens: go on with the wanted ones
                mixed, x, h = mixed[rows], x[rows], h[rows]
            a = self._branch(layer.attn_out(mixed), layer.attn_post_norm)
            if not block.parallel:
                x = h = x + a
            if layer.mlp_norm is not None:
                h = layer.mlp_norm(x)
            f = self._branch(layer.mlp(h), layer.mlp_post_norm)
            x = x + f + a if block.parallel else x + f

        # 3. Logits (R, vocab).
        logits = self._lm_head(self._final_norm(x)).float()
        if spec.logits_scale != 1:
            logits *= spec.logits_scale
        if spec.logits_soft_cap is not None:
            logits = (logits / spec.logits_soft_cap).tanh_().mul_(spec.logits_soft_cap)
        return logits

    def _store(self, i: int, layer: Layer, qkv: Tensor, angles: Tensor | None, slots: Tensor) -> Tensor:
        """Norm and rotate q and k inside `qkv` float32, put k and v into the pool, return q (T, heads, head_size)."""
        spec = self.spec.attention
        num_q, num_kv = spec.num_heads, spec.num_kv_heads
        heads = qkv.view(len(qkv), num_q + 2 * num_kv, spec.head_size)
        q, k = heads[:, :num_q], heads[:, num_q : num_q + num_kv]
        if layer.q_norm is not None and layer.k_norm is not None:
            for part, norm in ((q, layer.q_norm), (k, layer.k_norm)):
                part.copy_(norm(part.flatten(1)).view(part.shape) if spec.qk_norm_whole else norm(part))
        if angles is not None:
            pairs = heads[:, : num_q + num_kv, : 2 * angles.shape[-1]].view(len(qkv), num_q + num_kv, -1, 2)
            torch.view_as_complex(pairs).mul_(angles)
        self._pool.write(i, slots, heads[:, num_q:])
        return q

    def _branch(self, y: Tensor, post_norm: NormLayer | None) -> Tensor:
        """What attention or feed-forward adds to the residual stream."""
        if post_norm is not None:
            y = post_norm(y.float())
        return y if self.spec.residual_scale == 1 else y * self.spec.residual_scale


def _pairs_together(num_heads: int, head_size: int, rotary: Rotary | None) -> Tensor:
    """(num_heads * head_size,) where each row of q or k goes, so that rotary pairs are neighbours in their head."""
    order = torch.arange(num_heads * head_size).view(num_heads, head_size)
    if rotary is not None:
        half = rotary.dim // 2
        order[:, : rotary.dim] = order[:, : rotary.dim].unflatten(1, (half, 2)).transpose(1, 2).flatten(1)
    return order.flatten()
