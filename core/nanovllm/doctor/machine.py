"""The machine: Python, processors, memory, GPUs. Knows nothing that is installed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from ..cgroup import groups
from ..threads import allowed_processors, available_threads, processor_quota
from .case import Case
from .finding import Finding
from .gpus import nvidia_gpus


def examine(case: Case, root: Path = Path("/")) -> Iterator[Finding]:
    yield Finding("ok", f"{platform.python_implementation()} {platform.python_version()} on {platform.platform()}")
    yield _processors(case, root)
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > allowed_processors():
        yield Finding("note", f"load average {load:.1f}: others use the processors, and figures below are too low")
    if (free := free_memory(root)) is None:
        yield Finding("note", "this system does not tell how much memory is free")
    else:
        yield Finding("ok", f"{free / 1e9:.1f} GB of memory can be taken")
    for gpu in nvidia_gpus():
        yield Finding("ok", f"GPU {gpu}")


def _processors(case: Case, root: Path) -> Finding:
    quota, may_use = processor_quota(root), available_threads(root)
    text = f"{os.cpu_count()} processors, {allowed_processors()} by affinity, "
    text += "no quota" if quota is None else f"a quota of {quota:g}"
    wanted = None if case.loaded is None else case.loaded.config.runner.threads
    if wanted is not None and wanted > may_use:
        return Finding(
            "warning",
            f"{text}; runner.threads is {wanted}, and the threads will wait for each other",
            f"--set runner.threads={may_use}",
        )
    return Finding("ok", f"{text}; threads to use: {wanted or may_use}")


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take, by the system and its control groups; None where nobody tells."""
    limits = []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    for group, version in groups("memory", root):
        names = ("limit_in_bytes", "usage_in_bytes") if version == 1 else ("max", "current")
        cache = "total_inactive_file" if version == 1 else "inactive_file"  # counted as used, given up when needed
        try:
            limit, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in names)
            stats = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            limits.append(max(0, limit - used + int(stats[cache])))
        except (OSError, ValueError, KeyError):  # not in this container's view; "max": none
            pass
    return min(limits, default=None)
