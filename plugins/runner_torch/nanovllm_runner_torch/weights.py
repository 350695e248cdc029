"""`Weights`: from the mapped files to the device, band by band, so that loading needs little beside the result.

The only place where a canonical name becomes a torch tensor. Several linear modules of one input become
one product, their outputs side by side. Knows no forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanovllm_models import Tensor as FileTensor

from .linear import FloatLinear, Int8Linear, Linear, quantised

BAND = 1024  # rows that are widened to float32 at once


@dataclass
class Weights:
    files: Mapping[str, FileTensor]  # by canonical name
    dtype: torch.dtype
    device: torch.device
    is_int8: bool  # of linear weights
    nbytes: int = field(default=0, init=False)  # of all that was handed out

    def vector(self, name: str) -> Tensor:
        """A norm's weight or a bias, (n,) float32."""
        found = torch.from_numpy(self.files[name].to_float32()).to(self.device)
        self.nbytes += found.nbytes
        return found

    def table(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A matrix as it is in the file, (rows, width): an embedding in the compute type, or in `dtype`."""
        found = torch.empty(self.files[name].shape, dtype=dtype or self.dtype, device=self.device)
        for first, band in self._bands(name):
            found[first : first + len(band)] = band
        self.nbytes += found.nbytes
        return found

    def linear(self, *names: str, weight: str | None = None, order: Tensor | None = None) -> Linear:
        """The modules `names` as one. `weight`: the weight's name if it is not the (only) module's own.

        `order` (rows,): output i of the modules, counted through, becomes output order[i].
        """
        sources = [weight] if weight is not None else [f"{name}.weight" for name in names]
        shapes = [self.files[source].shape for source in sources]
        num_rows, width = sum(shape[0] for shape in shapes), shapes[0][1]
        order = torch.arange(num_rows) if order is None else order
        dtype = torch.int8 if self.is_int8 else self.dtype
        held = torch.empty((num_rows, width), dtype=dtype, device=self.device)
        scales = torch.empty(num_rows, dtype=torch.float32)
        start = 0
        for source, shape in zip(sources, shapes, strict=True):
            for first, band in self._bands(source):
                to = order[start + first : start + first + len(band)]
                if self.is_int8:
                    band, scales[to] = quantised(band)
                held[to.to(self.device)] = band.to(held)
            start += shape[0]
        bias = self._bias(names, order)
        made = Int8Linear(held, scales, bias) if self.is_int8 else FloatLinear(held, bias)
        self.nbytes += made.nbytes
        return made

    def _bias(self, names: tuple[str, ...], order: Tensor) -> Tensor | None:
        parts = [self.vector(f"{name}.bias") for name in names if f"{name}.bias" in self.files]
        if not parts:
            return None
        bias = torch.empty(len(order), dtype=torch.float32 if self.is_int8 else self.dtype, device=self.device)
        bias[order.to(self.device)] = torch.cat(parts).to(bias)
        return bias

    def _bands(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows float32 on the CPU) of a matrix."""
        for first, band in self.files[name].bands(BAND):
            yield first, torch.from_numpy(band)
