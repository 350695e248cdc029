"""`TorchDecoder`: one run of somebody else's model, in the terms of its signature.

The caller squares off the tokens and gives the past; this file puts the rest on the device, in the types that the
model wants, and takes the answer apart: logits first (or under the key `logits`), then what it gives of the past.
Knows no lanes, and not where the model came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves, tree_unflatten

from nanovllm.batch import FloatArray
from nanovllm.errors import NanoVLLMError, RunnerDead, RunnerError
from nanovllm_models.lanes import NUMBER_TYPES, Index, Moves, Past, Square, are_logits

from ..device import memory_for, send
from .signature import Role, Signature


class TorchDecoder:
    def __init__(
        self, module: Callable[..., Any], signature: Signature, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`dtype`: of the model's numbers, most of them."""
        self.signature = signature
        self.past = signature.past
        self.dtypes = frozenset({p.dtype for p in signature.past} | ({name_of(dtype)} & set(NUMBER_TYPES)))
        self.takes_positions = signature.has("positions")
        self._module = module
        self._device = device

    def run(
        self, tokens: Square, seen: NDArray[np.bool_], before: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits, others = self.answer(tokens, seen, before)
        present = others[: len(self.past)]
        if len(present) < len(self.past):
            raise RunnerError(f"the graph takes {len(self.past)} tensors of a past and gives back {len(present)}")
        for p, tensor in zip(self.past, present, strict=True):
            p.check(tensor.shape, *seen.shape)
            if (given := name_of(tensor.dtype)) != p.dtype:
                raise RunnerError(f"the graph takes {p.past!r} as {p.dtype} and gives it back as {given}")
        return logits, present

    def run_fresh(self, tokens: Square) -> torch.Tensor:
        return self.answer(tokens, tokens.real, self.pack(len(tokens.ids), 0, 0.0, ()))[0]

    def answer(
        self, tokens: Square, seen: NDArray[np.bool_], before: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (B, S, vocab), or (B, 1, vocab) of the last column; all other tensors in order. Raises RunnerError."""
        batch, columns = tokens.ids.shape
        arrays: dict[Role, NDArray[Any]] = {"ids": tokens.ids, "mask": seen, "positions": tokens.positions}
        past = iter(before)
        leaves = [
            next(past) if i.role == "past" else
            i.value if i.role == "constant" else
            send(arrays[i.role], self._device).to(i.dtype)
            for i in self.signature.inputs
        ]  # fmt: skip
        args, kwargs = tree_unflatten(leaves, self.signature.arguments)
        with torch.inference_mode(), _errors_of(f"a run of {batch} x {columns} tokens"):
            found = self._module(*args, **kwargs)
        logits, others = _split(found)
        if logits is not None and logits.ndim == 2:
            logits = logits[:, None]
        if logits is None or not logits.is_floating_point() or not are_logits(logits.shape, tokens):
            got = "no tensor" if logits is None else f"{name_of(logits.dtype)} logits of shape {list(logits.shape)}"
            raise RunnerError(f"the graph answers a run of {batch} x {columns} tokens with {got}")
        return logits, others

    def fetch(self, logits: torch.Tensor, rows: Index, columns: Index) -> FloatArray:
        with torch.inference_mode(), _errors_of("the transfer of logits"):
            found: FloatArray = logits[self._index(rows), self._index(columns)].to("cpu", torch.float32).numpy()
        return found

    def pack(self, batch: int, time: int, fill: float, moves: Sequence[Moves]) -> list[torch.Tensor]:
        with torch.inference_mode(), _errors_of(f"packing the past of {batch} x {time} tokens"):
            tensors = [
                torch.full(p.shape(batch, time), fill, dtype=getattr(torch, p.dtype), device=self._device)
                for p in self.past
            ]
            for m in moves:
                source = self._index(m.from_rows), self._index(m.from_columns)
                target = self._index(m.to_rows), self._index(m.to_columns)
                for p, old, new in zip(self.past, m.tensors, tensors, strict=True):
                    _by_row(p, new)[target] = _by_row(p, old)[source]
        return tensors

    def _index(self, numbers: Index) -> torch.Tensor:
        return send(numbers, self._device)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_row(past: Past, tensor: torch.Tensor) -> torch.Tensor:
    """A view (batch, time, ...)."""
    return tensor.movedim((past.batch_axis, past.time_axis), (0, 1))


def _split(found: Any) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """Logits and the other tensors of an answer in any nesting."""
    if isinstance(found, Mapping) and isinstance(logits := found.get("logits"), torch.Tensor):
        found = [logits, *(value for name, value in found.items() if name != "logits")]
    tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    return (tensors[0] if tensors else None), tensors[1:]


@contextmanager
def _errors_of(what: str) -> Iterator[None]:
    """Whatever a model raises is a RunnerError, which ends the step; a GPU that failed once computes nothing more."""
    try:
        with memory_for(what, "lower cache.memory or scheduler.max_num_batched_tokens", RunnerError):
            yield
    except NanoVLLMError:
        raise
    except torch.AcceleratorError as e:
        raise RunnerDead(f"torch failed in {what}: {_reason(e)}", hint="start again") from e
    except Exception as e:  # a model can raise anything
        raise RunnerError(f"torch failed in {what}: {_reason(e)}") from e


def _reason(e: Exception) -> str:
    """The last line: TorchScript puts its own traceback before it."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(e).__name__:.300}"
