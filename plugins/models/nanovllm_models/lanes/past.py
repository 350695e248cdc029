"""`Past`: a tensor that a run takes and gives back longer. Knows no runtime: types are names, shapes are lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from nanovllm.errors import RunnerError


class NumberType(NamedTuple):
    num_bytes: int
    rounding: float  # how far logits may be off, relative to their range: far below what a mistake does


NUMBER_TYPES = {
    "float32": NumberType(4, 1e-3),
    "float16": NumberType(2, 1e-2),
    "bfloat16": NumberType(2, 5e-2),
}
# Part of an input's name -> what a graph with such an input is.
REFUSED_INPUTS = {
    "embeds": "computes from embeddings, not from token ids",
    "pixel": "wants images",
    "image": "wants images",
    "audio": "wants sound",
    "encoder": "is half of an encoder-decoder model",
    "conv": "keeps states of convolutions, which cannot be padded",
    "state": "keeps recurrent states, which cannot be padded",
    "block_table": "is a paged graph of another engine",
}


@dataclass(frozen=True, slots=True)
class Past:
    """Keys, values, or both, of one layer."""

    past: str  # the input
    present: str  # the output
    dtype: str  # one of NUMBER_TYPES
    sizes: tuple[int, ...]  # of the input, for one sequence of one token
    batch_axis: int
    time_axis: int

    def shape(self, batch: int, time: int) -> list[int]:
        """For that many sequences and tokens."""
        shape = list(self.sizes)
        shape[self.batch_axis], shape[self.time_axis] = batch, time
        return shape

    def check(self, found: Sequence[int], batch: int, time: int) -> None:
        """Raises RunnerError if that is not the shape of the present of so many sequences and tokens."""
        if list(found) != (wanted := self.shape(batch, time)):
            raise RunnerError(f"the graph gives {self.present!r} the shape {list(found)} where {wanted} is due")

    @property
    def token_bytes(self) -> int:
        return prod(self.sizes) * NUMBER_TYPES[self.dtype].num_bytes
