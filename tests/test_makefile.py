"""The Makefile: the twins of the ancestor's targets, and that the ones that only look run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPO

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or sys.platform == "win32",
    reason="needs make, and the directories of a Unix environment",
)

# Of nano-vllm-go's Makefile (requirement B-01).
TWINS = {"all", "ask", "generic-runner", "simple-demo", "demo", "test", "fmt", "vet", "tidy", "clean", "help"}


def make(*arguments: str) -> str:
    """With the environment that runs this test in place of .venv, and nothing installed into it."""
    venv = Path(sys.prefix)
    stamps = [option for name in ("light", "server", "dev") for option in ("-o", str(venv / f"{name}.stamp"))]
    done = subprocess.run(
        ["make", "--no-print-directory", *stamps, f"VENV={venv}", *arguments],
        cwd=REPO, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def targets() -> set[str]:
    text = (REPO / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    return set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]


def test_the_ancestor_s_targets_have_twins() -> None:
    assert targets() >= TWINS


def test_help_names_every_target_with_a_line() -> None:
    listed = dict(re.findall(r"^  make ([a-z-]+) +(\S.*)$", make("help"), re.MULTILINE))
    assert set(listed) == targets() - {"vet"}
    assert "vet" in listed["lint"]


@pytest.mark.parametrize("target", sorted(targets()))
def test_every_target_has_commands(target: str) -> None:
    assert make("--dry-run", target, "VERSION=0.2.0").strip()


def test_the_small_ones_do_what_they_say() -> None:
    assert "hello world" in make("simple-demo")
    assert "Lima" in make("ask")
    assert "Lisbon" in make("ask", "Q=What is the capital of Portugal?")
    assert "gpt2" in make("generic-runner")
    demo = make("demo")
    assert "Lisbon" in demo
    assert "Italy" in demo
