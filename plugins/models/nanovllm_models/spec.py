"""What a decoder IS, as frozen data: the contract that every runtime reads.

The NumPy runner interprets a `DecoderSpec`, a graph emitter or a module builder translates it. The
forward pass that it stands for, for token ids at positions p (all `@` in the sense of x @ W.T):

    x = embed.tokens[ids] (+ embed.positions[p])
    for each layer:
        h = attn_norm(x);  q, k, v = attn.{q,k,v}(h);  q, k = q_norm(q), k_norm(k), then rotated by p
        x = x + attn.out(softmax(scale * q k^T, causal and inside the layer's window) v)
        h = mlp_norm(x);   x = x + mlp.down(act(mlp.gate(h)) * mlp.up(h))      or down(act(up(h)))
    logits = lm_head(final_norm(x))                        lm_head is embed.tokens when tied

`DecoderSpec.shapes()` lists every weight under its canonical name. Canonical orientation: a linear
weight is (out, in), an embedding (num, hidden); heads lie one after another in the rows of q, k
and v, and rotary pairs are (j, j + dim/2) inside a head ("rotate half").

This file knows no file format, no config key and no runtime. A field exists only if a family sets
it and the NumPy runner computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")  # gelu is the exact one, by erf
NORMS = ("layer", "rms")  # layer: mean removed, weight and bias; rms: weight only


@dataclass(frozen=True, slots=True)
class Linear:
    """Every frequency divided by `factor` (kaiokendev)."""

    factor: float


@dataclass(frozen=True, slots=True)
class DynamicNTK:
    """The base grows with the length, from `original_len` on (arXiv:2306.15595 and bloc97's NTK)."""

    factor: float
    original_len: int  # positions the model was trained on


@dataclass(frozen=True, slots=True)
class Yarn:
    """High frequencies kept, low ones divided by `factor`, a ramp between (arXiv:2309.00071)."""

    factor: float
    original_len: int
    beta_fast: float  # rotations over original_len above which a frequency is kept
    beta_slow: float  # rotations below which it is divided
    truncate: bool  # round the ramp's ends to whole dimensions
    attention_factor: float  # multiplies cos and sin


@dataclass(frozen=True, slots=True)
class LongRope:
    """One divisor per frequency, from one of two lists (arXiv:2402.13753)."""

    short_factors: tuple[float, ...]  # (dim / 2,) for lengths up to original_len
    long_factors: tuple[float, ...]  # (dim / 2,) beyond
    original_len: int
    attention_factor: float  # multiplies cos and sin


@dataclass(frozen=True, slots=True)
class Llama3:
    """Wavelengths above original_len / low_freq_factor divided by `factor`, a ramp below (Llama 3.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int


Scaling = Linear | DynamicNTK | Yarn | LongRope | Llama3


@dataclass(frozen=True, slots=True)
class Learned:
    """A table of `max_positions` rows, added to the token embedding."""


@dataclass(frozen=True, slots=True)
class Rotary:
    """The first `dim` numbers of every q and k head are rotated by the position."""

    dim: int  # even, <= head_size
    theta: float  # base wavelength
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    kind: str  # one of NORMS
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    num_heads: int
    num_kv_heads: int  # divides num_heads; query heads [i*g, (i+1)*g) share kv head i
    head_size: int
    scale: float  # multiplies q k^T
    qkv_bias: bool
    out_bias: bool
    qk_norm: Norm | None  # over each head of q and k, before the rotation
    windows: tuple[int | None, ...]  # (num_layers,) position p sees (p - window, p]; None = all of [0, p]


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    size: int  # inner width
    activation: str  # one of ACTIVATIONS
    gated: bool  # down(act(gate(h)) * up(h)) instead of down(act(up(h)))
    bias: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    architecture: str  # model_type of config.json
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    positions: Learned | Rotary
    norm: Norm
    attention: Attention
    mlp: FeedForward
    tied_embeddings: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of every weight, in the order of the forward pass."""
        shapes: dict[str, tuple[int, ...]] = {}
        hidden, head = self.hidden_size, self.attention.head_size

        def linear(name: str, out: int, into: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (out, into)
            if bias:
                shapes[f"{name}.bias"] = (out,)

        def norm(name: str, norm: Norm, size: int) -> None:
            shapes[f"{name}.weight"] = (size,)
            if norm.kind == "layer":
                shapes[f"{name}.bias"] = (size,)

        shapes["embed.tokens.weight"] = (self.vocab_size, hidden)
        if isinstance(self.positions, Learned):
            shapes["embed.positions.weight"] = (self.max_positions, hidden)
        for i in range(self.num_layers):
            attn, mlp = f"layers.{i}.attn", f"layers.{i}.mlp"
            norm(f"{attn}_norm", self.norm, hidden)
            linear(f"{attn}.q", self.attention.num_heads * head, hidden, self.attention.qkv_bias)
            linear(f"{attn}.k", self.attention.num_kv_heads * head, hidden, self.attention.qkv_bias)
            linear(f"{attn}.v", self.attention.num_kv_heads * head, hidden, self.attention.qkv_bias)
            if self.attention.qk_norm is not None:
                norm(f"{attn}.q_norm", self.attention.qk_norm, head)
                norm(f"{attn}.k_norm", self.attention.qk_norm, head)
            linear(f"{attn}.out", hidden, self.attention.num_heads * head, self.attention.out_bias)
            norm(f"{mlp}_norm", self.norm, hidden)
            if self.mlp.gated:
                linear(f"{mlp}.gate", self.mlp.size, hidden, self.mlp.bias)
            linear(f"{mlp}.up", self.mlp.size, hidden, self.mlp.bias)
            linear(f"{mlp}.down", hidden, self.mlp.size, self.mlp.bias)
        norm("final_norm", self.norm, hidden)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def num_parameters(self) -> int:
        """By formula: the sizes of `shapes()`, a tied embedding counted once."""
        return sum(prod(shape) for shape in self.shapes().values())
