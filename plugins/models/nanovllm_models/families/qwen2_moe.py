"""Qwen1.5-MoE and Qwen2-MoE: Qwen2 with routed experts beside one shared expert that has a gate of its own."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec
from .shared import experts, gated_mlp, head_size, kv_heads, layer_types, rms_norm, rotary, sparse_layers

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
    "model.layers.{i}.mlp.gate": "layers.{i}.mlp.router",
    "model.layers.{i}.mlp.experts.{e}.gate_proj": "layers.{i}.mlp.experts.{e}.gate",
    "model.layers.{i}.mlp.experts.{e}.up_proj": "layers.{i}.mlp.experts.{e}.up",
    "model.layers.{i}.mlp.experts.{e}.down_proj": "layers.{i}.mlp.experts.{e}.down",
    "model.layers.{i}.mlp.shared_expert.gate_proj": "layers.{i}.mlp.shared.gate",
    "model.layers.{i}.mlp.shared_expert.up_proj": "layers.{i}.mlp.shared.up",
    "model.layers.{i}.mlp.shared_expert.down_proj": "layers.{i}.mlp.shared.down",
    "model.layers.{i}.mlp.shared_expert_gate": "layers.{i}.mlp.shared_gate",
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
    dense = gated_mlp(config, config.integer("intermediate_size", 5632))
    mixed = experts(
        config,
        gated_mlp(config, config.integer("moe_intermediate_size", 1408)),
        num_experts=60,
        top_k=4,
        normalised=config.boolean("norm_topk_prob", False),
        shared=gated_mlp(config, config.integer("shared_expert_intermediate_size", 5632)),
    )
    mixes = sparse_layers(config, layers)
    return DecoderSpec(
        architecture="qwen2_moe",
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
            qkv_bias=config.boolean("qkv_bias", True),
            out_bias=False,
            rotary=(positions,) * layers,
            windows=_windows(config, layers),
        ),
        mlps=tuple(mixed if m else dense for m in mixes),
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )


def _windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """Only by layer_types: which layers slide without them changed from one version of transformers to another."""
    config.get("max_window_layers")
    size = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    config.get("sliding_window")  # without use_sliding_window it means nothing
    slides = layer_types(config, num_layers)
    if (slides is None and size is not None) or (slides is not None and any(slides) and size is None):
        raise config.unsupported("use_sliding_window", size is not None, "it must go with layer_types that agree")
    return tuple(size if s else None for s in slides or [False] * num_layers)
