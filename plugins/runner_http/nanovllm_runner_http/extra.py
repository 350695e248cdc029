"""The `extra:` section of the runner: what may go to a server besides the sampling parameters.

Only fields that a dialect lets through, and no negative whole number in any of them: servers have taken one for a
size (llama-server's n_discard, CVE-2026-21869). This file knows no field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from nanovllm.errors import ConfigError

from .dialects import Dialect

MAX_CHARS = 1 << 20  # of a field as JSON: it goes out with every request
SCHEMAS = frozenset(["json_schema", "response_format", "guided_json", "structured_outputs"])  # data, not settings


def check_extra(dialect: Dialect, extra: Mapping[str, Any]) -> None:
    """Raises ConfigError that names the first bad field."""
    for name, value in extra.items():
        if name not in dialect.extra_fields:
            near = get_close_matches(name, dialect.extra_fields, 1)
            allowed = ", ".join(sorted(dialect.extra_fields)) or "none"
            raise ConfigError(
                f"runner.extra: dialect {dialect.name} does not let {name!r} through",
                hint=f"did you mean {near[0]!r}?" if near else f"it takes {allowed}",
            )
        try:
            text = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise ConfigError(f"runner.extra.{name} cannot be said in JSON: {e}") from None
        if len(text) > MAX_CHARS:
            raise ConfigError(f"runner.extra.{name} has {len(text)} characters as JSON, {MAX_CHARS} are allowed")
        if name not in SCHEMAS and _has_negative(value):
            raise ConfigError(f"runner.extra.{name} holds a negative whole number, which no dialect lets through")


def _has_negative(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_negative, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_has_negative, value))
    return type(value) is int and value < 0
