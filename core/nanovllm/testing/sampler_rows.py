"""Rows for the sampler suite: one as the engine makes it, a crowd of every kind, one beside a border, one in words.

This file knows no sampler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..batch import FloatArray, SampleRow, Sampling
from ..request import SamplingParams

LAST = 1 - 2.0**-53  # the largest number that rng.uniforms gives
WIDE = 70_000  # tokens of a wide vocabulary: more than 16 bits count


def make_row(
    params: SamplingParams,
    uniform: float = 0.5,
    context: Sequence[int] = (0,),
    num_prompt: int = 1,
    mask: Sequence[bool] | None = None,
    stop_ids: Sequence[int] = (),
    target: int | None = None,
) -> SampleRow:
    """A row as the engine makes it; `target`: a prompt token to score."""
    is_greedy = params.temperature == 0 and params.changed() <= {"temperature"} and mask is None
    allowed = None if mask is None else np.array(mask, bool)
    sampling = Sampling(params, (), frozenset(stop_ids), 0, 0, is_greedy, allowed)
    ids = np.array(context, np.int32)
    ids.setflags(write=False)
    return SampleRow(sampling, ids, num_prompt, uniform, target)


def crowd() -> tuple[FloatArray, list[SampleRow]]:
    """Every kind of row, three numbers each, over a wide vocabulary whose logits tie: (R, WIDE), R rows."""
    rng = np.random.default_rng(0)
    context = rng.integers(0, WIDE, 50).tolist()
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.0}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.5},
        {"min_p": 0.05}, {"top_p": 0.999}, {"logprobs": 5}, {"temperature": 0.0, "presence_penalty": 1.0},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2, "logit_bias": {7: 9.0}},
    ]  # fmt: skip
    rows = [
        make_row(SamplingParams(**({"temperature": 0.7} | kind)), u, context, 10)
        for kind in kinds
        for u in (0.0123, 0.4567, 0.9876)
    ]
    return (rng.normal(size=(len(rows), WIDE)) * 3).round(1).astype(np.float32), rows


def moved(row: SampleRow, by: float, times: float) -> SampleRow:
    """The row with its number and its borders elsewhere, by a little."""
    params = row.sampling.params
    borders = replace(params, top_p=min(1.0, params.top_p * times), min_p=min(1.0, params.min_p * times))
    uniform = min(max(0.0, row.uniform + by), LAST)
    return row._replace(uniform=uniform, sampling=row.sampling._replace(params=borders))


def said(row: SampleRow) -> str:
    """The row in words: what is not at its default."""
    params = row.sampling.params
    named = ", ".join(f"{name}={getattr(params, name)!r}" for name in sorted(params.changed()))
    return f"a row with {named or 'temperature 1'}{' and a mask' if row.sampling.mask is not None else ''}"
