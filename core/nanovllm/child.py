"""A module in a process of its own, which may hang, crash or print without harm. Knows no module."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_TOLD = 1 << 20  # bytes of stdout, and of the end of stderr, that are looked at
# `python -m` would put the working directory first, and whatever lies there would be imported.
RUN = """
import sys
_, module, report, *sys.path = sys.argv
sys.argv = [module, report]
import runpy
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """A child that is no more."""

    status: int | None  # None: it was killed, because its time was over
    stdout: str
    stderr: str
    report: str  # what it had written into its report by then

    def in_words(self, seconds: float) -> str:
        if self.status is None:
            return f"did not end within {seconds:g} seconds"
        cause = self._cause()
        return f"ended the process with {_status(self.status)}" + (f": {cause}" if cause else "")

    def _cause(self) -> str:
        """The place of a crash, as faulthandler tells it, or else the last line."""
        crashed = re.search(r'^Current thread .*\n +File "(.+)", line (\d+) in (\w+)', self.stderr, re.MULTILINE)
        if crashed:
            return f"in {crashed[3]}, {crashed[1]}, line {crashed[2]}"
        return self.stderr.strip().rpartition("\n")[2]


def run_child(module: str, request: Any, seconds: float) -> Ended:
    """Run the module as a program whose argument is the path of its report, with the request as JSON on stdin.

    It has this process's import path. What is left of it and of what it started is killed after `seconds`. Raises
    OSError if there is no place for its files, or it cannot be started.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:  # a grandchild may write on
        report = Path(directory, "report")
        # Files, not pipes: a grandchild that lives on would hold a pipe open.
        with Path(directory, "stdout").open("w+b") as stdout, Path(directory, "stderr").open("w+b") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-c", RUN, module, str(report), *sys.path],
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.communicate(json.dumps(request).encode(), timeout=seconds)
                status = child.poll()
            finally:  # also where the user interrupts: it does not go on alone
                _kill(child)
            stdout.seek(0)
            stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - MAX_TOLD))
            printed, complaints = (file.read(MAX_TOLD).decode("utf-8", "replace") for file in (stdout, stderr))
        return Ended(status, printed, complaints, report.read_text("utf-8") if report.exists() else "")


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child and all that it started."""
    if sys.platform != "win32":
        with contextlib.suppress(ProcessLookupError, PermissionError):  # all of them have ended
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _status(code: int) -> str:
    if code >= 0:
        return f"status {code}"
    return signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
