"""`build_decoder`: a DecoderSpec and its weights -> the ONNX graph of one step.

Read it next to the pseudocode in `nanovllm_models/spec.py`: it is the same, in the same order.
The graph's inputs are those of `step.py` and the pool `k.{i}`, `v.{i}` of every layer; its outputs
are `logits` (R, vocab) and the pools after the step. Knows no engine, no session and no family.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import TensorProto

from nanovllm.errors import ConfigError
from nanovllm_models import Attention, DecoderSpec, Rotary, Tensor, rotary_frequencies

from .attention import PagedAttention
from .cuda_attention import CudaAttention
from .device_limits import check_limits
from .directml_attention import DIRECTML_ACTIVATIONS, DIRECTML_OPSET, DirectMLAttention
from .graph import MICROSOFT, OPSET, DataFile, Graph
from .linears import FloatLinears, make_linears
from .modules import ACTIVATIONS, Modules
from .precision import FP32, Precision, float_type

ATTENTIONS = {"cpu": PagedAttention, "cuda": CudaAttention, "directml": DirectMLAttention}


def build_decoder(
    spec: DecoderSpec,
    tensors: Mapping[str, Tensor],
    max_len: int,
    block_size: int,
    precision: Precision = FP32,
    device: str = "cpu",
    data: DataFile | None = None,
) -> Graph:
    """`max_len` positions; it fixes the frequencies of length-dependent rotary rules. `data` takes the weights.

    Raises UnsupportedModelError naming what the spec has and this builder has not, ConfigError for a precision or
    sizes that the device or the memory has not, ModelError for a weight that cannot be converted.
    """
    check_limits(spec, device, block_size)
    g = Graph(float_type(precision, device), data, DIRECTML_OPSET if device == "directml" else OPSET)
    floats = FloatLinears(g, tensors)
    matrices = make_linears(g, tensors, precision, device)
    activations = DIRECTML_ACTIVATIONS if device == "directml" else ACTIVATIONS
    modules, block, attention = Modules(g, tensors, matrices, floats, activations), spec.block, spec.attention
    ids = g.input("input_ids", np.int32, ["T"])
    positions = g.input("positions", np.int32, ["T"])
    rows = g.input("rows", np.int32, ["R"])
    try:
        attend = ATTENTIONS[device](g, spec, positions, max_len, block_size)
        rules = enumerate(dict.fromkeys(attention.rotary))
        rotations = {rule: _Rotation(g, rule, i, positions, max_len) for i, rule in rules if rule}
    except MemoryError as e:
        raise ConfigError(
            f"tables of {max_len} positions do not fit in memory: {e}",
            hint="lower max_model_len (of an export: max_length)",
        ) from e

    def post_norm(y: str, name: str) -> str:
        if block.post_norms:
            y = modules.norm(y, name, spec.norm)
        return _times(g, y, spec.residual_scale)

    x = _times(g, matrices.rows("embed.tokens.weight", ids), spec.embedding_scale)
    if spec.learned_positions:
        x = g.op("Add", x, floats.rows("embed.positions.weight", positions))
    for i, mlp in enumerate(spec.mlps):
        attn, feed = f"layers.{i}.attn", f"layers.{i}.mlp"
        h = modules.norm(x, f"{attn}_norm", spec.norm) if block.pre_norms else x
        q, k, v = modules.linears(h, f"{attn}.q", f"{attn}.k", f"{attn}.v")
        q, k = (_norm_heads(modules, y, f"{attn}.{part}_norm", attention) for part, y in (("q", q), ("k", k)))
        rotary = attention.rotary[i]
        if rotary is not None:
            q = rotations[rotary](q, attention.num_heads, attention.head_size)
            k = rotations[rotary](k, attention.num_kv_heads, attention.head_size)
        mixed = attend(i, q, k, v)
        if i == spec.num_layers - 1:  # nothing after the last attention mixes tokens: go on with the wanted ones
            mixed, x, h = (g.op("Gather", y, rows, axis=0) for y in (mixed, x, h))
        a = post_norm(modules.linear(mixed, f"{attn}.out"), f"{attn}_post_norm")
        if not block.parallel:
            h = x = g.op("Add", x, a)
        if block.pre_norms and not block.shared_norm:
            h = modules.norm(x, f"{feed}_norm", spec.norm)
        f = post_norm(modules.feed_forward(h, feed, mlp), f"{feed}_post_norm")
        if block.parallel:
            x = g.op("Add", x, a)
        x = g.op("Add", x, f)

    x = modules.norm(x, "final_norm", spec.norm)
    head = "embed.tokens.weight" if spec.tied_embeddings else "lm_head.weight"
    [logits] = matrices.products(x, [head], ["lm_head.bias"] if spec.lm_head_bias else [])
    logits = _times(g, logits, spec.logits_scale)
    if spec.logits_soft_cap is not None:
        cap = g.scalar(spec.logits_soft_cap)
        logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap)
    if g.float_type == np.float32:  # a cast would copy them, which takes 3 % of a step of 32 sequences
        logits = g.op("Identity", logits, name="logits")
    else:
        logits = g.op("Cast", logits, name="logits", to=TensorProto.FLOAT)
    g.output(logits, np.float32, ["R", spec.vocab_size])
    return g


class _Rotation:
    """Rotates heads by the tables of one rule, one row of cos and sin per position."""

    def __init__(self, graph: Graph, rotary: Rotary, number: int, positions: str, max_len: int) -> None:
        frequencies, factor = rotary_frequencies(rotary, max_len)
        angles = np.arange(max_len, dtype=np.float32)[:, None] * frequencies
        self._graph, self._rotary = graph, rotary
        self._cos = graph.weight(f"rotary.{number}.cos", np.cos(angles) * np.float32(factor))
        self._sin = graph.weight(f"rotary.{number}.sin", np.sin(angles) * np.float32(factor))
        positions = graph.cast(positions, np.int64)
        # Every token is a sequence of one: the operator refuses a longer one than its tables, which T may be.
        self._positions = graph.op("Unsqueeze", positions, graph.constant([1]))  # (T, 1)

    def __call__(self, x: str, num_heads: int, head_size: int) -> str:
        """(T, num_heads * head_size) -> (T, 1, num_heads * head_size)."""
        g = self._graph
        is_partial = self._rotary.dim < head_size
        return g.op(
            "RotaryEmbedding", g.op("Unsqueeze", x, g.constant([1])), self._positions, self._cos, self._sin,
            domain=MICROSOFT, num_heads=num_heads if is_partial else 0,
            rotary_embedding_dim=self._rotary.dim if is_partial else 0,
        )  # fmt: skip


def _norm_heads(modules: Modules, x: str, name: str, attention: Attention) -> str:
    """q or k normed as the spec says: not at all, as a whole, or each head by itself."""
    norm = attention.qk_norm
    if norm is None:
        return x
    if attention.qk_norm_whole:
        return modules.norm(x, name, norm)
    g = modules.graph
    heads = g.op("Reshape", x, g.constant([0, -1, attention.head_size]))
    return g.op("Reshape", modules.norm(heads, name, norm), g.constant([0, -1]))


def _times(g: Graph, x: str, factor: float) -> str:
    return x if factor == 1 else g.op("Mul", x, g.scalar(factor))
