"""`KVPool`: the memory of all layers' keys and values on the device, written and gathered by row.

A row is one head's vector at one slot. Of a block, all K heads and then all V heads lie one after
another, `block_size` rows each: row (block * 2 * kv_heads + head) * block_size + offset, where V counts as
heads [kv_heads, 2 * kv_heads). So one gather brings K and V of any blocks, with nothing to transpose.

A mask does not stop a NaN from spreading through a product, and a freed block may hold anything. So every
slot that can be gathered holds numbers of its own sequence or zeros: a sequence that enters a block finds
it cleared, and the padding of block tables points to a spare block of zeros.
"""

from __future__ import annotations

import numpy as np
import torch

from nanovllm.batch import IntArray, Packed


class KVPool:
    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Raises MemoryError, or torch's OutOfMemoryError, if there is no such amount of memory."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_kv_heads = num_kv_heads
        shape = (num_layers, num_blocks + 1, 2 * num_kv_heads, block_size, head_size)  # the last block is the spare one
        if device.type == "cpu":
            # NumPy's zeros, because the system hands out their pages when they are first written: an unused
            # pool costs nothing. torch writes its own at once.
            try:
                pages = np.zeros((*shape[:-1], head_size * dtype.itemsize), np.uint8)
            except ValueError as e:  # more than an address can say
                raise MemoryError(str(e)) from e
            self.array = torch.from_numpy(pages).view(dtype)
        else:
            self.array = torch.zeros(shape, dtype=dtype, device=device)
        # The same memory as rows and as runs of block_size rows, by layer: a view each time would be an operator each.
        self._rows = list(self.array.view(num_layers, -1, head_size))
        self._runs = list(self.array.view(num_layers, -1, block_size * head_size))

    @property
    def spare_block(self) -> int:
        return self.num_blocks

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def clear_ahead(self, packed: Packed) -> None:
        """Zero the last block of each sequence that enters it in this step; nothing of its own is in there yet."""
        blocks, _ = packed.entered_blocks(self.block_size)
        if len(blocks):
            self.array.index_fill_(1, torch.as_tensor(blocks, dtype=torch.int64, device=self.array.device), 0)

    def rows_of_slots(self, slots: IntArray) -> torch.Tensor:
        """Where K and V of T tokens go: (T * 2 * kv_heads,)."""
        heads = 2 * self.num_kv_heads
        blocks, offsets = np.divmod(slots.astype(np.int64)[:, None], self.block_size)
        rows = (blocks * heads + np.arange(heads)) * self.block_size + offsets
        return torch.as_tensor(rows.reshape(-1), device=self.array.device)

    def runs_of_blocks(self, blocks: IntArray) -> torch.Tensor:
        """Where the blocks (n, m) of n sequences lie, as runs of block_size rows: (2 * n * kv_heads * m,)."""
        kinds = np.arange(2 * self.num_kv_heads).reshape(2, 1, -1, 1)  # (K or V, 1, kv_heads, 1)
        runs = blocks[None, :, None, :].astype(np.int64) * (2 * self.num_kv_heads) + kinds
        return torch.as_tensor(runs.reshape(-1), device=self.array.device)

    def write(self, layer: int, rows: torch.Tensor, kv: torch.Tensor) -> None:
        """kv (T, 2 * kv_heads, head_size): the K heads, then the V heads."""
        self._rows[layer].index_copy_(0, rows, kv.to(self.array.dtype).reshape(-1, kv.shape[-1]))

    def scratch(self, num_runs: int) -> torch.Tensor:
        """Room for so many runs."""
        return self.array.new_empty(num_runs, self.block_size * self.array.shape[-1])

    def gather(
        self, layer: int, runs: torch.Tensor, num_seqs: int, scratch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, (num_seqs * kv_heads, m * block_size, head_size) each, of `runs_of_blocks`, inside `scratch`."""
        found = torch.index_select(self._runs[layer], 0, runs, out=scratch[: len(runs)])
        k, v = found.view(2, num_seqs * self.num_kv_heads, -1, self.array.shape[-1])
        return k, v
