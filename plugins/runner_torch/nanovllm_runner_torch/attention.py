"""Paged attention: how the tokens of a step look at keys and values. `kv_pool.py` says where these lie.

`Plan` turns a batch into work once per step and window; every layer then follows it.
- Sequences that compute one token each (decode) attend in groups of similar length: one product of three
  dimensions for a group, whose blocks are gathered and padded to its longest. No Python runs per sequence.
- A sequence that computes several tokens (prefill) attends alone, in chunks of query rows.
So neither a long context beside short ones nor a long prompt needs more memory than the constants below
allow, beyond the K and V of one sequence in one layer.

Query heads that share a kv head are rows of one operand; K and V are never repeated. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.batch import IntArray, Packed
from nanovllm_models import Attention, alibi_bias

from .kv_pool import KVPool

# Numbers of K and V of a decode group, if it has more than one sequence. What a CPU gathers it should find in its
# cache again; to an accelerator a group is a few kernels that wait for each other.
GATHERED = {"cpu": 2**22, "cuda": 2**26}
SCORES = 2**22  # numbers of scores of a prefill chunk, if it has more than ROWS_MIN rows
ROWS_MIN, ROWS_MAX = 16, 128  # query rows of a prefill chunk


@dataclass(frozen=True, slots=True)
class Decode:
    """One query token each of n sequences."""

    tokens: Tensor | None  # (n,) which tokens of the step; None = all, in order
    num_seqs: int
    runs: Tensor  # of `KVPool.runs_of_blocks`
    added: Tensor  # (n * kv_heads, 1 or group, gathered slots): -inf where nothing is seen, else ALiBi or 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Query tokens [first, last) of the step, all of one sequence."""

    first: int
    last: int
    left: int  # they look at columns [left, right) of the gathered slots
    right: int
    hidden: Tensor  # (rows, 1, some): of the last of these columns, -inf where a row does not look, else 0
    bias: Tensor | None  # ALiBi: (kv_heads, 1, group, right - left)


@dataclass(frozen=True, slots=True)
class Prefill:
    runs: Tensor
    chunks: list[Chunk]


@dataclass(frozen=True, slots=True)
class Plan:
    prefills: list[Prefill]
    decodes: list[Decode]
    scratch: Tensor  # for the K and V of any of them; each layer's again, because fresh pages are slow


class PagedAttention:
    def __init__(self, spec: Attention, max_len: int, pool: KVPool) -> None:
        self._spec, self._pool = spec, pool
        self._device, self._dtype = pool.array.device, pool.array.dtype
        self._group = spec.num_heads // spec.num_kv_heads
        # Caps and biases are larger than what is left of them after the softmax: computed in float32.
        self._is_wide = spec.soft_cap is not None or spec.alibi is not None
        self._alibi = None
        if spec.alibi is not None:
            bias = torch.from_numpy(alibi_bias(spec.alibi, max_len)).to(self._device) * spec.scale
            self._alibi = bias.view(spec.num_kv_heads, self._group, max_len)

    # ------------------------------------------------------------------------------------- planning

    def plan(self, packed: Packed, window: int | None) -> Plan:
        block_size = self._pool.block_size
        starts, stops = packed.positions[packed.q_start[:-1]], packed.kv_lens  # (S,)
        begins = np.zeros_like(starts) if window is None else np.maximum(starts - (window - 1), 0)
        borders = begins // block_size * block_size  # a span begins with a block
        counts = np.diff(packed.q_start)
        prefills = [
            Prefill(
                self._runs(packed, np.array([s]), borders, stops),
                list(self._chunks(packed, int(s), int(starts[s]), int(borders[s]), window)),
            )
            for s in np.flatnonzero(counts > 1)
        ]
        groups = list(self._groups(np.flatnonzero(counts == 1), stops - borders))
        if len(groups) == 1:
            groups[0].sort()
        is_all = len(groups) == 1 and not prefills
        decodes = [self._decode(packed, group, begins, borders, is_all) for group in groups]
        most = max(len(runs) for runs in [work.runs for work in prefills] + [work.runs for work in decodes])
        return Plan(prefills, decodes, self._pool.scratch(most))

    def _groups(self, members: NDArray[np.intp], lengths: IntArray) -> Iterator[NDArray[np.intp]]:
        """Members by length, split so that padding at most doubles a group and it stays within GATHERED."""
        members = members[np.argsort(lengths[members], kind="stable")]
        lengths = lengths[members]
        slots = max(1, GATHERED[self._device.type] // (2 * self._spec.num_kv_heads * self._spec.head_size))
        first = 0
        while first < len(members):
            last = int(np.searchsorted(lengths, 2 * lengths[first] + 64, "right"))
            while last > first + 1 and (last - first) * int(lengths[last - 1]) > slots:
                last = min(last - 1, first + max(1, slots // int(lengths[last - 1])))
            yield members[first:last]
            first = last

    def _decode(
        self, packed: Packed, group: NDArray[np.intp], begins: IntArray, borders: IntArray, is_all: bool
    ) -> Decode:
        stops = packed.kv_lens
        tokens = None if is_all else self._on_device(packed.q_start[group].astype(np.int64))
        runs = self._runs(packed, group, borders, stops)
        # All that was gathered is looked at, because a cut would be copied; what a sequence does not see is hidden.
        num_slots = len(runs) // (2 * self._spec.num_kv_heads * len(group)) * self._pool.block_size
        columns = borders[group, None] + np.arange(num_slots, dtype=np.int32)  # (n, slots) positions
        hidden = (columns >= stops[group, None]) | (columns < begins[group, None])
        added = torch.zeros(hidden.shape, dtype=torch.float32 if self._is_wide else self._dtype, device=self._device)
        added = added.masked_fill_(self._on_device(hidden), -torch.inf)[:, None, None]  # (n, 1, 1, slots)
        if self._alibi is None:
            added = added.expand(-1, self._spec.num_kv_heads, -1, -1)
        else:  # a padded column may lie past the last position; it is hidden
            columns = np.minimum(columns, self._alibi.shape[-1] - 1).astype(np.int64)
            added = added + self._alibi[:, :, self._on_device(columns)].permute(2, 0, 1, 3)
        return Decode(tokens, len(group), runs, added.flatten(0, 1))

    def _chunks(self, packed: Packed, s: int, start: int, border: int, window: int | None) -> Iterator[Chunk]:
        """Of sequence s, whose first token is at position `start` and whose gathered slots begin at `border`."""
        begin, end, stop = int(packed.q_start[s]), int(packed.q_start[s + 1]), int(packed.kv_lens[s])
        step = min(max(SCORES // (self._spec.num_heads * (stop - border)), ROWS_MIN), ROWS_MAX)
        for first in range(begin, end, step):
            last = min(first + step, end)
            low, high = start + first - begin, start + last - begin  # positions [low, high)
            seen = border if window is None else max(low - (window - 1), border)  # the first that any of them sees
            rows = torch.arange(low, high, device=self._device)[:, None, None]
            # Without a window, all rows see all that is before the first of them.
            columns = torch.arange(low if window is None else seen, high, device=self._device)
            hidden = columns > rows
            if window is not None:
                hidden |= columns <= rows - window
            hidden = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, -torch.inf)
            bias = None if self._alibi is None else self._alibi[:, None, :, seen:high]
            yield Chunk(first, last, seen - border, high - border, hidden, bias)

    def _runs(self, packed: Packed, members: NDArray[np.intp], borders: IntArray, stops: IntArray) -> Tensor:
        """The blocks of positions [border, stop) of each member, padded with the spare block."""
        block_size, tables = self._pool.block_size, packed.tables[members]
        first, used = (borders // block_size)[members], (-(-stops // block_size))[members]
        columns = first[:, None] + np.arange((used - first).max(), dtype=np.int32)
        blocks = np.take_along_axis(tables, np.minimum(columns, tables.shape[1] - 1), axis=1)
        return self._pool.runs_of_blocks(np.where(columns < used[:, None], blocks, self._pool.spare_block))

    def _on_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    # -------------------------------------------------------------------------------------- looking

    def __call__(self, plan: Plan, layer: int, q: Tensor) -> Tensor:
        """softmax(q k^T) v for every token of the step: q (T, heads, head_size) -> (T, heads * head_size).

        K and V of the step's own tokens must be in the pool.
        """
        q = q.to(self._dtype).view(len(q), self._spec.num_kv_heads, self._group, self._spec.head_size)
        if len(plan.decodes) == 1 and plan.decodes[0].tokens is None:
            return self._attend_decode(plan.decodes[0], layer, q, plan.scratch).reshape(len(q), -1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for prefill in plan.prefills:
            self._attend_prefill(prefill, layer, q, out, plan.scratch)
        for decode in plan.decodes:
            out[decode.tokens] = self._attend_decode(decode, layer, q[decode.tokens], plan.scratch)
        return out.view(len(q), -1)

    def _attend_decode(self, work: Decode, layer: int, q: Tensor, scratch: Tensor) -> Tensor:
        """q (n, kv_heads, group, head_size) -> the same."""
        k, v = self._pool.gather(layer, work.runs, work.num_seqs, scratch)
        rows = q.reshape(-1, *q.shape[2:])  # (n * kv_heads, group, head_size)
        if self._is_wide:
            weights = self._capped(torch.bmm(rows, k.transpose(1, 2))).add_(work.added)
        else:
            weights = torch.baddbmm(work.added, rows, k.transpose(1, 2), alpha=self._spec.scale)
        return torch.bmm(weights.softmax(-1).to(v.dtype), v).view(q.shape)

    def _attend_prefill(self, work: Prefill, layer: int, q: Tensor, out: Tensor, scratch: Tensor) -> None:
        """q (T, kv_heads, group, head_size); writes the rows of its own tokens of `out`, the same shape."""
        k, v = self._pool.gather(layer, work.runs, 1, scratch)
        kv_heads, group, size = q.shape[1:]
        for chunk in work.chunks:
            num_rows = chunk.last - chunk.first
            rows = q[chunk.first : chunk.last].transpose(0, 1).reshape(kv_heads, num_rows * group, size)
            keys, values = k[:, chunk.left : chunk.right], v[:, chunk.left : chunk.right]
            scores = torch.bmm(rows, keys.transpose(1, 2)).view(kv_heads, num_rows, group, -1)
            scores = self._capped(scores) if self._is_wide else scores.mul_(self._spec.scale)
            if chunk.bias is not None:
                scores += chunk.bias
            scores[..., -chunk.hidden.shape[-1] :].add_(chunk.hidden)  # quicker than to fill
            weights = scores.softmax(-1).to(values.dtype).view(kv_heads, num_rows * group, -1)
            mixed = torch.bmm(weights, values).view(kv_heads, num_rows, group, size)
            out[chunk.first : chunk.last] = mixed.transpose(0, 1)

    def _capped(self, products: Tensor) -> Tensor:
        """q k^T in any type -> scaled and capped, float32."""
        cap = self._spec.soft_cap
        scores = products.float()
        return scores * self._spec.scale if cap is None else (scores * (self._spec.scale / cap)).tanh_().mul_(cap)
