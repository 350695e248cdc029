"""`compose`: the works of a step as few runs, none of which was not proven. Knows no runtime."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .keeper import PastKeeper
from .probe import Proven
from .work import Work

# A run costs the reading of all weights, about what some more tokens cost. So padding is cheaper than another
# run if it is no more than so many tokens, or than a quarter of the others.
CHEAP_PADDING = 16


def compose(works: Sequence[Work], keeper: PastKeeper, proven: Proven, max_tokens: int | None) -> Iterator[list[Work]]:
    """Groups that are one run each, in the keeper's order. `max_tokens`: of a padded run, if it has several rows."""

    def key(work: Work) -> tuple[object, ...]:
        return ("" if proven.mixed else work.kind, *keeper.order(work))

    group: list[Work] = []
    for work in sorted(works, key=key):
        longer = [*group, work]
        if group and not (
            proven.allows(longer)
            and keeper.can_join(group, work)
            and _is_compact([keeper.columns(w) for w in longer], max_tokens)
        ):
            yield group
            longer = [work]
        group = longer
    if group:
        yield group


def _is_compact(columns: Sequence[int], max_tokens: int | None) -> bool:
    padded, real = len(columns) * max(columns), sum(columns)
    return padded - real <= max(CHEAP_PADDING, real // 4) and (max_tokens is None or padded <= max_tokens)
