"""Attention on CUDA: one node of ONNX Runtime's PagedAttention a layer, and what a step is as its inputs.

Its interface is the engine's own: packed tokens, block tables, slots. The pool of a layer is
(blocks, block_size, kv_heads, head_size), twice, in the memory of the device. It is fp16, like all else.

No device has run it. Nothing clears a block here, so that stale numbers in it reach nobody rests on the operator,
which is told every sequence's length. Of its source in ONNX Runtime (September 2026) what follows from these
lengths was read, and the kernel of decoding, which visits no slot behind the end; the other kernels were not read.
A block table is padded with a spare block, which is zero for good.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import Packed
from nanovllm_models import DecoderSpec

from .graph import MICROSOFT, Graph

MAX_SEQS = 256  # of a step; of more, versions before 1.31 compute something else


class CudaAttention:
    """Adds the inputs that all layers share at once, then a layer at each call."""

    def __init__(self, graph: Graph, spec: DecoderSpec, positions: str, max_len: int, block_size: int) -> None:
        self._graph, self._spec, self._block_size = graph, spec.attention, block_size
        self._starts = graph.input("q_start", np.int32, ["S + 1"])
        self._past_lens = graph.input("past_lens", np.int32, ["S"])
        self._tables = graph.input("tables", np.int32, ["S", "blocks"])
        self._slots = graph.input("slots", np.int32, ["T"])
        self._bounds = graph.input("bounds", np.int32, [2])

    def __call__(self, layer: int, q: str, k: str, v: str) -> str:
        """q (T, heads * head_size), k and v (T, kv_heads * head_size), rotated -> (T, heads * head_size).

        q and k may have axes of size 1 between the two.
        """
        g, a = self._graph, self._spec
        q = g.op("Reshape", q, g.constant([-1, a.num_heads * a.head_size]))
        k = g.op("Reshape", k, g.constant([-1, a.num_kv_heads * a.head_size]))
        shape = ["blocks of the pool", self._block_size, a.num_kv_heads, a.head_size]
        pools = [g.input(f"{kind}.{layer}", g.float_type, shape) for kind in "kv"]
        names = [f"attention.{layer}", f"k.{layer}.after", f"v.{layer}.after"]
        window = a.windows[layer]
        g.ops(
            "PagedAttention", q, k, v, *pools, self._starts, self._past_lens, self._tables, "", "", self._slots,
            "", "", "", "", "", self._bounds,
            names=names, domain=MICROSOFT, num_heads=a.num_heads, kv_num_heads=a.num_kv_heads, scale=a.scale,
            softcap=a.soft_cap or 0.0, local_window_size=-1 if window is None else window,
        )  # fmt: skip
        for name in names[1:]:
            g.output(name, g.float_type, shape)
        return names[0]


def cuda_inputs(packed: Packed, spare_block: int) -> dict[str, NDArray[np.int32]]:
    """Name -> array, all int32.

    input_ids, positions, slots (T,); rows (R or 1,): 0 where none is wanted; q_start (S + 1,); past_lens (S,):
    tokens before this step's; tables (S, n); bounds (2,): the most new tokens and the longest context of a
    sequence, which the operator would otherwise fetch from the device in every layer.
    """
    counts = np.diff(packed.q_start)
    return {
        "input_ids": packed.input_ids,
        "positions": packed.positions,
        "slots": packed.slots,
        "rows": packed.rows if len(packed.rows) else np.zeros(1, np.int32),
        "q_start": packed.q_start,
        "past_lens": packed.kv_lens - counts,
        "tables": np.where(packed.tables < 0, np.int32(spare_block), packed.tables),
        "bounds": np.array([counts.max(), packed.kv_lens.max()], np.int32),
    }
