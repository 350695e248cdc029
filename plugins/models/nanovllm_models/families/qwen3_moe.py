"""Qwen3 MoE: Qwen3 with routed experts in some or all layers."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec
from .shared import experts, gated_mlp, head_size, kv_heads, rms_norm, rotary, sparse_layers

PREFIX = "model."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embed.tokens",
    "model.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
    "model.layers.{i}.self_attn.q_norm": "layers.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "layers.{i}.attn.k_norm",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attn.out",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_proj": "layers.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj": "layers.{i}.mlp.down",
    "model.layers.{i}.mlp.gate": "layers.{i}.mlp.router",
    "model.layers.{i}.mlp.experts.{e}.gate_proj": "layers.{i}.mlp.experts.{e}.gate",
    "model.layers.{i}.mlp.experts.{e}.up_proj": "layers.{i}.mlp.experts.{e}.up",
    "model.layers.{i}.mlp.experts.{e}.down_proj": "layers.{i}.mlp.experts.{e}.down",
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
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 32_768))
    norm, bias = rms_norm(config), config.boolean("attention_bias", False)
    window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    config.get("sliding_window")  # without use_sliding_window it means nothing
    config.get("max_window_layers")  # of Qwen3: here all layers have the window
    dense = gated_mlp(config, config.integer("intermediate_size", 6144))
    mixed = experts(
        config,
        gated_mlp(config, config.integer("moe_intermediate_size", 768)),
        num_experts=128,
        top_k=8,
        normalised=config.boolean("norm_topk_prob", False),
    )
    mixes = sparse_layers(config, layers)
    return DecoderSpec(
        architecture="qwen3_moe",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=norm,
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads, default=4),
            head_size=size,
            scale=size**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            rotary=(positions,) * layers,
            windows=(window,) * layers,
        ),
        mlps=tuple(mixed if m else dense for m in mixes),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )
