"""Paged attention in plain operators. `step.py` says what the inputs are, `kv_pool.py` why NaN stays away.

K and V of a layer lie in rows of one head's vector: row (block * kv_heads + head) * block_size + offset.
So a head's block is one run of block_size rows, and gathering blocks gives (B, kv_heads, length,
head_size) with nothing to transpose. The step's own K and V are scattered into the pool first; the
output of that is bound to the memory of its input, which makes it a write in place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nanovllm_models import DecoderSpec, alibi_bias

from .graph import MICROSOFT, Graph
from .step import GROUPS, input_name


@dataclass(frozen=True, slots=True)
class Look:
    """How one group of sequences sees the pool under one window, the same in all layers that have it."""

    blocks: str  # (B, kv_heads, n) runs of rows
    past: str  # (B, S, L) bool: does a key lie at a query or before it
    mask: str  # (B, 1, 1, S, L): 0 where a key is seen, -inf elsewhere
    bias: str | None  # of ALiBi, times the factor: as the scores, but 1 where they have S


class PagedAttention:
    """Adds the inputs and what all layers share at once, then a layer at each call."""

    def __init__(self, graph: Graph, spec: DecoderSpec, positions: str, max_len: int, block_size: int) -> None:
        """`positions` (T,) of the step's tokens."""
        self._graph, self._spec, self._block_size, self._positions = graph, spec.attention, block_size, positions
        g = graph
        self._order = g.input("order", np.int32, ["T"])
        self._tokens = {
            "decode": g.input("decode.tokens", np.int32, ["Bd", 1]),
            "prefill": g.input("prefill.tokens", np.int32, ["Bp", "Sp"]),
        }
        heads = spec.attention.num_kv_heads
        slots = g.op("Unsqueeze", g.cast(g.input("slots", np.int32, ["T"]), np.int64), g.constant([1]))
        size = g.constant(block_size)
        # (block * heads + head) * size + offset, where block * size + offset is the slot
        rows = g.op("Add", slots, g.op("Mul", g.op("Div", slots, size), g.constant(block_size * (heads - 1))))
        rows = g.op("Add", rows, g.constant(block_size * np.arange(heads)))  # (T, kv_heads)
        self._rows = g.op("Reshape", rows, g.constant([-1, 1]))  # (T * kv_heads, 1): where K and V go

        # Of q k^T and of ALiBi: the scale, and the division that belongs to the cap.
        self._factor = spec.attention.scale / (spec.attention.soft_cap or 1)
        alibi = spec.attention.alibi
        bias = None if alibi is None else alibi_bias(alibi, max_len) * np.float32(self._factor)
        windows = dict.fromkeys(spec.attention.windows)
        self._looks = {(group, w): self._look(group, w, bias) for group in GROUPS for w in windows}

    def _look(self, group: str, window: int | None, alibi: NDArray[np.float32] | None) -> Look:
        """`alibi`: (num_heads, max_len)."""
        g, kv_heads = self._graph, self._spec.num_kv_heads
        batch, label = ("Bd" if group == "decode" else "Bp"), "all" if window is None else str(window)
        tables = g.input(input_name("tables", group, window), np.int32, [batch, f"{group}.blocks.{label}"])
        begins = g.input(input_name("begins", group, window), np.int32, [batch])
        tables = g.cast(tables, np.int64)  # (B, n)
        blocks = g.op("Mul", g.op("Unsqueeze", tables, g.constant([1])), g.constant(kv_heads))
        blocks = g.op("Add", blocks, g.constant(np.arange(kv_heads)[:, None]))  # (B, kv_heads, n)

        length = g.op("Mul", g.op("Shape", tables, start=1, end=2), g.constant(self._block_size))
        columns = g.op("Range", g.constant(0), g.op("Squeeze", length), g.constant(1))
        begins = g.op("Unsqueeze", g.cast(begins, np.int64), g.constant([1]))
        keys = g.op("Add", begins, columns)  # (B, L) positions
        keys_row = g.op("Unsqueeze", keys, g.constant([1]))  # (B, 1, L)
        own = g.cast(g.op("Gather", self._positions, self._tokens[group], axis=0), np.int64)
        own = g.op("Unsqueeze", own, g.constant([2]))  # (B, S, 1) positions of the queries
        past = seen = g.op("LessOrEqual", keys_row, own)
        if window is not None:
            seen = g.op("And", seen, g.op("Greater", keys_row, g.op("Sub", own, g.constant(window))))
        mask = g.op("Where", seen, g.scalar(0), g.scalar(-np.inf))
        mask = g.op("Unsqueeze", mask, g.constant([1, 2]))  # (B, 1, 1, S, L), where S is 1 in decode
        if alibi is None:
            return Look(blocks, past, mask, None)
        max_len = alibi.shape[1]
        table = g.weight("alibi", alibi.reshape(kv_heads, -1, max_len))
        keys = g.op("Min", keys, g.constant(max_len - 1))  # a padded column may lie past the last; it is masked
        bias = g.op("Transpose", g.op("Gather", table, keys, axis=2), perm=[2, 0, 1, 3])  # (B, kv_heads, group, L)
        return Look(blocks, past, mask, g.op("Unsqueeze", bias, g.constant([2 if group == "decode" else 3])))

    def __call__(self, layer: int, q: str, k: str, v: str) -> str:
        """q (T, heads * head_size), k and v (T, kv_heads * head_size), rotated -> (T, heads * head_size).

        q and k may have axes of size 1 between the two.
        """
        g, a = self._graph, self._spec
        pools = []
        for kind, new in (("k", k), ("v", v)):
            pool = g.input(f"{kind}.{layer}", g.float_type, ["slots of heads", a.head_size])
            new = g.op("Reshape", new, g.constant([-1, a.head_size]))
            pool = g.op("ScatterND", pool, self._rows, new, name=f"{kind}.{layer}.after")
            g.output(pool, g.float_type, ["slots of heads", a.head_size])
            pools.append(g.op("Reshape", pool, g.constant([-1, self._block_size * a.head_size])))
        outputs = []
        for group in GROUPS:
            look = self._looks[group, a.windows[layer]]
            keys, values = (self._read(pool, look) for pool in pools)
            # (B, S, kv_heads, group, head_size). The query heads of a kv head are one operand: in decode as
            # its rows, (B, kv_heads, 1, group, head_size); in prefill apart, (B, kv_heads, group, S, head_size).
            queries = g.op("Gather", q, self._tokens[group], axis=0)
            queries = g.op("Reshape", queries, g.constant([0, 0, a.num_kv_heads, -1, a.head_size]))
            queries = g.op("Transpose", queries, perm=[0, 2, 1, 3, 4] if group == "decode" else [0, 2, 3, 1, 4])
            weights = self._weights(queries, keys, look)
            if group == "decode" and a.num_heads == a.num_kv_heads:
                # One row: such a product has a kernel of its own, which rounds otherwise than that of several rows,
                # unless it has a factor. So half of it is doubled, by a vector that no optimiser takes for a factor.
                mixed = g.op("FusedMatMul", weights, values, domain=MICROSOFT, alpha=0.5)
                mixed = g.op("Mul", mixed, g.constant(np.full(a.head_size, 2), g.float_type))
            else:
                mixed = g.op("MatMul", weights, values)
            mixed = g.op("Transpose", mixed, perm=[0, 2, 1, 3, 4] if group == "decode" else [0, 3, 1, 2, 4])
            outputs.append(g.op("Reshape", mixed, g.constant([-1, a.num_heads * a.head_size])))
        return g.op("Gather", g.op("Concat", *outputs, axis=0), self._order, axis=0)

    def _read(self, pool: str, look: Look) -> str:
        """What the group looks at: (B, kv_heads, 1, L, head_size)."""
        g, a = self._graph, self._spec
        shape = g.constant([0, a.num_kv_heads, 1, -1, a.head_size])
        return g.op("Reshape", g.op("Gather", pool, look.blocks, axis=0), shape)

    def _weights(self, queries: str, keys: str, look: Look) -> str:
        """softmax of the scores, capped and masked: (B, kv_heads, 1, group, L) or (B, kv_heads, group, S, L)."""
        g, cap = self._graph, self._spec.soft_cap
        scores = g.op("FusedMatMul", queries, keys, domain=MICROSOFT, transB=1, alpha=self._factor)
        if look.bias is not None:
            scores = g.op("Add", scores, look.bias)
        if cap is not None:
            scores = g.op("Mul", g.op("Tanh", scores), g.scalar(cap))
        return g.op("Softmax", g.op("Add", scores, look.mask), axis=-1)
