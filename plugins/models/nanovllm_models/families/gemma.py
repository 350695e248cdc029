"""Gemma 1: scaled embeddings, RMSNorm that multiplies by 1 + weight, wide heads, gated gelu."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, kv_heads, rotary

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
    size = config.integer("head_dim", 256)
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 8192))
    bias = config.boolean("attention_bias", False)
    key = "hidden_act" if config.get("hidden_activation") is None else "hidden_activation"
    config.get("hidden_act")  # the old name
    activations = ACTIVATIONS | {"gelu": "gelu_tanh"}  # what the first files meant by "gelu"
    mlp = FeedForward(
        size=config.integer("intermediate_size"),
        activation=config.choice(key, activations, "gelu_pytorch_tanh"),
        gated=True,
        bias=False,
    )
    return DecoderSpec(
        architecture="gemma",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=Norm("rms", config.number("rms_norm_eps", 1e-6), unit_offset=True),
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
        tied_embeddings=config.boolean("tie_word_embeddings", True),
        embedding_scale=hidden**0.5,
    )
