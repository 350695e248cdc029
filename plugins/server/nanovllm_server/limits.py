"""Limits: how much one call of `runner-serve` may bring, and how much is kept for it. Knows no route."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_body_bytes: int = 32 << 20
    body_seconds: float = 30.0  # for a body to arrive
    max_sequences: int = 1024  # in one call
    max_held: int = 4096  # sequences that are kept between calls; beyond that the one unused for longest goes
    max_text_chars: int = 1 << 20  # to tokenize
    max_ids: int = 1 << 18  # to detokenize
    idle_seconds: float = 60.0  # that a sequence is kept without being asked for
    max_wait: float = 1.0  # seconds that a step waits for a first token before it says that none is there yet
