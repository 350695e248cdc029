"""OLMo 2: Llama with the norms behind attention and feed-forward, and norms over the whole of q and k."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, Block, DecoderSpec, Norm
from .shared import gated_mlp, head_size, kv_heads, rotary

PREFIX = "model."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embed.tokens",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
    "model.layers.{i}.self_attn.q_norm": "layers.{i}.attn.q_norm",
    "model.layers.{i}.self_attn.k_norm": "layers.{i}.attn.k_norm",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attn.out",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.attn_post_norm",
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
    size = head_size(config, hidden, heads)
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 2048))
    norm, bias = Norm("rms", config.number("rms_norm_eps", 1e-5)), config.boolean("attention_bias", False)
    return DecoderSpec(
        architecture="olmo2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=norm,
        block=Block(pre_norms=False, post_norms=True),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads),
            head_size=size,
            scale=size**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            qk_norm=norm,
            qk_norm_whole=True,
            rotary=(positions,) * layers,
            windows=(None,) * layers,
        ),
        mlps=(gated_mlp(config, config.integer("intermediate_size")),) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", False),
    )
