"""Parts of config.json that several families spell alike: rotary positions and sliding windows."""

from __future__ import annotations

import math

from nanovllm.errors import ModelError

from ..config import MAX_INT, Config
from ..spec import DynamicNTK, Linear, Llama3, LongRope, Rotary, Scaling, Yarn

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_fast": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
ROPE_TYPES = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")


def head_size(config: Config, hidden_size: int, num_heads: int) -> int:
    """`head_dim`, or an equal share of the hidden size."""
    if config.get("head_dim") is not None:
        return config.integer("head_dim")
    return equal_share(config, hidden_size, num_heads)


def equal_share(config: Config, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        raise ModelError(
            f"{config.where}: hidden_size {hidden_size} is not divisible by {num_heads} attention heads",
            hint="correct or restore the file",
        )
    return hidden_size // num_heads


def kv_heads(config: Config, num_heads: int) -> int:
    """`num_key_value_heads`, each shared by an equal number of query heads."""
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ModelError(
            f"{config.where}: {num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly",
            hint="correct or restore the file",
        )
    return num_kv_heads


def rotary(config: Config, dim: int, max_positions: int) -> tuple[Rotary, int]:
    """The rotation, and the positions it allows: some rules state a length beyond `max_positions`.

    Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). What is
    not given inside the object is taken from beside it, as transformers does.
    """
    if dim % 2:
        raise config.unsupported("head_dim", dim, "rotary positions need an even head size")
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    rope = old or new or Config({}, config.where)  # where a file has both, transformers takes the old one
    theta = rope.number("rope_theta", config.number("rope_theta", 10_000.0), low=1.001)
    for place in (rope, config):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            raise place.unsupported("partial_rotary_factor", place.get("partial_rotary_factor"), "supported: 1.0")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.get("type")  # files for both spellings carry it twice
    if kind not in ROPE_TYPES:
        raise rope.unsupported("rope_type", kind, f"supported: {', '.join(ROPE_TYPES)}")

    inside = rope.integer("original_max_position_embeddings", max_positions, low=2)
    original = config.integer("original_max_position_embeddings", inside, low=2)
    scaling: Scaling | None = None
    if kind == "linear":
        scaling = Linear(rope.number("factor", low=1))
    elif kind == "dynamic":
        if dim < 4:
            raise config.unsupported("head_dim", dim, "dynamic NTK scaling needs a head size of at least 4")
        scaling = DynamicNTK(rope.number("factor", low=1), max_positions)
        max_positions = min(int(max_positions * scaling.factor), MAX_INT)
    elif kind == "yarn":
        scaling = _yarn(rope, original, max_positions)
        max_positions = min(max(max_positions, int(original * scaling.factor)), MAX_INT)
    elif kind == "longrope":
        factor = rope.number("factor", max_positions / original)
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        scaling = LongRope(
            rope.numbers("short_factor", dim // 2),
            rope.numbers("long_factor", dim // 2),
            original,
            rope.number("attention_factor", default),
        )
    elif kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if low >= high:
            raise rope.unsupported("low_freq_factor", low, f"it must be below high_freq_factor ({high:g})")
        scaling = Llama3(rope.number("factor", low=1), low, high, original)
    rope.finish()
    return Rotary(dim, theta, scaling), max_positions


def _yarn(rope: Config, original: int, max_positions: int) -> Yarn:
    factor = rope.number("factor", max_positions / original)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        default = magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    else:
        default = magnitude(1.0)
    return Yarn(
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.boolean("truncate", True),
        attention_factor=rope.number("attention_factor", default),
    )


def sliding_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, from `layer_types` (transformers 5) or `max_window_layers` (before)."""
    first = config.integer("max_window_layers", 28, low=0)
    window = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    config.get("sliding_window")  # without use_sliding_window it means nothing
    types = config.get("layer_types")
    if types is None:
        return tuple(window if i >= first else None for i in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.unsupported("layer_types", types, f"it must be a list of {num_layers} layer types")
    if any(t not in ("full_attention", "sliding_attention") for t in types):
        raise config.unsupported("layer_types", types, "supported: full_attention, sliding_attention")
    if window is None and "sliding_attention" in types:
        raise config.unsupported("layer_types", types, "sliding_attention needs use_sliding_window: true")
    return tuple(window if t == "sliding_attention" else None for t in types)
