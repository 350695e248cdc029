"""`nanovllm doctor`: what really runs here, and what is wrong with it.

A check is a function of a `Case` that yields `Finding`s. Those of the core look at the system and at what is
installed, and run the configured engine; they know no backend. A distribution brings its own as an entry point of the
group `nanovllm.doctors`:

    def examine(case: Case) -> Iterator[Finding]: ...

    finding.py        Finding: a level, a text, and the command that helps
    case.py           Case: what a check is given
    examination.py    every check in turn; what executes anybody's code does so in a child (apart.py, child.py)
    machine.py        Python, processors, memory, GPUs (gpus.py)
    distributions.py  versions, requirements, clashes, foreign files under our name
    advisories.py     versions with known faults that matter here
    environment.py    variables that change what is loaded
    engine.py         the configured engine: loaded, asked, measured
    busy.py           which threads did the work
"""

from __future__ import annotations

from .busy import Busy, keep_busy, tell_threads
from .case import Case
from .finding import Finding

__all__ = ["Busy", "Case", "Finding", "keep_busy", "tell_threads"]
