"""Writing for people: to stdout so that no encoding stops an answer, and what is logged as sentences."""

from __future__ import annotations

import logging
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


def printable(text: str) -> str:
    """What steers a terminal shown as an escape: for names and texts from files of strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Sentences(logging.Formatter):
    """The message and what was raised, without the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        from ..plugins import in_words

        message, raised = record.getMessage(), record.exc_info and record.exc_info[1]
        return message if not raised or str(raised) in message else f"{message}: {in_words(raised)}"


def log_sentences(*, with_tracebacks: bool) -> None:
    """What goes to stderr where nobody has configured logging."""
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(None if with_tracebacks else Sentences())
