"""What a decoder IS, as frozen data: the contract that every runtime reads.

This file knows no file format, no config key and no runtime. A field exists only if a family sets
it and the NumPy runner computes it; a default is the plain case that most families have.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from .positions import Alibi, Rotary

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
NORMS = ("layer", "rms")


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation over the last axis."""

    kind: str  # layer: mean removed, weight and bias; rms: weight only
    eps: float
    unit_offset: bool = False  # multiplies by 1 + weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """How every layer attends; what differs from layer to layer has an entry for each."""

    num_heads: int
    num_kv_heads: int  # divides num_heads; query heads `[i*g, (i+1)*g)` share kv head i
    head_size: int
    scale: float  # multiplies q k^T
    qkv_bias: bool
    out_bias: bool
    qk_norm: Norm | None = None  # over each head of q and k, before the rotation
    qk_norm_whole: bool = False  # ... over the whole of q and the whole of k instead
    rotary: tuple[Rotary | None, ...]  # (num_layers,) None = not rotated
    alibi: Alibi | None = None
    soft_cap: float | None = None
    windows: tuple[int | None, ...]  # (num_layers,) position p sees (p - window, p]; None = all of [0, p]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """One feed-forward of a layer."""

    size: int  # inner width
    activation: str  # gelu (the exact one, by erf), gelu_tanh, relu or silu
    gated: bool  # down(act(gate(h)) * up(h)) instead of down(act(up(h)))
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Many feed-forwards, of which a router picks a few for every token."""

    num_experts: int
    top_k: int  # experts per token, <= num_experts
    normalised: bool  # the chosen experts' probabilities are scaled to sum to 1
    expert: FeedForward  # each of them
    shared: FeedForward | None = None  # one more that every token passes, times a gate of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """How attention and feed-forward of a layer are joined to the residual stream."""

    parallel: bool = False  # both read the layer's input, instead of one after the other
    shared_norm: bool = False  # parallel only: the feed-forward reads attn_norm(x) too, mlp_norm is absent
    pre_norms: bool = True  # attn_norm and mlp_norm, on what goes in
    post_norms: bool = False  # attn_post_norm and mlp_post_norm, on what comes out


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """What a decoder is. The NumPy runner interprets it, a graph emitter or a module builder translates it.

    The forward pass that it stands for, for token ids at positions p (all modules in the sense of x @ W.T + b):

        x = embed.tokens[ids] * embedding_scale (+ embed.positions[p])
        for each layer i:
            h = attn_norm(x)                                            if block.pre_norms, else x
            a = residual_scale * attn_post_norm(attention(h))           attn_post_norm if block.post_norms
            if block.parallel:
                f = residual_scale * mlp_post_norm(mlp(mlp_norm(x)))    mlp(h) if block.shared_norm
                x = x + a + f
            else:
                x = x + a
                x = x + residual_scale * mlp_post_norm(mlp(mlp_norm(x)))    norms as above
        logits = lm_head(final_norm(x)) * logits_scale                  lm_head is embed.tokens when tied
        logits = cap(logits, logits_soft_cap)

        attention(h):
            q, k, v = attn.q(h), attn.k(h), attn.v(h)
            q, k = q_norm(q), k_norm(k), then rotated by p              where qk_norm and rotary[i] say so
            scores = cap(scale * (q k^T + alibi), soft_cap)             alibi: a bias of every key position
            attn.out(softmax(scores, causal and inside windows[i]) v)

        mlp(h), mlps[i] a FeedForward:   down(act(gate(h)) * up(h))     or down(act(up(h)))
        mlp(h), mlps[i] an Experts:
            p = softmax(router(h)); the top_k experts e of p            equal ones: the lowest index first
            sum over e of p[e] * experts.e(h)                           p[e] / sum of them if normalised
            + shared(h) * sigmoid(shared_gate(h))                       where there is a shared expert

        cap(x, c) = c * tanh(x / c), or x without c

    `shapes()` lists every weight under its canonical name. Canonical orientation: a linear
    weight is (out, in), an embedding (num, hidden); heads lie one after another in the rows of q, k
    and v, and rotary pairs are (j, j + dim/2) inside a head ("rotate half").
    """

    architecture: str  # model_type of config.json
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    learned_positions: bool = False  # a table of `max_positions` rows, added to the token embedding
    norm: Norm
    block: Block = Block()
    attention: Attention
    mlps: tuple[FeedForward | Experts, ...]  # (num_layers,)
    tied_embeddings: bool
    lm_head_bias: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every weight, in the order of the forward pass."""
        shapes: dict[str, tuple[int, ...]] = {}
        hidden, attention, block = self.hidden_size, self.attention, self.block
        q_size, kv_size = (n * attention.head_size for n in (attention.num_heads, attention.num_kv_heads))

        def linear(name: str, out: int, into: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def norm(name: str, norm: Norm, size: int) -> None:
            shapes[f"{name}.weight"] = (size,)
            if norm.kind == "layer":
                shapes[f"{name}.bias"] = (size,)

        def feed_forward(name: str, mlp: FeedForward) -> None:
            if mlp.gated:
                linear(f"{name}.gate", mlp.size, hidden, mlp.bias)
            linear(f"{name}.up", mlp.size, hidden, mlp.bias)
            linear(f"{name}.down", hidden, mlp.size, mlp.bias)

        shapes["embed.tokens.weight"] = (self.vocab_size, hidden)
        if self.learned_positions:
            shapes["embed.positions.weight"] = (self.max_positions, hidden)
        for i, mlp_spec in enumerate(self.mlps):
            attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
            if block.pre_norms:
                norm(f"{attn}_norm", self.norm, hidden)
            linear(f"{attn}.q", q_size, hidden, attention.qkv_bias)
            linear(f"{attn}.k", kv_size, hidden, attention.qkv_bias)
            linear(f"{attn}.v", kv_size, hidden, attention.qkv_bias)
            if attention.qk_norm is not None:
                whole, head = attention.qk_norm_whole, attention.head_size
                norm(f"{attn}.q_norm", attention.qk_norm, q_size if whole else head)
                norm(f"{attn}.k_norm", attention.qk_norm, kv_size if whole else head)
            linear(f"{attn}.out", hidden, q_size, attention.out_bias)
            if block.post_norms:
                norm(f"{attn}_post_norm", self.norm, hidden)
            if block.pre_norms and not block.shared_norm:
                norm(f"{mlp}_norm", self.norm, hidden)
            if isinstance(mlp_spec, FeedForward):
                feed_forward(mlp, mlp_spec)
            else:
                linear(f"{mlp}.router", mlp_spec.num_experts, hidden, False)
                for e in range(mlp_spec.num_experts):
                    feed_forward(f"{mlp}.experts.{e}", mlp_spec.expert)
                if mlp_spec.shared is not None:
                    feed_forward(f"{mlp}.shared", mlp_spec.shared)
                    linear(f"{mlp}.shared_gate", 1, hidden, False)
            if block.post_norms:
                norm(f"{mlp}_post_norm", self.norm, hidden)
        norm("final_norm", self.norm, hidden)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        if self.lm_head_bias:
            shapes["lm_head.bias"] = (self.vocab_size,)
        return shapes

    @property
    def num_parameters(self) -> int:
        """By formula: the sizes of `shapes()`, a tied embedding counted once."""
        return sum(prod(shape) for shape in self.shapes().values())

    @property
    def kv_size(self) -> int:
        """Numbers of K and V of one token, in all layers."""
        return 2 * self.num_layers * self.attention.num_kv_heads * self.attention.head_size
