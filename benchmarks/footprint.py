"""What each set-up takes: bytes on disk, time to a first answer, memory. Prints a Markdown table.

    python benchmarks/footprint.py [--rounds 5]

Disk is the packages of this project, and these with everything they depend on, without bytecode. Start is
the least time over the rounds of a new process that answers one question with eight tokens, peak its largest
resident memory; a bare interpreter is there to compare with. (Linux counts the memory of a process from before
it became another program, so no peak is below this script's own.)
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ASK = "from nanovllm.cli import main; import sys; sys.argv[1:] = {args!r}; main()"
SET_UPS = {
    "bare Python": ("", "pass"),
    "`import nanovllm`": ("nanovllm", "import nanovllm"),
    "runner mock, tokenizer simple": (
        "nanovllm",
        ASK.format(args=["ask", "--runner", "mock", "--max-tokens", "8", "hello"]),
    ),
    "runner numpy, embedded model": (
        "nanovllm[numpy]",
        ASK.format(args=["ask", "--max-tokens", "8", "What is the capital of France?"]),
    ),
}


def closure(wanted: str) -> set[str]:
    """The distributions that pip installs for a requirement such as 'nanovllm[numpy]'."""
    found: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    queue = [Requirement(wanted)]
    while queue:
        requirement = queue.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found.add(name)
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                queue.append(needed)
    return found


def size(distribution: str) -> int:
    """Bytes on disk. Of an editable install, those of the package that it points to."""
    if distribution.startswith("nanovllm"):
        spec = importlib.util.find_spec(distribution.replace("-", "_"))
        assert spec is not None, f"{distribution} has no package"
        assert spec.submodule_search_locations, f"{distribution} is no package"
        paths = list(Path(spec.submodule_search_locations[0]).rglob("*"))
    else:
        paths = [Path(str(f.locate())) for f in importlib.metadata.files(distribution) or []]
    return sum(p.stat().st_size for p in paths if p.is_file() and p.suffix != ".pyc")


def run(program: str) -> tuple[float, int]:
    """(seconds, peak resident bytes) of one process."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed: {program}")
    return time.perf_counter() - started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print("| set-up | ours, MB | with dependencies, MB | start, ms | peak, MB |\n|---|---|---|---|---|")
    for name, (wanted, program) in SET_UPS.items():
        parts = closure(wanted) if wanted else set()
        ours = sum(size(d) for d in parts if d.startswith("nanovllm"))
        total = sum(size(d) for d in parts)
        runs = [run(program) for _ in range(rounds)]
        seconds, peak = min(s for s, _ in runs), max(p for _, p in runs)
        print(f"| {name} | {ours / 1e6:.1f} | {total / 1e6:.0f} | {seconds * 1e3:.0f} | {peak / 1e6:.0f} |")
