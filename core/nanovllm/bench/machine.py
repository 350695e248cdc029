"""Which machine this is, and how fast its memory reads at the moment.

Shared machines drift: the same read can take twice as long ten minutes later. A probe before and after a
measurement makes that visible.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Probe = Callable[[], float]  # GB/s

PROBE_BYTES = 256 * 2**20  # well past any last-level cache
PROBE_READS = 5


def describe() -> dict[str, Any]:
    """Facts that belong beside every figure."""
    import numpy as np

    from .. import __version__

    return {
        "processor": _processor(),
        "cores": _cores(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "nanovllm": __version__,
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def bandwidth_probe() -> Probe:
    """A probe of the memory's read bandwidth: the median of five matrix-vector products, as decoding does them.

    The matrix is allocated once; a reading takes some tens of milliseconds. Threads are BLAS's.
    """
    import numpy as np

    weights = np.ones((PROBE_BYTES // 4 // 4096, 4096), np.float32)
    vector = np.ones(4096, np.float32)

    def probe() -> float:
        seconds = []
        for _ in range(PROBE_READS):
            started = time.perf_counter()
            weights @ vector
            seconds.append(time.perf_counter() - started)
        return PROBE_BYTES / sorted(seconds)[PROBE_READS // 2] / 1e9

    return probe


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
