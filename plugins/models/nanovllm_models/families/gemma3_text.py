"""Gemma 3, text only: Gemma 2 with norms on the heads of q and k instead of caps, and two rotations:
one for the layers with a sliding window, one for the others.
"""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..positions import Rotary
from ..spec import Attention, Block, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, kv_heads, layer_types, rotary_section, soft_cap, window

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
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.attn_post_norm",
    "model.layers.{i}.pre_feedforward_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.gate_proj": "layers.{i}.mlp.gate",
    "model.layers.{i}.mlp.up_proj": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.down_proj": "layers.{i}.mlp.down",
    "model.layers.{i}.post_feedforward_layernorm": "layers.{i}.mlp_post_norm",
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
    full, sliding, max_positions = _rotations(config, size, config.integer("max_position_embeddings", 131_072))
    norm = Norm("rms", config.number("rms_norm_eps", 1e-6), unit_offset=True)
    bias = config.boolean("attention_bias", False)
    width = window(config, 4096)
    pattern = config.integer("sliding_window_pattern", config.integer("_sliding_window_pattern", 6))
    slides = layer_types(config, layers) or [(i + 1) % pattern != 0 for i in range(layers)]
    mlp = FeedForward(
        size=config.integer("intermediate_size"),
        activation=config.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=True,
        bias=False,
    )
    config.get("hidden_act")  # the old name, which is not read
    return DecoderSpec(
        architecture="gemma3_text",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=norm,
        block=Block(post_norms=True),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads, default=4),
            head_size=size,
            scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            rotary=tuple(sliding if s else full for s in slides),
            windows=tuple(width if s else None for s in slides),
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", True),
        embedding_scale=hidden**0.5,
        logits_soft_cap=soft_cap(config, "final_logit_softcapping"),
    )


def _rotations(config: Config, size: int, max_positions: int) -> tuple[Rotary, Rotary, int]:
    """Of the full and of the sliding layers: two sections (transformers 5), or one and a base beside it (before)."""
    nothing = Config({}, config.where)
    sections = config.section("rope_parameters") or nothing
    old = config.section("rope_scaling")  # of the full layers
    full, max_positions = rotary_section(
        old or sections.section("full_attention") or nothing,
        config,
        size,
        max_positions,
        theta=config.number("rope_theta", 1e6, low=1.001),
    )
    sliding, _ = rotary_section(
        sections.section("sliding_attention") or nothing,
        config,
        size,
        max_positions,
        theta=config.number("rope_local_base_freq", 10_000.0, low=1.001),
    )
    sections.finish()
    return full, sliding, max_positions
