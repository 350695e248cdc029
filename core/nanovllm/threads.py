"""How many processors this process may use. Knows no runtime."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available_threads(root: Path = Path("/")) -> int:
    """By affinity, and on Linux by the quota of its control group (container, service) and those around it."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *_quotas(root)]))


def _quotas(root: Path) -> Iterator[int]:
    """Whole processors of every quota above this process; a group's own may be wider than its parent's.

    /proc/self/cgroup has lines `id:controllers:path`. Version 2 has one hierarchy, with no controllers named
    and quota and period in one file; in version 1 the cpu controller has its own, with two files.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            try:
                if controllers:
                    quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii")  # microseconds, -1: none
                    period = (group / "cpu.cfs_period_us").read_text(encoding="ascii")
                else:
                    quota, period = (group / "cpu.max").read_text(encoding="ascii").split()  # "max": none
                if int(quota) > 0:
                    yield int(quota) // int(period)
            except (OSError, ValueError):  # no such group in this container's view, or no quota
                pass
            group = group.parent
