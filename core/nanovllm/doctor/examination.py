"""Every check in turn. Those that only read metadata and the system run here, all others in a child each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

from .. import __version__
from ..errors import without_secrets
from ..plugins import Found, discover
from . import advisories, distributions, environment, machine
from .apart import examine_apart
from .case import Case, ask
from .finding import Finding

HERE: dict[str, Callable[[Case], Iterator[Finding]]] = {
    "machine": machine.examine,
    "distributions": distributions.examine,
    "advisories": advisories.examine,
    "environment": environment.examine,
}
ENGINE = Found("doctors", "engine", "nanovllm", __version__, "nanovllm.doctor.engine:examine")


class Remark(NamedTuple):
    """A finding, and whose it is."""

    subject: str  # the check's name
    finding: Finding


def examine_all(
    case: Case, timeout: float, waiting: Callable[[str], AbstractContextManager[object]]
) -> Iterator[Remark]:
    """`timeout`: seconds for each check; `waiting(subject)` is entered while one runs in its child."""
    for subject, examine in HERE.items():
        yield from (_remark(subject, finding) for finding in ask(examine, case, ENGINE.distribution))
    for found in (*discover("doctors"), *(() if case.loaded is None else (ENGINE,))):
        with waiting(found.name):
            findings = list(examine_apart(found, case, timeout))
        yield from (_remark(found.name, finding) for finding in findings)


def _remark(subject: str, finding: Finding) -> Remark:
    fix = None if finding.fix is None else _without_passwords(finding.fix)
    return Remark(subject, replace(finding, text=_without_passwords(finding.text), fix=fix))


def _without_passwords(text: str) -> str:
    """Texts of exceptions are anybody's, and may show addresses."""
    return re.sub(r"\w+://\S+", lambda address: without_secrets(address[0]), text)
