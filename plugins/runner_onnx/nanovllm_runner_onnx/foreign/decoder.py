"""`ForeignDecoder`: one run of somebody else's graph, in the terms of its signature.

The caller squares off the tokens and gives the past; this file binds the rest, in the types that the
graph wants, and fetches the logits. ONNX Runtime dies of a batch of none and of no tokens: neither is
ever sent. Knows no lanes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanovllm.batch import FloatArray
from nanovllm.errors import RunnerError
from nanovllm_models.lanes import Index, Moves, Past, Square, are_logits

from ..device_pool import ORT_NAMES
from ..session import SessionSettings
from .signature import Signature

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]


class ForeignDecoder:
    def __init__(self, session: ort.InferenceSession, signature: Signature, settings: SessionSettings) -> None:
        self.past = signature.past
        self.dtypes = frozenset({p.dtype for p in signature.past} | {signature.logits.dtype})
        self.takes_positions = signature.positions is not None
        self.device = ORT_NAMES[settings.device]
        self.device_id = int(settings.provider_options.get("device_id", 0))
        self._signature = signature
        self._session = session

    def run(
        self, tokens: Square, seen: NDArray[np.bool_], before: Sequence[ort.OrtValue]
    ) -> tuple[NDArray[Any], list[ort.OrtValue]]:
        binding = self.bind(tokens, seen, use_cache=seen.shape[1] > tokens.ids.shape[1])
        for p, tensor in zip(self.past, before, strict=True):
            binding.bind_ortvalue_input(p.past, tensor)
            binding.bind_output(p.present, self.device, self.device_id)
        logits = self.compute(binding, tokens)
        _, *present = binding.get_outputs()
        for p, tensor in zip(self.past, present, strict=True):
            p.check(tensor.shape(), *seen.shape)
        return logits, present

    def run_fresh(self, tokens: Square) -> NDArray[Any]:
        binding = self.bind(tokens, tokens.real, use_cache=False)
        for p in self.past:
            empty = np.empty(p.shape(len(tokens.ids), 0), np.dtype(p.dtype))
            binding.bind_ortvalue_input(p.past, self.value(empty))
        return self.compute(binding, tokens)

    def fetch(self, logits: NDArray[Any], rows: Index, columns: Index) -> FloatArray:
        return logits[rows, columns]

    def pack(self, batch: int, time: int, fill: float, moves: Sequence[Moves]) -> list[ort.OrtValue]:
        tensors = []
        for i, p in enumerate(self.past):
            packed = np.full(p.shape(batch, time), fill, np.dtype(p.dtype))
            for m in moves:
                array = _by_row(p, m.tensors[i].numpy())
                _by_row(p, packed)[m.to_rows, m.to_columns] = array[m.from_rows, m.from_columns]
            tensors.append(self.value(packed))
        return tensors

    def bind(self, tokens: Square, seen: NDArray[np.bool_], *, use_cache: bool) -> ort.IOBinding:
        """`seen` (B, past + S): the columns that hold tokens; `use_cache`: is there a past to look at?

        The first output is the logits. The past is still to be bound, and what is wanted of the present.
        """
        assert tokens.ids.size, "a run has at least one row and one column"
        s = self._signature
        binding = self._session.io_binding()
        arrays = [(s.ids, tokens.ids), (s.mask, seen), (s.positions, tokens.positions)]
        for value, array in arrays:
            if value is not None:
                binding.bind_cpu_input(value.name, np.ascontiguousarray(array, np.dtype(value.dtype)))
        if s.num_logits is not None:
            binding.bind_cpu_input(s.num_logits.name, np.zeros((), np.dtype(s.num_logits.dtype)))
        if s.use_cache is not None:
            binding.bind_cpu_input(s.use_cache, np.array([use_cache]))
        binding.bind_output(s.logits.name, "cpu")
        return binding

    def compute(self, binding: ort.IOBinding, tokens: Square) -> NDArray[Any]:
        """Logits (B, S, vocab), or (B, 1, vocab) of the last column. Raises RunnerError."""
        batch, columns = tokens.ids.shape
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
            reason = " ".join(str(e).split())
            raise RunnerError(f"ONNX Runtime failed in a run of {batch} x {columns} tokens: {reason}") from e
        logits: NDArray[Any] = binding.get_outputs()[0].numpy()
        if logits.ndim == 2:
            logits = logits[:, None]
        if not are_logits(logits.shape, tokens):
            raise RunnerError(
                f"the graph answers a run of {batch} x {columns} tokens with logits of shape {list(logits.shape)}"
            )
        return logits

    def value(self, array: NDArray[Any]) -> ort.OrtValue:
        """The array in the device's memory; on the CPU it is the same memory."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(array, self.device, self.device_id)


def _by_row(past: Past, array: NDArray[Any]) -> NDArray[Any]:
    """A view (batch, time, ...)."""
    return np.moveaxis(array, (past.batch_axis, past.time_axis), (0, 1))
