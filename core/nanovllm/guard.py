"""GuardedSampler: what the engine puts around a sampler. Keeps the time, and confines a failure to its row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from .batch import Sampled, SampleRow, TokenLogprob
from .runner import Sampler

log = logging.getLogger("nanovllm.engine")


class GuardedSampler:
    def __init__(self, sampler: Sampler, clock: Callable[[], float]) -> None:
        self.sampler = sampler
        self.seconds = 0.0  # spent since the engine last reset it
        self._clock = clock

    def sample(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        started = self._clock()
        try:
            return self.sampler.sample(logits, rows)
        except Exception:
            log.exception("the sampler raised; trying its rows one by one")
            return self._one_by_one(logits, rows)
        finally:
            self.seconds += self._clock() - started

    def _one_by_one(self, logits: Any, rows: Sequence[SampleRow]) -> Sampled:
        ids: list[int] = []
        logprobs: list[TokenLogprob | None] = []
        errors: dict[int, str] = {}
        for i, row in enumerate(rows):
            try:
                one = self.sampler.sample(logits[i : i + 1], [row])
            except Exception as e:
                one = Sampled([0], None, {0: f"the sampler failed: {type(e).__name__}: {e}"})
            ids.append(int(one.ids[0]))
            logprobs.append(None if one.logprobs is None else one.logprobs[0])
            if 0 in one.errors:
                errors[i] = one.errors[0]
        return Sampled(ids, logprobs, errors)
