"""`probe`: which runs of a graph give every sequence the logits that it has alone. Found out once, at load.

Nothing about a graph is believed. A mask on the wrong side raises no error, it only gives other numbers; some
graphs compute one token at a time but not several, some ignore positions, some mix the rows of a batch. So four
short texts are computed alone, from the beginning, and then again in every way that a step could be composed
of, through the very code that will compose them. What raises an error, or gives other logits, is not used:
with nothing proven, rows run alone, prompts in one run; without a past that works, all is recomputed.

Memory that must not be read holds large numbers or NaN meanwhile, so that a mistake shows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nanovllm.batch import FloatArray, IntArray
from nanovllm.errors import ModelError, RunnerError

from .decoder import Decoder
from .keeper import MakeKeeper, Way
from .past import NUMBER_TYPES
from .recomputed import Recomputed
from .work import Side, Work, square

log = logging.getLogger(__name__)

LENGTHS = (9, 5, 6, 8)  # of the texts; text i is computed in lane i
# Graphs that quantise activations with one scale for all tokens of a run compute something else in every run.
# Their own past is good enough if it is off by less than this part of what no past at all would do.
COARSE = 0.1

# A trial is a list of runs, and a run the (lane, stop) of each of its works.
Trial = list[list[tuple[int, int]]]
BEGINNINGS: Trial = [[(0, 5)], [(1, 1)], [(2, 2)], [(3, 4)]]
RESUME: Trial = [[(0, 5)], [(0, 6)], [(0, 7)]]
CHUNK: Trial = [[(0, 3)], [(0, 6)], [(0, 7)]]
# In company, the same again, one joins, two leave, and the one that was skipped in between.
DECODES: Trial = [
    *BEGINNINGS,
    *([(0, 6), (1, 2), (3, 5)], [(0, 7), (1, 3), (3, 6)]),
    *([(0, 8), (1, 4), (2, 3), (3, 7)], [(1, 5), (3, 8)], [(2, 4)]),
]
# What follows in the next three is alone, and shows whether the past of each is right.
PROMPTS: Trial = [[(0, 5), (1, 1), (2, 2), (3, 4)], [(0, 6)], [(1, 2)], [(2, 3)], [(3, 5)]]
CHUNKS: Trial = [*BEGINNINGS, [(0, 7), (1, 4), (3, 6)], [(0, 8)], [(1, 5)], [(3, 7)]]
# A chunk, a decode and two prompts, of which one is the longest.
MIXED: Trial = [[(0, 5)], [(1, 1)], [(0, 8), (1, 2), (2, 2), (3, 4)], [(0, 9)], [(1, 3)], [(2, 3)], [(3, 5)]]
TOGETHER = {"decodes": DECODES, "prompts": PROMPTS, "chunks": CHUNKS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Proven:
    """What the graph was seen to do."""

    vocab_size: int
    all_positions: bool  # are there logits of every token, or of the last only?
    past: str  # the way it is kept, of `ways`
    side: Side  # where new tokens are padded
    chunk: bool = False  # several tokens on top of a past
    # Several sequences of different lengths in one run:
    decodes: bool = False  # one token each
    prompts: bool = False  # from the beginning
    chunks: bool = False  # several tokens each on top of a past
    mixed: bool = False  # all of these at once

    def allows(self, group: Sequence[Work]) -> bool:
        """May these be one run?"""
        kinds = {work.kind for work in group}
        return len(group) == 1 or self.mixed or (len(kinds) == 1 and getattr(self, f"{kinds.pop()}s"))

    @property
    def facts(self) -> dict[str, object]:
        """For people."""
        together = [name for name in (*TOGETHER, "mixed") if getattr(self, name)]
        return {"past": self.past, "chunked_prefill": self.chunk, "batches": together, "padding": self.side}


def probe(decoder: Decoder, ways: Mapping[str, Way]) -> Proven:
    """`ways` in the order in which they are preferred. Raises ModelError if not even a prompt can be computed."""
    bench = _Bench(decoder)
    for name, (make, _, alone) in ways.items():
        if not bench.keeps_a_past(make):
            log.warning("the graph's past cannot be kept as %s: its logits are not those from the beginning", name)
            continue
        # Right first: padding there sees its own sequence, on the left it may see nothing, which is NaN in some graphs.
        side: Side = "right"
        together = {} if alone else bench.together(make, side)
        if not all(together.values()):
            on_the_left = bench.together(make, "left")
            if sum(on_the_left.values()) > sum(together.values()):
                side, together = "left", on_the_left
        return Proven(
            vocab_size=bench.vocab_size,
            all_positions=bench.all_positions,
            past=name,
            side=side,
            chunk=bench.error(make, CHUNK, side) <= bench.rounding,
            **together,
        )
    raise ModelError("the graph gives another answer every time it is asked", hint="export it again")


class _Bench:
    """The texts, and their logits alone."""

    def __init__(self, decoder: Decoder) -> None:
        self.vocab_size, self.all_positions = look(decoder)
        self.rounding = max(NUMBER_TYPES[dtype].rounding for dtype in decoder.dtypes)
        rng = np.random.default_rng(0)
        self._texts: list[IntArray] = [rng.integers(0, self.vocab_size, n, np.int32) for n in LENGTHS]
        self._alone = [self._logits(Recomputed(decoder), text) for text in self._texts]
        # What is computed in RESUME, as it would be if the past were not looked at.
        ignored = [self._logits(Recomputed(decoder), self._texts[0][n - 1 : n])[0] for n in (6, 7)]
        self._mistake = max(_difference(row, self._alone[0][n - 1]) for row, n in zip(ignored, (6, 7), strict=True))

    def _logits(self, keeper: Recomputed, text: IntArray) -> FloatArray:
        """(length, vocab) of one text alone, each from the beginning."""
        logits = np.empty((len(text), self.vocab_size), np.float32)
        try:
            if self.all_positions:
                keeper.run([Work(0, text, 0, logits)], "right")
            else:
                for i in range(len(text)):
                    keeper.run([Work(0, text[: i + 1], 0, logits[i : i + 1])], "right")
        except RunnerError as e:
            raise _no_prompt(len(text), e) from e
        if not np.isfinite(logits).all():
            raise ModelError("the graph's logits are not finite", hint="export it again, or in float32")
        return logits

    def keeps_a_past(self, make: MakeKeeper) -> bool:
        error = self.error(make, RESUME, "right")
        return error <= self.rounding or error <= COARSE * self._mistake

    def together(self, make: MakeKeeper, side: Side) -> dict[str, bool]:
        """Which kinds of several sequences in one run are right."""
        right = {kind: self.error(make, trial, side) <= self.rounding for kind, trial in TOGETHER.items()}
        return right | {"mixed": all(right.values()) and self.error(make, MIXED, side) <= self.rounding}

    def error(self, make: MakeKeeper, trial: Trial, side: Side) -> float:
        """The largest difference from the logits alone, relative to their range; infinite if a run fails."""
        keeper = make(len(LENGTHS), max(LENGTHS), dirty=True)
        done = [0] * len(LENGTHS)
        worst = 0.0
        for run in trial:
            works = [
                Work(i, self._texts[i][done[i] : stop], done[i], np.empty((1, self.vocab_size), np.float32))
                for i, stop in run
            ]
            try:
                keeper.run(sorted(works, key=keeper.order), side)
            except RunnerError as e:
                log.debug("%s", e)
                return np.inf
            for work in works:
                worst = max(worst, _difference(work.out[0], self._alone[work.lane][work.stop - 1]))
                done[work.lane] = work.stop
        return worst


def look(decoder: Decoder) -> tuple[int, bool]:
    """Vocabulary, and whether every token has logits."""
    text = np.arange(LENGTHS[0], dtype=np.int32) % 2
    tokens = square([text], [0], "right")
    try:
        logits = decoder.run_fresh(tokens)
    except RunnerError as e:
        raise _no_prompt(len(text), e) from e
    return logits.shape[2], logits.shape[1] == len(text)


def _difference(logits: FloatArray, wanted: FloatArray) -> float:
    """Both (vocab,); infinite where `logits` are not finite."""
    difference = float(np.abs(logits - wanted).max() / max(float(np.ptp(wanted)), 1e-12))
    return difference if np.isfinite(difference) else np.inf


def _no_prompt(length: int, e: RunnerError) -> ModelError:
    return ModelError(
        f"the graph cannot compute a prompt of {length} tokens without a past: {e.message}",
        hint="export it with dynamic lengths, and so that it takes an empty past",
    )
