"""SmolLM3: Llama in which every fourth layer is not rotated (NoPE)."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec
from .shared import gated_mlp, head_size, kv_heads, layer_types, rms_norm, rotary, window

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
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 32_768), theta=2e6)
    rotates = _rotates(config, layers)
    mlp = gated_mlp(config, config.integer("intermediate_size"), bias=config.boolean("mlp_bias", False))
    bias = config.boolean("attention_bias", False)
    width = window(config) if config.boolean("use_sliding_window", False) else None
    config.get("sliding_window")  # without use_sliding_window it means nothing
    config.get("max_window_layers")  # of Qwen2: not read here
    slides = layer_types(config, layers) or [width is not None and not r for r in rotates]
    if width is None and any(slides):
        raise config.unsupported(
            "layer_types", config.get("layer_types"), "sliding_attention needs use_sliding_window: true"
        )
    return DecoderSpec(
        architecture="smollm3",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=rms_norm(config),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads, default=4),
            head_size=size,
            scale=size**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            rotary=tuple(positions if r else None for r in rotates),
            windows=tuple(width if s else None for s in slides),
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", True),
    )


def _rotates(config: Config, num_layers: int) -> list[bool]:
    """Per layer, from `no_rope_layers` (1 = rotated, in spite of its name) or the interval between the zeros."""
    interval = config.integer("no_rope_layer_interval", 4)
    flags = config.get("no_rope_layers")
    if flags is None:
        return [(i + 1) % interval != 0 for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) != num_layers or any(f not in (0, 1) for f in flags):
        raise config.contradiction(f"no_rope_layers is {flags!r:.60}; it must be {num_layers} times 0 or 1")
    return [bool(f) for f in flags]
