"""`ExportedDecoder`: a DecoderSpec as one torch module of plain operators, for torch.export and TorchScript to record.

    forward(input_ids, attention_mask, position_ids, *past) -> (logits, *present)

B sequences of S new tokens, each after a past of P columns; `past` and `present` hold key and value of every layer
in turn. What a column holds is said by `attention_mask` alone: 0 hides it, and the ones of a row count its positions
from 0, so that a shorter sequence may be padded on the left, on the right or between its past and its new tokens.

It is the computation of `model.py` without what cannot be recorded: oneDNN's packed weights, paged attention, and
experts that only compute the tokens which chose them. Here every expert computes every token and the shares of
those not chosen are 0. Knows no file and no engine.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanovllm_models import Attention, DecoderSpec, Experts, FeedForward, Norm, Rotary, alibi_bias, rotary_frequencies

from .modules import ACTIVATIONS
from .weights import Weights


class ExportedDecoder(nn.Module):
    def __init__(self, spec: DecoderSpec, weights: Weights, max_len: int) -> None:
        """Of a spec that `Model` takes: it refuses what is not implemented."""
        super().__init__()
        self.spec = spec
        self.tokens = _held(weights.table("embed.tokens.weight"))  # (vocab, hidden)
        self.positions = _held(weights.table("embed.positions.weight")) if spec.learned_positions else None
        self.layers = nn.ModuleList(Layer(spec, weights, i) for i in range(spec.num_layers))
        self.final_norm = NormModule(weights, "final_norm", spec.norm)
        self.lm_head = Product(weights, "lm_head", weight=self.tokens if spec.tied_embeddings else None)
        rotaries = list(dict.fromkeys(rotary for rotary in spec.attention.rotary if rotary is not None))
        self.rotations = nn.ModuleList(Rotation(rotary, max_len) for rotary in rotaries)
        self._rotation_of = [None if r is None else rotaries.index(r) for r in spec.attention.rotary]
        alibi = spec.attention.alibi
        bias = None if alibi is None else torch.from_numpy(alibi_bias(alibi, max_len))
        self.register_buffer("alibi", bias)  # (heads, max_len)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """input_ids, position_ids (B, S), attention_mask (B, P + S), all int64; each of past (B, kv_heads, P, size).

        -> logits (B, S, vocab) float32, and of each of past its continuation (B, kv_heads, P + S, size).
        """
        spec, block = self.spec, self.spec.block

        # 1. What every layer shares: who sees whom, the biases, the angles.
        columns = (attention_mask.cumsum(1) - 1).clamp_min(0)  # (B, P + S) the position that a column holds
        order = torch.arange(attention_mask.shape[1], device=input_ids.device)
        own = past[0].shape[2] + torch.arange(input_ids.shape[1], device=input_ids.device)  # (S,) columns
        seen = (order <= own[:, None]) & (attention_mask != 0)[:, None]  # (B, S, P + S)
        distance = position_ids[:, :, None] - columns[:, None]
        masks = {w: seen if w is None else seen & (distance < w) for w in dict.fromkeys(spec.attention.windows)}
        bias = (
            None if self.alibi is None else self.alibi[:, columns].transpose(0, 1)[:, :, None]
        )  # (B, heads, 1, P + S)
        angles = [rotation(position_ids) for rotation in self.rotations]

        # 2. The residual stream x (B, S, hidden) float32, through every layer.
        x = F.embedding(input_ids, self.tokens).float()
        if spec.embedding_scale != 1:
            x = x * spec.embedding_scale
        if self.positions is not None:
            x = x + F.embedding(position_ids, self.positions)
        present = []
        for i, layer in enumerate(self.layers):
            rotation = self._rotation_of[i]
            h = x if layer.attn_norm is None else layer.attn_norm(x)
            a, k, v = layer.attention(
                h,
                None if rotation is None else angles[rotation],
                masks[spec.attention.windows[i]],
                bias,
                past[2 * i],
                past[2 * i + 1],
            )
            present += [k, v]
            a = self._branch(a, layer.attn_post_norm)
            if not block.parallel:
                x = h = x + a
            if layer.mlp_norm is not None:
                h = layer.mlp_norm(x)
            f = self._branch(layer.mlp(h), layer.mlp_post_norm)
            x = x + f + a if block.parallel else x + f

        # 3. Logits.
        logits = self.lm_head(self.final_norm(x)).float()
        if spec.logits_scale != 1:
            logits = logits * spec.logits_scale
        if spec.logits_soft_cap is not None:
            logits = (logits / spec.logits_soft_cap).tanh() * spec.logits_soft_cap
        return (logits, *present)

    def _branch(self, y: Tensor, post_norm: NormModule | None) -> Tensor:
        """What attention or feed-forward adds to the residual stream."""
        y = y.float()
        if post_norm is not None:
            y = post_norm(y)
        return y if self.spec.residual_scale == 1 else y * self.spec.residual_scale


class Layer(nn.Module):
    """A norm that the spec does not have is None."""

    def __init__(self, spec: DecoderSpec, weights: Weights, i: int) -> None:
        super().__init__()
        attn, mlp, block = f"layers.{i}.attn", f"layers.{i}.mlp", spec.block

        def norm(name: str, exists: bool) -> NormModule | None:
            return NormModule(weights, name, spec.norm) if exists else None

        self.attn_norm = norm(f"{attn}_norm", block.pre_norms)
        self.attention = AttentionModule(spec.attention, weights, attn)
        self.attn_post_norm = norm(f"{attn}_post_norm", block.post_norms)
        self.mlp_norm = norm(f"{mlp}_norm", block.pre_norms and not block.shared_norm)
        mlp_spec = spec.mlps[i]
        self.mlp: nn.Module = (
            Dense(weights, mlp, mlp_spec) if isinstance(mlp_spec, FeedForward) else Mixture(weights, mlp, mlp_spec)
        )
        self.mlp_post_norm = norm(f"{mlp}_post_norm", block.post_norms)


class AttentionModule(nn.Module):
    def __init__(self, spec: Attention, weights: Weights, name: str) -> None:
        super().__init__()
        self.spec = spec
        self.q, self.k, self.v, self.out = (Product(weights, f"{name}.{part}") for part in ("q", "k", "v", "out"))
        self.q_norm = self.k_norm = None
        if spec.qk_norm is not None:
            self.q_norm = NormModule(weights, f"{name}.q_norm", spec.qk_norm)
            self.k_norm = NormModule(weights, f"{name}.k_norm", spec.qk_norm)

    def forward(
        self,
        h: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        seen: Tensor,
        bias: Tensor | None,
        past_k: Tensor,
        past_v: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h (B, S, hidden), seen (B, S, P + S) -> what is added (B, S, hidden), and k and v with the past in front."""
        spec = self.spec
        q = self._heads(self.q(h).float(), self.q_norm, angles, spec.num_heads)
        k = self._heads(self.k(h).float(), self.k_norm, angles, spec.num_kv_heads)
        v = self._heads(self.v(h), None, None, spec.num_kv_heads)
        k, v = torch.cat((past_k, k.to(past_k.dtype)), 2), torch.cat((past_v, v.to(past_v.dtype)), 2)

        # Query heads that share a kv head are rows of one operand. `bmm`, `clone` and `view`, because `@`, `contiguous`
        # and `reshape` ask whether a size is 1 when they are recorded, and the program then insists on the answer.
        (batch, heads, new_tokens, size), columns = q.shape, k.shape[2]
        rows = (
            q.to(k.dtype).clone(memory_format=torch.contiguous_format).view(batch * spec.num_kv_heads, -1, size)
        )  # (.., group * S, size)
        keys, values = (x.view(batch * spec.num_kv_heads, columns, size) for x in (k, v))
        scores = torch.bmm(rows, keys.transpose(1, 2)).float().view(batch, heads, new_tokens, columns) * spec.scale
        if bias is not None:
            scores = scores + bias * spec.scale
        if spec.soft_cap is not None:
            scores = (scores / spec.soft_cap).tanh() * spec.soft_cap
        # Not -inf: the row of a column that is padding sees nothing, and its K and V must stay numbers.
        scores = scores.masked_fill(~seen[:, None], torch.finfo(torch.float32).min)
        shares = scores.softmax(-1).to(v.dtype).view(batch * spec.num_kv_heads, -1, columns)
        mixed = torch.bmm(shares, values).view(batch, heads, new_tokens, size).transpose(1, 2)
        mixed = mixed.clone(memory_format=torch.contiguous_format).view(batch, new_tokens, heads * size)
        return self.out(mixed), k, v

    def _heads(
        self, x: Tensor, norm: NormModule | None, angles: tuple[Tensor, Tensor] | None, num_heads: int
    ) -> Tensor:
        """(B, S, num_heads * size) -> (B, num_heads, S, size), normed and rotated."""
        if norm is not None and self.spec.qk_norm_whole:
            x = norm(x)
        x = x.unflatten(-1, (num_heads, self.spec.head_size))
        if norm is not None and not self.spec.qk_norm_whole:
            x = norm(x)
        x = x.transpose(1, 2)
        if angles is None:
            return x
        cos, sin = angles
        half = cos.shape[-1]
        left, right, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat((left * cos - right * sin, right * cos + left * sin, rest), -1)


class Rotation(nn.Module):
    def __init__(self, rotary: Rotary, max_len: int) -> None:
        super().__init__()
        frequencies, self.factor = rotary_frequencies(rotary, max_len)
        self.register_buffer("frequencies", torch.from_numpy(frequencies))  # (dim / 2,)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) -> cos and sin (B, 1, S, dim / 2) float32."""
        angle = position_ids[:, None, :, None] * self.frequencies
        return angle.cos() * self.factor, angle.sin() * self.factor


class NormModule(nn.Module):
    """Over the last axis of a float32 x."""

    def __init__(self, weights: Weights, name: str, norm: Norm) -> None:
        super().__init__()
        self.kind, self.eps = norm.kind, norm.eps
        weight = weights.vector(f"{name}.weight")
        self.weight = _held(weight + 1 if norm.unit_offset else weight)
        self.bias = _held(weights.vector(f"{name}.bias")) if norm.kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            # Not `F.rms_norm`, which asks for strides, and so for sizes, when it is recorded.
            return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Product(nn.Module):
    """With one matrix of weights, in their type."""

    def __init__(self, weights: Weights, name: str, weight: nn.Parameter | None = None) -> None:
        """`weight`: another module's, which this one shares."""
        super().__init__()
        self.weight = _held(weights.table(f"{name}.weight")) if weight is None else weight
        has_bias = f"{name}.bias" in weights.files
        self.bias = _held(weights.vector(f"{name}.bias").to(weights.dtype)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class Dense(nn.Module):
    """One feed-forward."""

    def __init__(self, weights: Weights, name: str, spec: FeedForward) -> None:
        super().__init__()
        self.activate = ACTIVATIONS[spec.activation]
        self.gate = Product(weights, f"{name}.gate") if spec.gated else None
        self.up, self.down = Product(weights, f"{name}.up"), Product(weights, f"{name}.down")

    def forward(self, h: Tensor) -> Tensor:
        inner = self.up(h)
        return self.down(self.activate(inner) if self.gate is None else self.activate(self.gate(h)) * inner)


class Mixture(nn.Module):
    """Every expert computes every token."""

    def __init__(self, weights: Weights, name: str, spec: Experts) -> None:
        super().__init__()
        self.spec = spec
        self.router = _held(weights.table(f"{name}.router.weight", torch.float32))
        self.experts = nn.ModuleList(
            Dense(weights, f"{name}.experts.{e}", spec.expert) for e in range(spec.num_experts)
        )
        self.shared = None
        if spec.shared is not None:
            self.shared = Dense(weights, f"{name}.shared", spec.shared)
            self.shared_gate = _held(weights.table(f"{name}.shared_gate.weight", torch.float32))

    def forward(self, h: Tensor) -> Tensor:
        spec = self.spec
        # Best first, and of equals the lowest index.
        shares, chosen = F.linear(h, self.router).softmax(-1).sort(dim=-1, descending=True, stable=True)
        shares, chosen = shares[..., : spec.top_k], chosen[..., : spec.top_k]
        if spec.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        of_expert = h.new_zeros((*h.shape[:2], spec.num_experts)).scatter(-1, chosen, shares)
        out = torch.zeros_like(h)
        for e, expert in enumerate(self.experts):
            out = out + expert(h).float() * of_expert[..., e : e + 1]
        if self.shared is not None:
            out = out + self.shared(h).float() * F.linear(h, self.shared_gate).sigmoid()
        return out


def _held(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
