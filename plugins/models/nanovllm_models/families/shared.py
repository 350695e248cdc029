"""Parts of config.json that several families spell alike: heads, rotary positions, sliding windows, experts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..config import MAX_INT, Config
from ..positions import DynamicNTK, Linear, Llama3, LongRope, Rotary, Scaling, Yarn
from ..spec import Experts, FeedForward, Norm

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
        raise config.contradiction(f"hidden_size {hidden_size} is not divisible by {num_heads} attention heads")
    return hidden_size // num_heads


def kv_heads(config: Config, num_heads: int, key: str = "num_key_value_heads", default: int | None = None) -> int:
    """Key-value heads, each shared by an equal number of query heads."""
    absent = num_heads if default is None or key in config else default  # null means as many as query heads
    num_kv_heads = config.integer(key, absent)
    if num_heads % num_kv_heads:
        raise config.contradiction(f"{num_heads} attention heads cannot share {num_kv_heads} key-value heads evenly")
    return num_kv_heads


def rotary(
    config: Config,
    head_size: int,
    max_positions: int,
    *,
    theta: float = 10_000.0,
    part: float | None = None,
    theta_key: str = "rope_theta",
    part_key: str = "partial_rotary_factor",
    aliases: Mapping[str, str] | None = None,
) -> tuple[Rotary, int]:
    """The rotation, and the positions it allows: some rules state a length beyond `max_positions`.

    Reads `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before). What is
    not given inside the object is taken from beside it (`theta_key`, `part_key`), as transformers
    does, and else from `theta` and `part`, the share of a head that is rotated. part=None: the family
    rotates whole heads, and a file that says otherwise is refused.
    """
    new, old = config.section("rope_parameters"), config.section("rope_scaling")
    rope = old or new or Config({}, config.where)  # where a file has both, transformers takes the old one
    return rotary_section(
        rope,
        config,
        head_size,
        max_positions,
        theta=config.number(theta_key, theta, low=1.001),
        part=_part(config, part_key, part),
        aliases=aliases,
    )


def rotary_section(
    rope: Config,
    config: Config,
    head_size: int,
    max_positions: int,
    *,
    theta: float,
    part: float | None = None,
    aliases: Mapping[str, str] | None = None,
) -> tuple[Rotary, int]:
    """The rotation of one rope section; `theta` and `part` where it gives none. `aliases`: old names of rope types."""
    theta = rope.number("rope_theta", theta, low=1.001)
    part = _part(rope, "partial_rotary_factor", part)
    dim = int(head_size * (1.0 if part is None else part))
    if part is not None and (part > 1 or dim < 2 or dim % 2):
        raise config.unsupported(
            "partial_rotary_factor", part, f"it must leave an even number of the {head_size} numbers of a head"
        )
    if dim % 2:
        raise config.unsupported("head_dim", head_size, "rotary positions need an even head size")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rope.get("type")  # files for both spellings carry it twice
    kind = (aliases or {}).get(kind, kind) if isinstance(kind, str) else kind
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


def _part(place: Config, key: str, default: float | None) -> float | None:
    part = place.number(key, 1.0 if default is None else default)
    if default is None and part != 1:
        raise place.unsupported(key, part, "this family rotates whole heads")
    return None if default is None else part


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


def rms_norm(config: Config) -> Norm:
    return Norm("rms", config.number("rms_norm_eps", 1e-6))


def window(config: Config, default: int | None = None) -> int | None:
    """`sliding_window`; null means none, absence the default."""
    if config.get("sliding_window") is None:
        return None if "sliding_window" in config else default
    return config.integer("sliding_window")


def soft_cap(config: Config, key: str, default: float | None = None) -> float | None:
    """A cap; null means none, absence the default."""
    if config.get(key) is None:
        return None if key in config else default
    return config.number(key)


def layer_types(config: Config, num_layers: int) -> list[bool] | None:
    """Per layer, does it slide its window? From `layer_types` (transformers 5); None where the file has none."""
    types = config.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != num_layers:
        raise config.unsupported("layer_types", types, f"it must be a list of {num_layers} layer types")
    if any(t not in ("full_attention", "sliding_attention") for t in types):
        raise config.unsupported("layer_types", types, "supported: full_attention, sliding_attention")
    return [t == "sliding_attention" for t in types]


def sliding_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """Per layer, from `layer_types` (transformers 5) or `max_window_layers` (before)."""
    first = config.integer("max_window_layers", 28, low=0)
    size = config.integer("sliding_window", 4096) if config.boolean("use_sliding_window", False) else None
    config.get("sliding_window")  # without use_sliding_window it means nothing
    slides = layer_types(config, num_layers)
    if slides is None:
        slides = [size is not None and i >= first for i in range(num_layers)]
    if size is None and any(slides):
        raise config.unsupported(
            "layer_types", config.get("layer_types"), "sliding_attention needs use_sliding_window: true"
        )
    return tuple(size if s else None for s in slides)


def gated_mlp(config: Config, size: int, *, bias: bool = False) -> FeedForward:
    return FeedForward(size=size, activation=config.choice("hidden_act", ACTIVATIONS, "silu"), gated=True, bias=bias)


def experts(
    config: Config,
    expert: FeedForward,
    *,
    num_experts: int,
    top_k: int,
    normalised: bool,
    shared: FeedForward | None = None,
) -> Experts:
    """`num_experts` and `top_k` are the family's defaults."""
    key = "num_local_experts" if config.get("num_local_experts") is not None else "num_experts"
    num_experts, top_k = config.integer(key, num_experts), config.integer("num_experts_per_tok", top_k)
    if top_k > num_experts:
        raise config.contradiction(f"num_experts_per_tok is {top_k}, but {key} only {num_experts}")
    return Experts(num_experts=num_experts, top_k=top_k, normalised=normalised, expert=expert, shared=shared)


def sparse_layers(config: Config, num_layers: int) -> list[bool]:
    """Per layer, is its feed-forward a mixture? Every `decoder_sparse_step`-th, but none of `mlp_only_layers`."""
    step, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < num_layers for i in dense):
        raise config.contradiction(f"mlp_only_layers is {dense!r:.60}; it must be a list of layers below {num_layers}")
    return [(i + 1) % step == 0 and i not in dense for i in range(num_layers)]
