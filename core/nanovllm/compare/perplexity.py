"""How well a configuration predicts a text: for backends whose weights are rounded, where tokens may well differ.

The text is cut into windows of WINDOW tokens, each computed from a fresh start behind whatever the tokenizer puts
before every text (BOS, or nothing). The first token of a window without such a beginning has nothing before it and
is not scored. Perplexity is exp of the mean of -log p over the scored tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..engine import Engine
from ..errors import NanoVLLMError, RequestError
from ..request import Completion, Request, SamplingParams
from .encode import telling

WINDOW = 256  # tokens
FEWEST = 16  # scored tokens; of fewer, chance is larger than any difference


@dataclass(frozen=True, slots=True)
class Perplexity:
    ids: tuple[int, ...]  # of the whole text
    logprobs: NDArray[np.float64]  # (T,) natural, of the scored tokens in order
    num_bytes: int  # that the scored tokens stand for

    @property
    def value(self) -> float:
        return _exp(-float(self.logprobs.mean()))

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable between tokenizers; None where the tokens stand for no bytes at all."""
        return -float(self.logprobs.sum()) / math.log(2) / self.num_bytes if self.num_bytes else None


class Increase(NamedTuple):
    """How much worse than the reference, over the same tokens."""

    ratio: float  # of the perplexities, minus 1
    error: float  # its standard error: tokens taken as independent


def increase(reference: Perplexity, other: Perplexity) -> Increase | None:
    """None where the tokens are not the same: a perplexity per token then means two things."""
    if reference.ids != other.ids:
        return None
    differences = reference.logprobs - other.logprobs  # (T,) positive where the other one is worse
    ratio = _exp(float(differences.mean()))
    return Increase(ratio - 1, ratio * float(differences.std(ddof=1)) / math.sqrt(len(differences)))


def measure(engine: Engine, text: str) -> tuple[Perplexity | None, str | None]:
    """The perplexity, or why this configuration has none. Raises RequestError for a text that is too short."""
    tokenizer = engine.tokenizer
    if tokenizer is None or engine.info.tokenizes or "prompt_logprobs" not in engine.info.supports:
        return None, "its runner does not score prompts"
    if engine.max_len <= WINDOW:
        return None, f"its sequences hold {engine.max_len} tokens, and a window has {WINDOW}"
    logprobs: list[float] = []
    try:
        with telling():
            ids, empty = tokenizer.encode(text), tokenizer.encode("")
            sizes = {token: len(tokenizer.token_bytes(token)) for token in set(ids)}  # bytes
        before = _common(empty, ids)
        size, first = WINDOW - len(before), len(before) or 1
        body = ids[len(before) :]
        windows = [(*before, *body[i : i + size]) for i in range(0, len(body), size)]
        for window in windows:
            if len(window) > first:
                logprobs += _scored(engine, window)[first:]
    except NanoVLLMError as e:
        return None, str(e)
    if len(logprobs) < FEWEST:
        raise RequestError(
            f"the text has {len(ids)} tokens, which is too short for a perplexity",
            hint=f"give one of which {FEWEST} tokens or more can be scored",
        )
    if not np.isfinite(logprobs).all():
        return None, "its logits give a token of the text no probability"
    num_bytes = sum(sizes[token] for window in windows for token in window[first:])
    return Perplexity(tuple(ids), np.array(logprobs), num_bytes), None


def _exp(number: float) -> float:
    """A text may be too unlikely for a float."""
    return math.exp(number) if number < 700 else math.inf


def _common(beginning: list[int], ids: list[int]) -> list[int]:
    """As much of `beginning` as `ids` begin with: a tokenizer may also put something behind a text."""
    num = next((i for i, (a, b) in enumerate(zip(beginning, ids, strict=False)) if a != b), len(beginning))
    return ids[:num]


def _scored(engine: Engine, window: tuple[int, ...]) -> list[float]:
    """The log-probability of every token but the first, which gets NaN. Raises RequestError."""
    ticket = engine.add(Request(prompt=window, params=SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)))
    done: Completion | None = None
    while done is None:
        done = next((delta.output for delta in engine.step() if delta.output is not None), None)
    scored = ticket.output([done]).prompt_logprobs
    if done.error is not None or scored is None:
        raise RequestError(done.error or "its runner returned no log-probabilities of the prompt")
    return [math.nan if score is None else score.logprob for score in scored]
