"""Writing to stdout so that no encoding stops an answer: what it cannot carry becomes `?`."""

from __future__ import annotations

import sys
from typing import NamedTuple


class Marks(NamedTuple):
    """The ornaments of a report."""

    done: str
    rule: str  # one character of a ruled line


def marks() -> Marks:
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return Marks("✓", "═") if is_utf8 else Marks("*", "=")


def echo(text: str = "", end: str = "\n") -> None:
    """Print, replacing what stdout's encoding does not have, and lone surrogates, by `?`."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write((text + end).encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
