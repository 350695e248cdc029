"""What a stranger gets: the distributions as wheels, and environments that know nothing of this checkout.

The fixtures `wheels` and `environment` are in conftest.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support import REPO

PROJECTS = (REPO, *sorted(path.parent for path in REPO.glob("plugins/*/pyproject.toml")))
SECONDS = 300  # for one command


def build(project: Path, out: Path, *options: str) -> None:
    """An sdist and, from it, a wheel (or what `options` say), with the hatchling of this environment."""
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(project)], REPO)


class Environment:
    """A virtual environment with nothing in it, and the directory that its commands run in."""

    def __init__(self, home: Path, wheels: Path) -> None:
        self.home = home  # where commands run
        self.wheels = wheels
        # Not below `home`: Windows says Scripts where others say bin.
        self.bin = home / "venv" / ("Scripts" if os.name == "nt" else "bin")
        home.mkdir(parents=True, exist_ok=True)
        call([sys.executable, "-m", "venv", "--without-pip", str(home / "venv")], home)

    def install(self, *arguments: str) -> None:
        """`pip install ARGUMENTS`, where our wheels are offered beside the index. Installs no pip."""
        pip = [sys.executable, "-m", "pip", "--python", str(self.bin / "python")]
        call([*pip, "install", "--quiet", "--find-links", str(self.wheels), *arguments], self.home)

    def run(self, *command: str) -> str:
        """What a program of the environment prints; fails with its stderr if it ends with another status than 0."""
        return call([str(self.bin / command[0]), *command[1:]], self.home)


def call(command: list[str], directory: Path) -> str:
    """Its stdout; fails with its stderr if it ends with another status than 0."""
    done = attempt(command, directory)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def attempt(command: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    """Nothing of Python's settings here reaches it; pip's, such as the index, do."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "NANOVLLM"))}
    return subprocess.run(
        command, cwd=directory, env=environ | {"PYTHONNOUSERSITE": "1", "PYTHONUTF8": "1"}, capture_output=True,
        text=True, encoding="utf-8", timeout=SECONDS,
    )  # fmt: skip
