"""`PastKeeper`: what a way of keeping the past between runs must do; and the ways in which any graph may be tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from .decoder import Decoder
from .grown import Grown
from .recomputed import Recomputed
from .work import Side, Work


class PastKeeper(Protocol):
    """Keeps what the lanes have computed. A work at start s goes on from the first s tokens of its lane."""

    def run(self, works: Sequence[Work], side: Side) -> None:
        """Compute the works, sorted by `order`, in one run of the graph; their logits go to `Work.out`.

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


def plain_ways(decoder: Decoder) -> dict[str, Way]:
    """By name, the best first. The last needs nothing from the graph but logits of a prompt."""
    ways = {"recomputed": Way(lambda lanes, max_len, *, dirty=False: Recomputed(decoder), copies=0)}
    if not decoder.past:
        return ways
    # The present, the past before it, and what that was packed from.
    grown = Way(lambda lanes, max_len, *, dirty=False: Grown(decoder, max_len, dirty=dirty), copies=3)
    return {"grown": grown, **ways}
