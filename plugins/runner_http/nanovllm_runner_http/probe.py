"""Which dialect a server speaks, and the facts of its model.

A server that is still loading its model says 503 and is waited for. This file knows no dialect's details.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from nanovllm.tokenizer import Tokenizer

from .dialects import Dialect, Facts
from .dialects.llamacpp import LlamaCpp
from .dialects.nanovllm import NanoVLLM
from .dialects.openai import OpenAI
from .errors import UpstreamError
from .transport import Transport

log = logging.getLogger("nanovllm.http")

PATIENCE = 300.0  # seconds for a server to load its model
PAUSE = 0.5  # seconds between two questions
ASKED = ("/info", "/props", "/v1/models", "/health")  # what the dialects look at, in their order


def probe(
    transport: Transport,
    dialect: str = "auto",
    tokenizer: Tokenizer | None = None,
    model: str | None = None,
    *,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> tuple[Dialect, Facts]:
    """The named dialect, or with `auto` the first that the server speaks, and what it says about its model.

    Raises UpstreamError if it cannot be asked or speaks none of them, and ConfigError if its vocabulary is not the
    tokenizer's or its model is not told.
    """
    # The most telling first: llama-server also speaks OpenAI's.
    known: list[Dialect] = [
        NanoVLLM(tokenizer, is_named=dialect == "nanovllm"),
        LlamaCpp(tokenizer, model),
        OpenAI(tokenizer, model),
    ]
    candidates = [d for d in known if dialect in ("auto", d.name)]
    deadline = clock() + patience
    while True:
        try:
            for candidate in candidates:
                facts = candidate.probe(transport)
                if facts is not None:
                    log.info("%s speaks %s: %s", transport.url, candidate.name, dict(facts.description))
                    return candidate, facts
        except UpstreamError as e:
            if e.status != 503 or clock() >= deadline:
                raise e if transport.url in e.message else e.at(transport.url) from None
            log.info("%s is not ready yet: %s", transport.url, e)
            sleep(PAUSE)
        else:
            break
    names = " or ".join(d.name for d in candidates)
    answers = ", ".join(f"{path}: {_answer(transport, path)}" for path in ASKED)
    raise UpstreamError(
        f"{transport.url} does not speak {names} (it answers {answers})",
        hint="check the address" + ("" if dialect == "auto" else ", or set runner.dialect: auto"),
    )


def _answer(transport: Transport, path: str) -> str:
    try:
        transport.get(path, retries=0)
    except UpstreamError as e:
        return "no JSON" if e.status is None else str(e.status)
    return "200, of another kind"
