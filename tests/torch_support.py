"""A torch runner for the tests' `Driver`, and its pool filled with whatever earlier owners may have left.

Importing this skips the test module that does so where there is no torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import numpy_support
from nanovllm.hookspecs import CacheOptions, Context
from nanovllm_runner_torch import plugin
from nanovllm_runner_torch.options import TorchOptions

torch = pytest.importorskip("torch", reason="the runtime: pip install 'nanovllm[torch]'")

from nanovllm_runner_torch import attention, device, linear, modules, runner, sampler  # noqa: E402

__all__ = ["Driver", "attention", "device", "fill", "linear", "make_runner", "modules", "runner", "sampler", "torch"]


def make_runner(path: Path, *, block_size: int = 4, num_blocks: int | None = 64, **overrides):
    """float32 on one thread of the CPU, unless a test says otherwise, with options by name."""
    options = {"device": "cpu", "dtype": "fp32"}
    options |= {name: overrides.pop(name) for name in ("device", "dtype", "weights") if name in overrides}
    ctx = {
        "options": TorchOptions(**options),
        "model": str(path),
        "path": path if path.exists() else None,
        "cache": CacheOptions(block_size=block_size, num_blocks=num_blocks),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": None,
        "threads": 1,
    }
    return plugin.create_runner(Context(**(ctx | overrides)))


class Driver(numpy_support.Driver):
    def step(self, *work) -> np.ndarray:
        return super().step(*work).numpy()


def fill(found, value: float) -> None:
    """All blocks that the engine hands out; not the spare one, which is the runner's own."""
    found._pool.array[:, : found.info.kv.num_blocks] = value
