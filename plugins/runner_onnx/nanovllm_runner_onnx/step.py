"""One step as the graph's inputs: a ragged batch, squared off into two groups of sequences.

Sequences that compute one token each are the group `decode`; those that compute several are
`prefill`, padded to the longest. A group has a block table for every kind of attention window:
as many blocks as the longest of its spans, which begin at the block of the first position that is
seen. Padding is harmless by what it points to, so nothing downstream must know of it:
- a padded token is its sequence's last one again,
- a padded block is the spare block of the pool, which holds zeros for good,
- a group without sequences gets one that reads the spare block, because some operators fail on none: before
  ONNX Runtime 1.31 the whole process does.
Knows no model but its windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import IntArray, Packed

GROUPS = ("decode", "prefill")


def input_name(kind: str, group: str, window: int | None) -> str:
    return f"{group}.{kind}.{'all' if window is None else window}"


def step_inputs(
    packed: Packed, windows: Iterable[int | None], block_size: int, spare_block: int, even: bool = False
) -> dict[str, NDArray[np.int32]]:
    """Name -> array, all int32. With `even`, the last token and the last row wanted come twice where T or R is odd.

    input_ids, positions, slots (T,); rows (R or 1,): 0 where none is wanted; order (T,): where each token
    lies in the two groups' outputs, one after the other. For decode of Bd sequences and prefill of Bp:
    decode.tokens (Bd, 1), prefill.tokens (Bp, Sp): which tokens; and for each window
    {group}.tables.{window} (B, n): blocks; {group}.begins.{window} (B,): the position of the first slot.
    """
    counts = np.diff(packed.q_start)
    order = np.empty(len(packed.input_ids), np.int32)
    inputs = {
        "input_ids": packed.input_ids,
        "positions": packed.positions,
        "slots": packed.slots,
        "rows": packed.rows if len(packed.rows) else np.zeros(1, np.int32),
        "order": order,
    }
    num_outputs = 0
    for group, members in zip(GROUPS, (np.flatnonzero(counts == 1), np.flatnonzero(counts > 1)), strict=True):
        if len(members):
            lens = counts[members]
            columns = np.minimum(np.arange(lens.max(), dtype=np.int32), lens[:, None] - 1)
            tokens = packed.q_start[members][:, None] + columns  # (B, S)
            order[tokens] = num_outputs + np.arange(tokens.size, dtype=np.int32).reshape(tokens.shape)
        else:
            tokens = np.zeros((1, 1), np.int32)
        inputs[f"{group}.tokens"] = tokens
        num_outputs += tokens.size
        for window in windows:
            if len(members):
                tables, begins = _spans(packed, members, window, block_size, spare_block)
            else:  # the span begins where token 0 is, so that it sees something
                tables, begins = np.full((1, 1), spare_block, np.int32), packed.positions[:1]
            inputs[input_name("tables", group, window)] = tables
            inputs[input_name("begins", group, window)] = begins
    if even:
        for name in ("input_ids", "positions", "slots", "rows", "order"):
            array = inputs[name]
            inputs[name] = np.append(array, array[len(array) - len(array) % 2 :])
    return inputs


def _spans(
    packed: Packed, members: Sequence[int] | NDArray[np.intp], window: int | None, block_size: int, spare_block: int
) -> tuple[IntArray, IntArray]:
    """The blocks that hold what the members see, (B, n), and the positions at which they begin, (B,)."""
    starts, stops = packed.positions[packed.q_start[members]], packed.kv_lens[members]
    first = np.zeros_like(starts) if window is None else np.maximum(starts - (window - 1), 0) // block_size
    used = -(-stops // block_size)
    columns = first[:, None] + np.arange((used - first).max(), dtype=np.int32)
    tables = np.take_along_axis(packed.tables[members], np.minimum(columns, packed.tables.shape[1] - 1), axis=1)
    return np.where(columns < used[:, None], tables, np.int32(spare_block)), first * np.int32(block_size)
