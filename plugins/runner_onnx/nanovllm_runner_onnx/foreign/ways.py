"""`ways_of`: which ways of keeping the past a graph may be tried in. Which of them is right, the probe finds out."""

from __future__ import annotations

import logging
from functools import partial

from nanovllm_models.lanes import Way, plain_ways

from ..onnx_file import Header
from .decoder import ForeignDecoder
from .shared_rows import SharedRows

log = logging.getLogger(__name__)


def ways_of(decoder: ForeignDecoder, header: Header, max_model_len: int | None) -> dict[str, Way]:
    """By name, the best first. `max_model_len`: tokens of a sequence at most, None = unknown.

    A graph that computes long sequences in another branch gives what each has alone only without past and company.
    """
    plain = plain_ways(decoder)
    if header.same_until is not None and (max_model_len is None or max_model_len > header.same_until):
        log.warning(
            "the graph branches by length: every token is computed from the beginning of its sequence, and alone%s",
            f"; a max_model_len of {header.same_until} or less avoids that" if header.same_until else "",
        )
        return {"recomputed": plain["recomputed"]._replace(alone=True)}
    has_rows = all(p.batch_axis == 0 for p in decoder.past) and decoder.device != "dml"
    if decoder.past and has_rows and "GroupQueryAttention" in header.op_types:
        return {"shared rows": Way(partial(SharedRows, decoder), copies=1), **plain}
    return plain
