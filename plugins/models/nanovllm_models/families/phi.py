"""Phi-1 to 2: a parallel block on one LayerNorm, a part of each head rotated, biases everywhere."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, Block, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, equal_share, kv_heads, rotary

PREFIX = "model."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embed.tokens",
    "model.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
    "model.layers.{i}.self_attn.q_layernorm": "layers.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_layernorm": "layers.{i}.attn.k_norm",
    "model.layers.{i}.self_attn.dense": "layers.{i}.attn.out",
    "model.layers.{i}.mlp.fc1": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.fc2": "layers.{i}.mlp.down",
    "model.final_layernorm": "final_norm",
    "lm_head": "lm_head",
}
TRANSPOSED: frozenset[str] = frozenset()
GROUPED: frozenset[str] = frozenset()
IGNORED = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # a buffer of old files


def spec(config: Config) -> DecoderSpec:
    hidden, layers = config.integer("hidden_size"), config.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = config.integer("num_attention_heads")
    size = equal_share(config, hidden, heads)
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 2048), part=0.5)
    norm = Norm("layer", config.number("layer_norm_eps", 1e-5))
    mlp = FeedForward(
        size=config.integer("intermediate_size"),
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    return DecoderSpec(
        architecture="phi",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=norm,
        block=Block(parallel=True, shared_norm=True),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads),
            head_size=size,
            scale=size**-0.5,
            qkv_bias=True,
            out_bias=True,
            qk_norm=norm if config.boolean("qk_layernorm", False) else None,
            rotary=(positions,) * layers,
            windows=(None,) * layers,
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", False),
        lm_head_bias=True,
    )
