"""`DevicePool`: the memory of all layers' keys and values on a device. The CPU's is in `kv_pool.py`."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.batch import Packed

from .options import Device

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

ORT_NAMES: dict[Device, str] = {"cpu": "cpu", "cuda": "cuda", "directml": "dml"}  # of a device's memory


class DevicePool:
    """On CUDA a step writes in place: PagedAttention insists on it. On DirectML a scattered write into
    the memory that it reads is nowhere promised, so every step writes the whole pool into a second copy, and the
    two take turns."""

    def __init__(
        self, device: Device, device_id: int, dtype: type[np.floating[Any]],
        num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_size: int,
    ) -> None:  # fmt: skip
        import onnxruntime as ort

        self.num_blocks, self.block_size = num_blocks, block_size
        blocks = num_blocks + 1  # the last one is the spare one: zero for good
        if device == "cuda":
            shape, copies = (blocks, block_size, num_kv_heads, head_size), 1
        else:
            shape, copies = (blocks * num_kv_heads * block_size, head_size), 2
        names = [f"{kind}.{layer}" for layer in range(num_layers) for kind in "kv"]
        self.nbytes = copies * len(names) * prod(shape) * np.dtype(dtype).itemsize
        value_of, zeros = ort.OrtValue.ortvalue_from_numpy, np.zeros(shape, dtype)
        self._copies = [{name: value_of(zeros, ORT_NAMES[device], device_id) for name in names} for _ in range(copies)]

    @property
    def spare_block(self) -> int:
        return self.num_blocks

    def bind(self, session: ort.InferenceSession) -> list[Any]:
        """Bindings for the steps, to be used in turns."""
        bindings = []
        for i, source in enumerate(self._copies):
            target = self._copies[(i + 1) % len(self._copies)]
            binding = session.io_binding()
            for name in source:
                binding.bind_ortvalue_input(name, source[name])
                binding.bind_ortvalue_output(f"{name}.after", target[name])
            bindings.append(binding)
        return bindings

    def clear_ahead(self, packed: Packed) -> None:
        """Nothing: the graphs of these devices multiply nothing that lies behind the end of a sequence."""
