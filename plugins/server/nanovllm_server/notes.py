"""Notes on the call that runs here, for the line that is logged when it is over. Knows nothing else."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

call_facts: ContextVar[dict[str, Any] | None] = ContextVar("nanovllm_call", default=None)


def note(**facts: Any) -> None:
    """Nothing outside of a call."""
    call = call_facts.get()
    if call is not None:
        call.update(facts)
