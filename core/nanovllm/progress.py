"""The progress bar of a `generate` call, and a line while something is waited for: on a terminal's stderr only.

    Generating [Prefill: 89tok/s, Decode: 23tok/s] 100% [====] (1/1, 1.2 it/s)

The bar counts requests. This file knows no engine; rich is imported only where something is drawn.
"""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import ProgressColumn, Task

_BAR_WIDTHS = (4, 20)  # characters, for narrow and for wide terminals


class Progress:
    """A context manager; `enabled=None` means: if `stream` (stderr unless given) is a terminal."""

    def __init__(self, total: int, stream: TextIO | None = None, enabled: bool | None = None) -> None:
        self._total = total  # requests
        self._stream = sys.stderr if stream is None else stream
        self.is_enabled = self._stream.isatty() if enabled is None else enabled

    def __enter__(self) -> Progress:
        if self.is_enabled:
            from rich.console import Console
            from rich.progress import Progress as Bar

            console = Console(file=self._stream, force_terminal=True, highlight=False, soft_wrap=True)
            self._bar = Bar(_column(console.width - 1), console=console, redirect_stdout=False, redirect_stderr=False)
            self._task = self._bar.add_task("", total=self._total, started=time.perf_counter(), rates=(0.0, 0.0))
            self._bar.start()
        return self

    def update(self, finished: int, prefill_tps: float | None, decode_tps: float | None) -> None:
        """`finished` requests so far; rates in tokens per second, None where nothing was computed yet."""
        if self.is_enabled:
            self._bar.update(self._task, completed=finished, rates=(prefill_tps or 0.0, decode_tps or 0.0))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_enabled:
            self._bar.stop()


class Waiting:
    """A context manager: one line that can be changed, and is gone at the end."""

    def __init__(self, text: str, stream: TextIO | None = None) -> None:
        self._text = text
        self._stream = sys.stderr if stream is None else stream
        self._is_enabled = self._stream.isatty()

    def __enter__(self) -> Waiting:
        if self._is_enabled:
            from rich.console import Console
            from rich.status import Status

            console = Console(file=self._stream, force_terminal=True, highlight=False, soft_wrap=True)
            self._status = Status("", console=console)
            self.update(self._text)
            self._status.start()
        return self

    def update(self, text: str) -> None:
        if self._is_enabled:
            from rich.text import Text

            self._status.update(Text(text, no_wrap=True, overflow="ellipsis"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_enabled:
            self._status.stop()


def bar_line(finished: int, total: int, seconds: float, rates: tuple[float, float], columns: int) -> str:
    """The whole line; the bar in it is as wide as `columns` allows."""
    prefill, decode = (f"{rate:.0f}" if math.isfinite(rate) else "0" for rate in rates)
    share = finished / total if total else 1.0
    speed = finished / seconds if seconds > 0 else 0.0
    before = f"Generating [Prefill: {prefill}tok/s, Decode: {decode}tok/s] {math.floor(100 * share)}% ["
    after = f"] ({finished}/{total}, {speed:.1f} it/s)"
    low, high = _BAR_WIDTHS
    width = min(high, max(low, columns - len(before) - len(after)))
    return f"{before}{'=' * math.floor(width * share):<{width}}{after}"


def _column(columns: int) -> ProgressColumn:
    from rich.progress import ProgressColumn
    from rich.text import Text

    class Line(ProgressColumn):
        def render(self, task: Task) -> Text:
            seconds = time.perf_counter() - task.fields["started"]
            finished, total = int(task.completed), int(task.total or 0)
            return Text(bar_line(finished, total, seconds, task.fields["rates"], columns), no_wrap=True)

    return Line()
