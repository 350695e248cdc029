"""One check in a process of its own: whatever becomes of that process, what is handed back are findings.

What crosses is described in child.py. Knows no check.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict

from ..child import Ended, run_child
from ..config import leaves
from ..plugins import Found, in_words
from .case import Case
from .finding import Finding


def examine_apart(found: Found, case: Case, timeout: float) -> Iterator[Finding]:
    """The check's findings, and one more each if it took over `timeout` seconds, died, or wrote to stdout."""
    overrides = None if case.loaded is None else dict(leaves(case.loaded.config))
    try:
        ended = run_child("nanovllm.doctor.child", {"found": asdict(found), "overrides": overrides}, timeout)
    except OSError as e:
        yield Finding(
            "error", f"no process could be started for it: {in_words(e)}",
            "free some space, or set TMPDIR to a directory that can be written",
        )  # fmt: skip
        return
    is_whole = False  # it came to its end
    for line in ended.report.splitlines():
        with suppress(ValueError):  # it was stopped within a line
            told = json.loads(line)
            is_whole = told is None
            if told is not None:
                yield Finding(**told)
    if words := ended.stdout[:200].split():
        yield Finding(
            "warning", f"its check printed {' '.join(words)!r:.60} to stdout, which is not its own",
            f"tell the authors of {found.distribution}: the output of programs would be mixed up with it",
        )  # fmt: skip
    if ended.status or not is_whole:
        yield Finding("error", f"it {ended.in_words(timeout)}", _fix(ended, found.distribution))


def _fix(ended: Ended, distribution: str) -> str:
    if ended.status is None:
        return "if it is only slow, give it longer: --timeout"
    if ended.status == -9:
        return "the system does that when memory runs out: --set cache.memory=SIZE, or a smaller model"
    return f"repair it with: pip install --force-reinstall {distribution}"
