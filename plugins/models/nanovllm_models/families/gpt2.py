"""GPT-2: learned positions, LayerNorm, fused qkv with biases, plain gelu; weights stored (in, out)."""

from __future__ import annotations

from ..config import MAX_LAYERS, Config
from ..spec import Attention, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, equal_share

PREFIX = "transformer."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "transformer.wte": "embed.tokens",
    "transformer.wpe": "embed.positions",
    "transformer.h.{i}.ln_1": "layers.{i}.attn_norm",
    "transformer.h.{i}.attn.c_attn": ("layers.{i}.attn.q", "layers.{i}.attn.k", "layers.{i}.attn.v"),
    "transformer.h.{i}.attn.c_proj": "layers.{i}.attn.out",
    "transformer.h.{i}.ln_2": "layers.{i}.mlp_norm",
    "transformer.h.{i}.mlp.c_fc": "layers.{i}.mlp.up",
    "transformer.h.{i}.mlp.c_proj": "layers.{i}.mlp.down",
    "transformer.ln_f": "final_norm",
    "lm_head": "lm_head",
}
TRANSPOSED = frozenset(
    {
        "transformer.h.{i}.attn.c_attn",
        "transformer.h.{i}.attn.c_proj",
        "transformer.h.{i}.mlp.c_fc",
        "transformer.h.{i}.mlp.c_proj",
    }
)
GROUPED: frozenset[str] = frozenset()
IGNORED = r"h\.\d+\.attn\.(masked_)?bias"  # the causal mask, saved as a buffer


def spec(config: Config) -> DecoderSpec:
    hidden, layers = config.integer("n_embd"), config.integer("n_layer", high=MAX_LAYERS)
    heads = config.integer("n_head")
    size = equal_share(config, hidden, heads)
    config.get("n_ctx")  # an old twin of n_positions
    mlp = FeedForward(
        size=config.integer("n_inner", 4 * hidden),
        activation=config.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    return DecoderSpec(
        architecture="gpt2",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=config.integer("n_positions", 1024),
        learned_positions=True,
        norm=Norm("layer", config.number("layer_norm_epsilon", 1e-5)),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=heads,
            head_size=size,
            scale=size**-0.5 if config.boolean("scale_attn_weights", True) else 1.0,
            qkv_bias=True,
            out_bias=True,
            rotary=(None,) * layers,
            windows=(None,) * layers,
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", True),
    )
