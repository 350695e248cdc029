"""StarCoder2: grouped-query attention and a sliding window, with LayerNorm, plain gelu and biases."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, equal_share, kv_heads, rotary, window

PREFIX = "model."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "model.embed_tokens": "embed.tokens",
    "model.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "model.layers.{i}.self_attn.q_proj": "layers.{i}.attn.q",
    "model.layers.{i}.self_attn.k_proj": "layers.{i}.attn.k",
    "model.layers.{i}.self_attn.v_proj": "layers.{i}.attn.v",
    "model.layers.{i}.self_attn.o_proj": "layers.{i}.attn.out",
    "model.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "model.layers.{i}.mlp.c_fc": "layers.{i}.mlp.up",
    "model.layers.{i}.mlp.c_proj": "layers.{i}.mlp.down",
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
    positions, max_positions = rotary(config, size, config.integer("max_position_embeddings", 4096))
    bias = config.boolean("use_bias", True)
    config.choice("mlp_type", {"default": "default"}, "default")
    config.choice("norm_type", {"layer_norm": "layer"}, "layer_norm")
    if not config.boolean("scale_attn_weights", True):
        raise config.unsupported("scale_attn_weights", False, "supported: true")
    for key in ("activation_function", "layer_norm_epsilon"):  # old twins of hidden_act and norm_epsilon
        config.get(key)
    for key in ("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32"):  # always in float32 here
        config.get(key)
    mlp = FeedForward(
        size=config.integer("intermediate_size"),
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=False,
        bias=bias,
    )
    return DecoderSpec(
        architecture="starcoder2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=Norm("layer", config.number("norm_epsilon", 1e-5)),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=kv_heads(config, heads, default=2),
            head_size=size,
            scale=size**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            rotary=(positions,) * layers,
            windows=(window(config),) * layers,
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", True),
    )
