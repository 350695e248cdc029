"""The decoder in JAX: computes new tokens of some sequences, and keeps their keys and values.

Knows a DecoderSpec and arrays of fixed shapes, and no engine. In the shapes, S is sequences, Q new tokens of each, C
the positions that each can see, R the tokens whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from nanovllm_models import DecoderSpec, FeedForward, Norm, Rotary, rotary_frequencies

# By the names of DecoderSpec.shapes(); in those of a layer without "layers.0." and the like.
Weights = dict[str, jax.Array]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


@partial(jax.jit, static_argnames=("spec", "rotary", "mlp", "max_len"), donate_argnames=("keys", "values"))
def layer(
    spec: DecoderSpec,
    rotary: Rotary | None,
    mlp: FeedForward,
    max_len: int,
    weights: Weights,
    keys: jax.Array,  # (slots, kv_heads, size), of this layer; and `values`
    values: jax.Array,
    x: jax.Array,  # (S, Q, hidden)
    positions: jax.Array,  # (S, Q) int32
    slots: jax.Array,  # (S, Q) int32, where K and V of each token go; one that does not exist: nowhere
    context: jax.Array,  # (S, C) int32, the slots of the positions [0, C) of each sequence
    kv_lens: jax.Array,  # (S,) int32, how many of them are valid once this step's own are written
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x after the layer; keys and values in the memory of those that were given."""
    attention, shape = spec.attention, x.shape[:2]
    column = jnp.arange(context.shape[1])
    is_seen = column <= positions[:, :, None]  # (S, Q, C): a token sees itself and what came before
    is_valid = column < kv_lens[:, None]  # (S, C)

    # 1. Queries, keys and values of the new tokens; the pool takes the last two.
    h = norm(x, weights, "attn_norm", spec.norm)
    q, k, v = (
        linear(h, weights, f"attn.{n}").reshape(*shape, -1, attention.head_size) for n in "qkv"
    )  # (S, Q, heads, size)
    if rotary is not None:
        q, k = rotate(q, positions, rotary, max_len), rotate(k, positions, rotary, max_len)
    keys, values = keys.at[slots].set(k, mode="drop"), values.at[slots].set(v, mode="drop")
    # 2. Attention over the sequence's own past. What lies behind its end is a former owner's, perhaps NaN, and
    #    0 * NaN is NaN: such values are replaced, not multiplied by a share of 0.
    k, v = keys[context], jnp.where(is_valid[:, :, None, None], values[context], 0)  # (S, C, kv_heads, size)
    q = q.reshape(*shape, attention.num_kv_heads, -1, attention.head_size)
    scores = jnp.einsum("sqhgd,schd->shgqc", q, k) * attention.scale
    shares = jax.nn.softmax(scores, where=is_seen[:, None, None])
    x += linear(jnp.einsum("shgqc,schd->sqhgd", shares, v).reshape(*shape, -1), weights, "attn.out")
    # 3. Feed-forward.
    h = norm(x, weights, "mlp_norm", spec.norm)
    inner, activation = linear(h, weights, "mlp.up"), ACTIVATIONS[mlp.activation]
    inner = activation(linear(h, weights, "mlp.gate")) * inner if mlp.gated else activation(inner)
    return x + linear(inner, weights, "mlp.down"), keys, values


@partial(jax.jit, static_argnames="spec")
def embed(spec: DecoderSpec, weights: Weights, ids: jax.Array, positions: jax.Array) -> jax.Array:
    """(S, Q) tokens -> (S, Q, hidden)."""
    x = weights["embed.tokens.weight"][ids]
    return x + weights["embed.positions.weight"][positions] if spec.learned_positions else x


@partial(jax.jit, static_argnames="spec")
def logits(spec: DecoderSpec, weights: Weights, x: jax.Array, rows: jax.Array) -> jax.Array:
    """x (S, Q, hidden) and the wanted ones of its S * Q tokens -> (R, vocab)."""
    x = norm(x.reshape(-1, spec.hidden_size)[rows], weights, "final_norm", spec.norm)
    return linear(x, weights, "embed.tokens" if spec.tied_embeddings else "lm_head")


def linear(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def norm(x: jax.Array, weights: Weights, name: str, rule: Norm) -> jax.Array:
    """(..., n) -> (..., n), over the last axis."""
    if rule.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + rule.eps)
    x = x * (weights[f"{name}.weight"] + (1 if rule.unit_offset else 0))
    return x + weights[f"{name}.bias"] if rule.kind == "layer" else x


def rotate(x: jax.Array, positions: jax.Array, rotary: Rotary, max_len: int) -> jax.Array:
    """Turn the pairs (j, j + dim / 2) of every head of x (S, Q, heads, size) by the token's position."""
    frequencies, factor = rotary_frequencies(rotary, max_len)
    angles = positions[:, :, None, None] * frequencies  # (S, Q, 1, dim / 2)
    cos, sin = jnp.cos(angles) * factor, jnp.sin(angles) * factor
    a, b, rest = jnp.split(x, [rotary.dim // 2, rotary.dim], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
