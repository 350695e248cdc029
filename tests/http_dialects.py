"""What the tests of dialects share: a sequence as the engine would schedule it, and a stream read to its end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nanovllm.batch import Sampling, ScheduledSeq
from nanovllm.request import SamplingParams
from nanovllm_runner_http.dialects import Dialect, Exchange, Facts, Piece
from nanovllm_runner_http.options import HttpOptions
from nanovllm_runner_http.sse import Event
from nanovllm_runner_http.transport import Transport


def scheduled(
    ids: Sequence[int], params: SamplingParams, prompt: Any = None, index: int = 0, salt: str | None = None
) -> ScheduledSeq:
    """A new sequence; `prompt` is set where the runner tokenizes by itself."""
    context = np.array(ids, np.int32)
    stop_ids = frozenset(params.stop_token_ids)
    sampling = Sampling(params, (), stop_ids, params.seed or 0, index, params.temperature == 0)
    return ScheduledSeq(1, 0, context, len(context), 0, len(context), 1, np.empty(0, np.int32), sampling, prompt, salt)


def asked_of(
    dialect: Dialect, facts: Facts, params: SamplingParams, ids: Sequence[int] = (1, 2), prompt: Any = None,
    extra: Mapping[str, Any] = {}, index: int = 0, salt: str | None = None,
) -> Exchange:  # fmt: skip
    exchange = dialect.exchange(scheduled(ids, params, prompt, index, salt), facts, extra)
    json.dumps(exchange.body, allow_nan=False)  # it can be sent
    return exchange


def pieces(exchange: Exchange, *events: Any, kind: str = "message") -> list[Piece]:
    """What an exchange makes of its events, up to the last one that is looked at."""
    came: list[Piece] = []
    for event in events:
        piece = exchange.read(Event(kind, event if isinstance(event, str) else json.dumps(event)))
        if piece is not None:
            came.append(piece)
            if piece.finish is not None:
                break
    return came


def transport_to(url: str) -> Transport:
    """One that never waits."""
    return Transport(url, HttpOptions(url=url), pause=lambda call, seconds: None)
