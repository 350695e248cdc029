"""Llama 1 to 3, TinyLlama, CodeLlama: rotary positions, RMSNorm, grouped-query attention, gated silu."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec
from .shared import gated_mlp, head_size, kv_heads, rms_norm, rotary

PREFIX = "model."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embed.tokens",
    "model.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attn.out",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_proj": "layers.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj": "layers.{i}.mlp.down",
    "model.norm": "final_norm",
    "lm_head": "lm_head",
}
TRANSPOSED: frozenset[str] = frozenset()
GROUPED: frozenset[str] = frozenset()
IGNORED = r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # a buffer of old files


def spec(config: Config) -> DecoderSpec:
    hidden, layers = config.integer("hidden_size"), config.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = config.integer("num_attention_heads")
    size = head_size(config, hidden, heads)
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 2048))
    bias = config.boolean("attention_bias", False)
    mlp = gated_mlp(config, config.integer("intermediate_size"), bias=config.boolean("mlp_bias", False))
    return DecoderSpec(
        architecture="llama",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=rms_norm(config),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads),
            head_size=size,
            scale=size**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            rotary=(positions,) * layers,
            windows=(None,) * layers,
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )
