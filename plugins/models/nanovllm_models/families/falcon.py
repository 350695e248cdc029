"""Falcon in its three shapes: 7B (one kv head, one norm for both halves of a parallel block), 40B and 180B (grouped
heads, a norm for each half), and the older RW 1B (ALiBi, one half after the other, biases)."""

from __future__ import annotations

from ..alibi import alibi_slopes
from ..config import MAX_LAYERS, Config
from ..positions import Alibi
from ..spec import Attention, Block, DecoderSpec, FeedForward, Norm
from .shared import ACTIVATIONS, equal_share, kv_heads, rotary

PREFIX = "transformer."
LAYOUT: dict[str, str | tuple[str, ...]] = {
    "transformer.word_embeddings": "embed.tokens",
    "transformer.h.{i}.input_layernorm": "layers.{i}.attn_norm",
    "transformer.h.{i}.ln_attn": "layers.{i}.attn_norm",
    "transformer.h.{i}.self_attention.query_key_value": (
        "layers.{i}.attn.q",
        "layers.{i}.attn.k",
        "layers.{i}.attn.v",
    ),
    "transformer.h.{i}.self_attention.dense": "layers.{i}.attn.out",
    "transformer.h.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "transformer.h.{i}.ln_mlp": "layers.{i}.mlp_norm",
    "transformer.h.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
    "transformer.h.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
    "transformer.ln_f": "final_norm",
    "lm_head": "lm_head",
}
TRANSPOSED: frozenset[str] = frozenset()
GROUPED = frozenset({"transformer.h.{i}.self_attention.query_key_value"})
IGNORED = r"h\.\d+\.self_attention\.rotary_emb\.inv_freq|h\.\d+\.self_attention\.maybe_rotary\.inv_freq"  # buffers


def spec(config: Config) -> DecoderSpec:
    hidden, layers = config.integer("hidden_size"), config.integer("num_hidden_layers", high=MAX_LAYERS)
    heads = config.integer("num_attention_heads")
    size = equal_share(config, hidden, heads)
    max_positions = config.integer("max_position_embeddings", 2048)
    bias = config.boolean("bias", False)
    is_new = config.boolean("new_decoder_architecture", False)
    is_parallel = config.boolean("parallel_attn", True)
    num_norms = config.integer("num_ln_in_parallel_attn", 2 if is_new else 1, high=2)
    if is_new and not is_parallel:
        raise config.unsupported("parallel_attn", False, "it must be true with new_decoder_architecture")
    if num_norms == 2 and not is_new:
        raise config.unsupported("num_ln_in_parallel_attn", 2, "it needs new_decoder_architecture")
    num_kv_heads = kv_heads(config, heads, "num_kv_heads")
    if not is_new:  # one for all or one for each, whatever num_kv_heads says
        num_kv_heads = 1 if config.boolean("multi_query", True) else heads
    config.get("multi_query")  # with new_decoder_architecture it means nothing
    alibi, positions = None, None
    if config.boolean("alibi", False):
        alibi = Alibi(alibi_slopes(heads))
        for key in ("rope_parameters", "rope_scaling", "rope_theta"):
            config.get(key)  # nothing is rotated
    else:
        positions, max_positions = rotary(config, size, max_positions)
    config.get("auto_map")  # the code of the time before this family was in transformers; the weights are the same
    mlp = FeedForward(
        size=config.integer("ffn_hidden_size", 4 * hidden),
        activation=config.choice("activation", ACTIVATIONS, "gelu"),
        gated=False,
        bias=bias,
    )
    return DecoderSpec(
        architecture="falcon",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        max_positions=max_positions,
        norm=Norm("layer", config.number("layer_norm_epsilon", 1e-5)),
        block=Block(parallel=is_parallel, shared_norm=is_parallel and num_norms == 1),
        attention=Attention(
            num_heads=heads,
            num_kv_heads=num_kv_heads,
            head_size=size,
            scale=size**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            rotary=(positions,) * layers,
            alibi=alibi,
            windows=(None,) * layers,
        ),
        mlps=(mlp,) * layers,
        tied_embeddings=config.boolean("tie_word_embeddings", True),
    )
