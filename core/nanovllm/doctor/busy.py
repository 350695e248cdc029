"""Which threads did the work: counted by their processor time, not taken from a setting. Knows no library."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .finding import Finding

LEAST_SHARE = 0.1  # of the busiest thread's time: who did less did not take part


@dataclass(frozen=True, slots=True)
class Busy:
    """What this process did for a while."""

    seconds: float  # on the clock
    processor_seconds: float  # of all threads together
    num_threads: int | None  # that took part; None where the system does not tell (all but Linux)

    @property
    def processors(self) -> float:
        """Kept busy, on average. Threads that wait busily count, too."""
        return self.processor_seconds / self.seconds

    def __str__(self) -> str:
        busy = f"{self.processors:.1f} processors busy"
        return busy if self.num_threads is None else f"{_counted(self.num_threads)} at work, {busy}"


def keep_busy(work: Callable[[], object], seconds: float = 0.5) -> Busy:
    """Do the work again and again for so long; a quick first time, when things are still made, does not count."""
    first = _watched(work, 0)
    return first if first.seconds > seconds else _watched(work, seconds)


def tell_threads(what: str, busy: Busy, wanted: int) -> Finding:
    """What to say where `wanted` threads were asked for. Others who use the processors make them less busy."""
    text = f"{what}: {busy}; {_counted(wanted)} wanted"
    is_alone = busy.processors < 1.05 if busy.num_threads is None else busy.num_threads <= 1
    if wanted > 1 and is_alone:
        return Finding("note", f"{text}: this work is too small for more than one, or the others are kept from it")
    return Finding("ok", text)


def _watched(work: Callable[[], object], seconds: float) -> Busy:
    before, processor, started = _thread_seconds(), time.process_time(), time.perf_counter()
    work()
    while time.perf_counter() < started + seconds:
        work()
    elapsed, processor = time.perf_counter() - started, time.process_time() - processor
    if (after := _thread_seconds()) is None or before is None:
        return Busy(elapsed, processor, None)
    spent = [used - before.get(thread, 0.0) for thread, used in after.items()]
    return Busy(elapsed, processor, sum(used > 0 and used >= LEAST_SHARE * max(spent) for used in spent))


def _thread_seconds() -> dict[str, float] | None:
    """Thread id -> seconds of processor time, in steps of about 0.01, from /proc/self/task/ID/stat."""
    if not (tasks := Path("/proc/self/task")).is_dir():
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    spent = {}
    for task in tasks.iterdir():
        try:  # the name in parentheses may hold anything; user and system time are fields 14 and 15
            fields = (task / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        spent[task.name] = (int(fields[11]) + int(fields[12])) / ticks
    return spent


def _counted(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"
