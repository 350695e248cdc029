"""How many processors a process may use: affinity, and the quotas of control groups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanovllm.threads import available_threads


def tree(root: Path, membership: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(membership)
    for name, text in files.items():
        file = root / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("membership", "files", "most"),
    [
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "150000 100000"}, 1),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("0::/\n", {"cpu.max": ""}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000", "a/b/cpu.max": "800000 100000"}, 1),  # the parent is narrower
        ("0::/a/b\n", {"a/cpu.max": "max 100000", "a/b/cpu.max": "100000 100000"}, 1),
        ("0::/seen/from/outside\n", {"cpu.max": "100000 100000"}, 1),  # a container that sees its own root
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu,cpuacct:/job\n", {"cpu/job/cpu.cfs_quota_us": "-1", "cpu/job/cpu.cfs_period_us": "100000"}, None),
        ("5:cpuset:/job\n", {"cpu/job/cpu.cfs_quota_us": "100000", "cpu/job/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_threads_are_those_that_the_container_may_use(membership, files, most, tmp_path):
    free = available_threads(tmp_path / "absent")
    assert free >= 1
    assert available_threads(tree(tmp_path, membership, files)) == (free if most is None else min(free, most))
