"""The child's end of apart.py: runs one check and writes its findings into a file as they come, a line of JSON each.

    stdin   {"found": {...a plugins.Found}, "overrides": {dotted key: value} | null}
    file    {"level": ..., "text": ..., "fix": ...}, and null at the end

Stdout and stderr are the check's own; a crash leaves its place on stderr.
"""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

from ..config import load
from ..loader import load_object
from ..plugins import Found
from .case import Case, ask
from .finding import Finding

MAX_FINDINGS = 100  # of one check; nobody reads more


def main(report: Path) -> None:
    faulthandler.enable()
    request = json.load(sys.stdin)
    found, overrides = Found(**request["found"]), request["overrides"]

    def examine(case: Case) -> Iterator[Finding]:
        check: Callable[[Case], Iterator[Finding]] = load_object(found)  # type: ignore[assignment]
        return check(case)

    case = Case(None if overrides is None else load(overrides=overrides, environ={}))
    with report.open("w", encoding="utf-8") as out:
        findings = ask(examine, case, found.distribution)
        for finding in islice(findings, MAX_FINDINGS):
            print(json.dumps(asdict(finding)), file=out, flush=True)
        if next(findings, None) is not None:
            more = Finding("warning", f"its check finds more than these {MAX_FINDINGS}, which is where it was stopped")
            print(json.dumps(asdict(more)), file=out)
        print("null", file=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
