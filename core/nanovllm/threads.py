"""How many processors this process may use. Knows no runtime."""

from __future__ import annotations

import os
from pathlib import Path

from .cgroup import groups


def available_threads(root: Path = Path("/")) -> int:
    """By affinity, and on Linux by the quota of its control group (container, service) and those around it."""
    count, quota = allowed_processors(), processor_quota(root)
    return count if quota is None else max(1, min(count, int(quota)))


def allowed_processors() -> int:
    """By affinity alone, where the system has such a thing."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_quota(root: Path = Path("/")) -> float | None:
    """The narrowest quota above this process, in processors; None without one. A group's own may be the wider one."""
    quotas = []
    for group, version in groups("cpu", root):
        try:
            if version == 1:
                quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii")  # microseconds, -1: none
                period = (group / "cpu.cfs_period_us").read_text(encoding="ascii")
            else:
                quota, period = (group / "cpu.max").read_text(encoding="ascii").split()  # "max": none
            if int(quota) > 0:
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such group in this container's view, or no quota
            pass
    return min(quotas, default=None)
