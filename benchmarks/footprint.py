"""What each set-up takes: bytes on disk, time to a first answer, memory. Prints a Markdown table.

    python benchmarks/footprint.py [--rounds 5] [--wheels dist]

Wheels are those of this project that the set-up installs, made by `make build`; a dash where they are not there.
Disk is the packages of this project, and these with everything they depend on, without bytecode. Import is the
least time over the rounds of a new process that imports the runner and its runtime, start that of one that answers
a question with eight tokens, peak the latter's largest resident memory; a bare interpreter is there to compare with.
(Linux counts the memory of a process from before it became another program, so no peak is below this script's own.)
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
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ASK = "from nanovllm.cli import main; import sys; sys.argv[1:] = {args!r}; main()"
QUESTION = ["--max-tokens", "8", "What is the capital of France?"]


class SetUp(NamedTuple):
    wanted: str | None  # what pip installs
    imports: str  # a program that imports the runner
    program: str  # a program that answers


def answering(runner: str, options: list[str]) -> SetUp:
    ask = ASK.format(args=["ask", "--runner", runner, *options, *QUESTION])
    return SetUp(f"nanovllm[{runner}]", f"import nanovllm_runner_{runner}.runner", ask)


SET_UPS = {
    "bare Python": SetUp(None, "pass", "pass"),
    "`import nanovllm`": SetUp("nanovllm", "import nanovllm", "import nanovllm"),
    "runner mock, tokenizer simple": SetUp(
        "nanovllm", "import nanovllm.builtin.mock", ASK.format(args=["ask", "--runner", "mock", *QUESTION])
    ),
    "runner numpy, embedded model": answering("numpy", []),
    "runner onnx, embedded model": answering("onnx", []),
    "runner torch, embedded model": answering("torch", ["--set", "runner.device=cpu"]),
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
    parser.add_argument("--wheels", type=Path, default=Path("dist"))
    args = parser.parse_args()
    print("| set-up | wheels, MB | ours, MB | with dependencies, MB | import, ms | start, ms | peak, MB |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, set_up in SET_UPS.items():
        parts = closure(set_up.wanted) if set_up.wanted is not None else set()
        ours = [d for d in parts if d.startswith("nanovllm")]
        wheels = [wheel for d in ours for wheel in args.wheels.glob(f"{d.replace('-', '_')}-[0-9]*.whl")]
        wheel_bytes = sum(wheel.stat().st_size for wheel in wheels)
        imports = min(run(set_up.imports)[0] for _ in range(args.rounds))
        runs = [run(set_up.program) for _ in range(args.rounds)]
        start, peak = min(seconds for seconds, _ in runs), max(peak for _, peak in runs)
        print(
            f"| {name} | {f'{wheel_bytes / 1e6:.2f}' if len(wheels) == len(ours) else '-'} "
            f"| {sum(map(size, ours)) / 1e6:.1f} | {sum(map(size, parts)) / 1e6:.0f} "
            f"| {imports * 1e3:.0f} | {start * 1e3:.0f} | {peak / 1e6:.0f} |",
            flush=True,
        )
