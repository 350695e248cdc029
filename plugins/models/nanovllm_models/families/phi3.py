"""Phi-3, Phi-3.5 and Phi-4 mini: Llama with fused q, k, v and fused gate, up; long contexts by LongRoPE."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec
from .shared import equal_share, gated_mlp, kv_heads, rms_norm, rotary, window

PREFIX = "model."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embed.tokens",
    "model.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "model.layers.{i}.self_attn.qkv_proj": ("layers.{i}.attn.q", "layers.{i}.attn.k", "layers.{i}.attn.v"),
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attn.out",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_up_proj": ("layers.{i}.mlp.gate", "layers.{i}.mlp.up"),
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
    size = equal_share(config, hidden, heads)
    # What LongRoPE was called in the first files.
    aliases = {"su": "longrope", "yarn": "longrope"}
    positions, max_positions = rotary(
        config, size, config.integer("max_position_embeddings", 4096), part=1.0, aliases=aliases
    )
    config.get("original_max_position_embeddings")  # stated without a scaling rule too
    config.get("auto_map")  # the code of the time before this family was in transformers; the weights are the same
    return DecoderSpec(
        architecture="phi3",
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
            qkv_bias=False,
            out_bias=False,
            rotary=(positions,) * layers,
            windows=(window(config),) * layers,
        ),
        mlps=(gated_mlp(config, config.integer("intermediate_size")),) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )
