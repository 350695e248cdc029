"""Recorder: a sampler around the one of a configuration, which keeps every row of logits that a token is drawn from.

So what is compared is what the engine drew from, in its batches and with its caches, and nothing is computed twice.
Rows go to a temporary file, as float32: 4 bytes times vocabulary times tokens. Knows no runner and no engine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..batch import FloatArray, Sampled, SampleRow
from ..runner import Sampler


class Drawn(NamedTuple):
    """What one token was drawn from."""

    logits: FloatArray  # (vocab,) float32
    row: SampleRow  # what else the sampler knew


class Recorder:
    """Prompts are told apart by their seeds: prompt i has the seed `first_seed + i`, modulo 2**64."""

    def __init__(self, sampler: Sampler, first_seed: int) -> None:
        self._sampler = sampler
        self._first_seed = first_seed
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._places: dict[tuple[int, int], tuple[int, int, SampleRow]] = {}  # (prompt, token) -> offset, vocab, row
        self.is_recording = True

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        if self.is_recording:
            for i, row in enumerate(rows):
                if row.target is None:
                    self._keep(logits[i], row)
        return self._sampler.sample(logits, rows)

    def drawn(self, prompt: int, token: int) -> Drawn | None:
        """Of the answer's `token`-th token, from 0; None if it never came to that."""
        place = self._places.get((prompt, token))
        if place is None:
            return None
        offset, vocab, row = place
        self._file.seek(offset)
        return Drawn(np.frombuffer(self._file.read(4 * vocab), np.float32), row)

    def close(self) -> None:
        self._file.close()

    def _keep(self, logits: Any, row: SampleRow) -> None:
        # A row may be of any array type, on any device; a list of numbers is what all of them can give.
        numbers = np.asarray(logits if isinstance(logits, np.ndarray) else logits.tolist(), np.float32)
        key = (row.sampling.seed - self._first_seed) % 2**64, len(row.context) - row.num_prompt
        offset = self._file.seek(0, 2)
        self._file.write(numbers.tobytes())
        self._places[key] = offset, len(numbers), row  # its context is a view of what is only ever added to
