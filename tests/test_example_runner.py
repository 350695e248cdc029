"""The third-party runner in examples/, in a process of its own, which takes JAX with it when it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import REPO


def run(tests: Path) -> str:
    """What pytest prints; fails unless all of them pass or are skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_jax_runner_keeps_what_the_suite_does_not_ask() -> None:
    assert "skipped" not in run(REPO / "tests" / "example_runner_checks.py")


@pytest.mark.slow  # the same runner passes it in test_tutorial.py, where it is written
def test_the_jax_runner_passes_every_level_that_it_declares() -> None:
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+: (.*)$", run(REPO / "examples" / "runner_jax" / "tests"), re.MULTILINE)
    assert set(skipped) == {
        "no token of the model makes NaN (poison_tokens)",  # example_runner_checks.py puts NaN into the pool
        "the configuration asks for no device but the CPU",
        "the runner does not declare batch_invariant",
        "the engine's sampler honours them",
    }
