"""`PastKeeper`: what a way of keeping the past between runs must do; and which ways a graph may be tried in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol

from ..onnx_file import Header
from .decoder import ForeignDecoder
from .grown import Grown
from .recomputed import Recomputed
from .shared_rows import SharedRows
from .work import Side, Work

log = logging.getLogger(__name__)


class PastKeeper(Protocol):
    """Keeps what the lanes have computed. A work at start s goes on from the first s tokens of its lane."""

    def run(self, works: Sequence[Work], side: Side) -> None:
        """Compute the works, sorted by `order`, in one run of the session; their logits go to `Work.out`.

        `side`: where new tokens are padded. Raises RunnerError; these lanes are then to be dropped.
        """

    def drop(self, lane: int) -> None:
        """Forget what the lane holds, if anything."""

    def columns(self, work: Work) -> int:
        """How many tokens the work brings into a run."""

    def order(self, work: Work) -> tuple[int, ...]:
        """Works that go well together are neighbours in this order."""

    def can_join(self, group: Sequence[Work], work: Work) -> bool:
        """May the work follow the group's last in one run?"""


class MakeKeeper(Protocol):
    def __call__(self, lanes: int, max_len: int, /, *, dirty: bool = False) -> PastKeeper:
        """`dirty`: what must not be read holds what would show. Raises MemoryError or ValueError."""


class Way(NamedTuple):
    make: MakeKeeper
    copies: int  # of all the lanes hold, at most, in memory at a time; 0 = no past is kept
    alone: bool = False  # no two sequences may be in one run, whatever short ones show


def ways_of(decoder: ForeignDecoder, header: Header, max_model_len: int | None) -> dict[str, Way]:
    """By name, the best first. The last needs nothing from the graph but logits of a prompt.

    `max_model_len`: tokens of a sequence at most, None = unknown. A graph that computes long ones in another branch
    gives what a sequence has alone only without past and company.
    """
    past, found = decoder.signature.past, dict[str, Way]()
    recomputed = Way(lambda lanes, max_len, *, dirty=False: Recomputed(decoder), copies=0)
    if header.same_until is not None and (max_model_len is None or max_model_len > header.same_until):
        log.warning(
            "the graph branches by length: every token is computed from the beginning of its sequence, and alone%s",
            f"; a max_model_len of {header.same_until} or less avoids that" if header.same_until else "",
        )
        return {"recomputed": recomputed._replace(alone=True)}
    has_rows = all(p.batch_axis == 0 for p in past) and decoder.device != "dml"
    if past and has_rows and "GroupQueryAttention" in header.op_types:
        found["shared rows"] = Way(partial(SharedRows, decoder), copies=1)
    if past:  # the present, the past before it, and what that was packed from
        found["grown"] = Way(lambda lanes, max_len, *, dirty=False: Grown(decoder, max_len, dirty=dirty), copies=3)
    found["recomputed"] = recomputed
    return found
