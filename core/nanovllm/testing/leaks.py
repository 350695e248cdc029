"""Counting what this process holds: threads, files, processes, and the entries of its containers. Knows no test."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path

_PATIENCE = 5.0  # seconds for threads and processes that were told to end


def holdings() -> dict[str, int]:
    """What this process has running and open, by kind; of files and processes where the system lists them."""
    counts = {"threads": sum(thread.is_alive() for thread in threading.enumerate())}
    for listing in (Path("/proc/self/fd"), Path("/dev/fd")):
        if listing.is_dir():
            counts["open files"] = len(os.listdir(listing))
            break
    if (tasks := Path("/proc/self/task")).is_dir():
        counts["child processes"] = 0
        for of_a_thread in tasks.glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended
                counts["child processes"] += len(of_a_thread.read_text().split())
    return counts


def left_over(before: Mapping[str, int], pooled: int = 0) -> str:
    """The kinds of which there are more than before; those that are ending get the time to do so.

    `pooled`: so many may be kept for the next request, and need not have been there before.
    """
    gc.collect()
    deadline = time.monotonic() + _PATIENCE
    while True:
        more = [kind for kind, count in holdings().items() if count > before[kind] + pooled]
        if not more or time.monotonic() > deadline:
            return " and ".join(more)
        time.sleep(0.02)


def num_entries() -> int:
    """Of all lists, dictionaries and sets, also of those that hold plain numbers only, which are not tracked."""
    known = gc.get_objects()
    found = {id(o): len(o) for o in (*known, *gc.get_referents(*known)) if type(o) in (dict, list, set)}
    return sum(found.values())
