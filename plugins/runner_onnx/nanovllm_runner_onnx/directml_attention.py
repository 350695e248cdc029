"""Attention on DirectML: the plain operators of `attention.py`, and no stale number multiplied.

Its GroupQueryAttention takes the past for empty whenever it gets several tokens, so that a chunked prefill
would be silently wrong; paged attention it has none. Nobody clears blocks in the memory of the device.
Instead, what was gathered from behind the end of a sequence is replaced by zeros.
"""

from __future__ import annotations

from collections.abc import Callable

from .attention import Look, PagedAttention
from .graph import MICROSOFT, Graph
from .modules import ACTIVATIONS

DIRECTML_OPSET = 17  # the last of whose ScatterND it has a kernel; that of 18 would run on the CPU, pool and all

# It has neither form of the standard's Gelu.
DIRECTML_ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = ACTIVATIONS | {
    "gelu": lambda g, x: g.op("Gelu", x, domain=MICROSOFT),
    "gelu_tanh": lambda g, x: g.op("FastGelu", x, domain=MICROSOFT),
}


class DirectMLAttention(PagedAttention):
    def _read(self, pool: str, look: Look) -> str:
        """(B, kv_heads, 1, L, head_size)"""
        g = self._graph
        written = g.op("Gather", look.past, g.constant(-1), axis=1)  # (B, L): up to the sequence's last query
        written = g.op("Unsqueeze", written, g.constant([1, 2, 4]))
        return g.op("Where", written, super()._read(pool, look), g.scalar(0))
