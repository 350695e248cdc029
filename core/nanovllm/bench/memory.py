"""How much memory a process holds, this one unless said otherwise, from the standard library alone.

Linux tells both what is resident now and the peak. Elsewhere on Unix only the peak is told; on Windows neither.
"""

from __future__ import annotations

import sys
from pathlib import Path


def resident() -> int | None:
    """Bytes of physical memory in use now; None where the system does not tell."""
    return _status("VmRSS")


def peak(pid: int | None = None) -> int | None:
    """The most bytes that were resident at once since the process began; None where the system does not tell."""
    if (bytes_used := _status("VmHWM", pid)) is not None:
        return bytes_used
    if sys.platform == "win32" or pid is not None:
        return None
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most  # bytes on macOS, KiB elsewhere


def _status(field: str, pid: int | None = None) -> int | None:
    """A line of /proc/self/status, such as `VmRSS:    40960 kB`."""
    try:
        status = Path("/proc", "self" if pid is None else str(pid), "status")
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), None)
