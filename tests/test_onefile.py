"""All of nanovllm in one file: what `make onefile` builds answers without an environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from support import REPO


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["numpy", "onnx"])
def test_one_file_answers_where_nothing_is_installed_or_set(tmp_path: Path, runner: str) -> None:
    copy = tmp_path / "copy"  # `make build` clears dist/
    subprocess.run(["git", "clone", "--quiet", str(REPO), str(copy)], check=True)
    (copy / ".venv").symlink_to(Path(sys.executable).parents[1])
    make = ["make", "-C", str(copy), "-o", ".venv/dev.stamp"]  # -o: what it needs is installed
    subprocess.run([*make, "onefile", f"RUNNER={runner}"], check=True, capture_output=True)
    file = copy / "dist" / f"nanovllm-{runner}.pyz"
    # -S: no site-packages; the environment holds only where the file may unpack itself.
    command = [sys._base_executable, "-S", str(file), "ask", "--runner", runner, "What is the capital of Peru?"]  # type: ignore[attr-defined]
    done = subprocess.run(command, cwd=tmp_path, env={"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Lima" in done.stdout
