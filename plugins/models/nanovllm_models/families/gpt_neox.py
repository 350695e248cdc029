"""GPT-NeoX and Pythia: a parallel block, a quarter of each head rotated, q, k and v of a head stored together."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, Block, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, equal_share, rotary

PREFIX = "gpt_neox."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "gpt_neox.embed_in": "embed.tokens",
    "gpt_neox.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "gpt_neox.layers.{i}.attention.query_key_value": ("layers.{i}.attn.q", "layers.{i}.attn.k", "layers.{i}.attn.v"),
    "gpt_neox.layers.{i}.attention.dense": "layers.{i}.attn.out",
    "gpt_neox.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
    "gpt_neox.final_layer_norm": "final_norm",
    "embed_out": "lm_head",
}
TRANSPOSED: frozenset[str] = frozenset()
GROUPED = frozenset({"gpt_neox.layers.{i}.attention.query_key_value"})
IGNORED = r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"  # buffers of old files


def spec(config: Config) -> DecoderSpec:
    hidden, layers = config.integer("hidden_size"), config.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = config.integer("num_attention_heads")
    size = equal_share(config, hidden, heads)
    positions, max_positions = rotary(
        config,
        size,
        config.integer("max_position_embeddings", 2048),
        part=0.25,
        theta_key="rotary_emb_base",
        part_key="rotary_pct",
    )
    bias = config.boolean("attention_bias", True)
    mlp = FeedForward(
        size=config.integer("intermediate_size"),
        activation=config.choice("hidden_act", ACTIVATIONS, "gelu"),
        gated=False,
        bias=True,
    )
    return DecoderSpec(
        architecture="gpt_neox",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=Norm("layer", config.number("layer_norm_eps", 1e-5)),
        block=Block(parallel=config.boolean("use_parallel_residual", True)),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=heads,
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
