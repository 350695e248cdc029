"""The oldest ONNX Runtime that the runner admits on the CPU computes the same, to the same tolerance."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanovllm_runner_onnx.install import OLDEST
from support import REPO, needs_data

TESTS = ["tests/test_onnx_references.py", "tests/test_onnx_invariance.py", "tests/test_onnx_precision.py"]


@needs_data
@pytest.mark.slow
def test_the_oldest_onnxruntime_runs_the_models(tmp_path: Path) -> None:
    wanted = f"onnxruntime~={OLDEST['cpu']}.0"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), wanted]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"{wanted} cannot be installed: {installed.stderr.strip().splitlines()[-1]}")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    which = [sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__)"]
    version = subprocess.run(which, env=environment, capture_output=True, text=True, check=True).stdout
    assert version.startswith(f"{OLDEST['cpu']}.")
    pytest_ = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(pytest_, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
