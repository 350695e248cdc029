"""Real llama.cpp servers for the slow tests and the benchmarks: where to find a llama-server, and running one.

On PATH, or where LLAMA_SERVER says, or built from the sources that the source distribution of
llama-cpp-python brings along (six minutes on two cores; needs cmake and a C++ compiler).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

VARIABLE = "LLAMA_SERVER"  # not NANOVLLM_...: those are configuration keys
START_SECONDS = 120.0


class Missing(Exception):
    """Why there is no server."""


def find_llama_server(work: Path) -> str:
    """The path of a llama-server; built in `work` if there is none. Raises Missing."""
    named = os.environ.get(VARIABLE)
    if named:
        if shutil.which(named) is None:
            raise Missing(f"{VARIABLE}={named} is not a program")
        return named
    return shutil.which("llama-server") or build_llama_server(work)


def build_llama_server(work: Path) -> str:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise Missing(f"no llama-server on PATH, none named by {VARIABLE}, and no {tool} to build one")
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python",
                "--dest", str(work), "llama-cpp-python"]  # fmt: skip
    asked = subprocess.run(download, capture_output=True, text=True, check=False)
    archives = list(work.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        last = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise Missing(f"no llama-server on PATH, none named by {VARIABLE}, and pip has no sources: {last}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(work, filter="data")
    (source,) = work.glob("llama_cpp_python-*/vendor/llama.cpp")
    build = work / "build"
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
               "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_UI=OFF", "-DBUILD_SHARED_LIBS=OFF"]  # fmt: skip
    for command in (
        ["cmake", "-S", str(source), "-B", str(build), *options],
        ["cmake", "--build", str(build), "--target", "llama-server", "-j", str(os.cpu_count() or 1)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Missing(f"{command[1]} failed while building llama-server: {done.stderr[-500:]}")
    return str(build / "bin" / "llama-server")


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> Iterator[str]:
    """The URL of a server that is ready; `--port N` is added to its command. Ends it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})},
        )  # fmt: skip
        try:
            _wait_for(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')[-2000:]}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            if urllib.request.urlopen(f"{url}/v1/models", timeout=2).status == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(
        f"the server was not ready within {START_SECONDS:g} s: {log.read_text(errors='replace')[-2000:]}"
    )
