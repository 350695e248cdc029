"""`KVPool`: the memory of all layers' keys and values, which the session reads and writes in place.

A block that holds stale numbers, NaN included, is never read: what a sequence may not see is masked
in the graph, but a mask does not stop NaN from spreading through a product. So every slot that the
graph can gather holds numbers of its own sequence or zeros. A sequence that enters a block finds the
rest of it cleared, and the padding of the block tables points to a spare block of zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import Packed

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]


class KVPool:
    def __init__(self, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_size: int) -> None:
        """Raises MemoryError or ValueError if there is no such amount of memory."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Of each layer, K then V; the last block is the spare one. zeros: the system hands out such pages
        # when they are first written, so an unused pool costs nothing.
        shape = (num_layers, 2, num_blocks + 1, num_kv_heads, block_size, head_size)
        self.array: NDArray[np.float32] = np.zeros(shape, np.float32)

    @property
    def spare_block(self) -> int:
        return self.num_blocks

    @property
    def nbytes(self) -> int:
        return self.array.nbytes

    def bind(self, session: ort.InferenceSession) -> list[ort.IOBinding]:
        """One binding, for every step: what a step writes lies where it reads."""
        import onnxruntime as ort

        binding = session.io_binding()
        for i in range(len(self.array)):
            for kind, array in zip("kv", self.layer(i), strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(array)
                binding.bind_ortvalue_input(f"{kind}.{i}", value)
                binding.bind_ortvalue_output(f"{kind}.{i}.after", value)
        return [binding]

    def layer(self, i: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """K and V of a layer, views with a head's vector at one slot per row: (-1, head_size)."""
        k, v = self.array[i].reshape(2, -1, self.array.shape[-1])
        return k, v

    def clear_ahead(self, packed: Packed) -> None:
        """Zero the slots behind each sequence's last position, if this step is the first in that block.

        An earlier step in the block has done so before, and only the sequence itself has written since.
        """
        for block, used in zip(*packed.entered_blocks(self.block_size), strict=True):
            self.array[:, :, block, :, used:] = 0
