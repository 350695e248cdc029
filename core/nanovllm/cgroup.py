"""The control groups that this process lies in (container, service), on Linux. Knows no limit's meaning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Group(NamedTuple):
    directory: Path
    version: int  # 1 or 2: they name their files differently


def groups(controller: str, root: Path = Path("/")) -> Iterator[Group]:
    """This process's group for `controller` ("cpu", "memory") and all those around it; a limit of any holds.

    /proc/self/cgroup has lines `id:controllers:path`. Version 2 has one hierarchy, with no controllers named;
    in version 1 each controller has its own. A directory may be absent in a container's view.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        while group.is_relative_to(mount):
            yield Group(group, 1 if controllers else 2)
            group = group.parent
