"""The parent's end of the pipes that worker.py describes: a process that is asked and answers, or is given up.

A child that dies, hangs, prints nonsense or says that it failed raises ChildFailed with one sentence. Knows no
metric and no engine.
"""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from ..errors import NanoVLLMError
from .metrics import Timed
from .workload import Job

GRACE = 1.0  # seconds that a child has to end by itself


class ChildFailed(NanoVLLMError):
    """One of the engines under comparison is out; the others are not concerned."""

    exit_code = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """What runs in a child of its own."""

    name: str
    command: tuple[str, ...]  # a program that calls `worker.serve`
    settings: Mapping[str, Any] = field(default_factory=dict)  # sent to it first; JSON values only


class Child:
    """A contestant's process. Starting it loads its model; it stays loaded until `close`."""

    def __init__(self, contestant: Contestant, timeout: float) -> None:
        """`timeout`: seconds that an answer may take, loading included. Raises ChildFailed."""
        self.name = contestant.name
        self.peak_memory: int | None = None  # bytes, as the child last told
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                contestant.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                text=True, encoding="utf-8",
            )  # fmt: skip
        except OSError as e:
            self._errors.close()
            raise ChildFailed(f"{self.name} cannot be started: {e.strerror or e}") from None
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # "" is the end
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        try:
            self.facts: Mapping[str, Any] = self._ask(dict(contestant.settings), ("ready",))["ready"]
        except BaseException:
            self.close()
            raise

    def generate(self, jobs: Sequence[Job]) -> Timed:
        """Raises ChildFailed."""
        reply = self._ask({"jobs": jobs}, ("seconds", "tokens"))
        self.peak_memory = reply.get("peak_memory")
        return Timed(reply["seconds"], reply["tokens"])

    def close(self) -> None:
        """End the process: it may leave by itself, for a moment. Safe to call twice."""
        assert self._process.stdin is not None, "opened as a pipe"
        with contextlib.suppress(OSError):  # a message that the dead child never read
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None, "opened as a pipe"
        self._process.stdout.close()
        self._errors.close()

    # ----------------------------------------------------------------------------------- details

    def _ask(self, message: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
        pipe = self._process.stdin
        assert pipe is not None, "opened as a pipe"
        with contextlib.suppress(OSError):  # if it is gone, its end says why
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        try:
            line = self._lines.get(timeout=self._timeout)
        except queue.Empty:
            raise ChildFailed(
                f"{self.name} gave no answer for {self._timeout:g} s", hint="if it is only slow, raise --timeout"
            ) from None
        if not line:
            raise ChildFailed(f"{self.name} died with status {self._process.wait()}: {self._last_words()}")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if isinstance(reply, dict) and "error" in reply:
            raise ChildFailed(f"{self.name}: {reply['error']}")
        if not isinstance(reply, dict) or any(key not in reply for key in keys):
            raise ChildFailed(f"{self.name} answered {line[:60]!r}, which is no answer")
        return reply

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._lines.put(line)
        self._lines.put("")

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
