"""An ONNX runner for the tests' `Driver`, and its pool filled with whatever earlier owners may have left."""

from __future__ import annotations

from pathlib import Path

from nanovllm.hookspecs import CacheOptions, Context
from nanovllm_runner_onnx import plugin
from nanovllm_runner_onnx.options import OnnxOptions
from nanovllm_runner_onnx.runner import OnnxRunner


def make_runner(path: Path, *, block_size: int = 4, num_blocks: int | None = 64, **overrides) -> OnnxRunner:
    """One thread: the spinning pools of many sessions in one process would wait for each other."""
    ctx = {
        "options": OnnxOptions(),
        "model": str(path),
        "path": path if path.exists() else None,
        "cache": CacheOptions(block_size=block_size, num_blocks=num_blocks),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "max_model_len": None,
        "threads": 1,
    }
    return plugin.create_runner(Context(**(ctx | overrides)))


def precision(name: str) -> OnnxOptions:
    """Of fp32, int8, int4 (blocks of 32) or int4-128."""
    weights, _, block = name.partition("-")
    return OnnxOptions(weights=weights, int4_block=int(block) if block else None)


def fill(runner: OnnxRunner, value: float) -> None:
    """All blocks that the engine hands out; not the spare one, which is the runner's own."""
    runner._pool.array[:, :, : runner.info.kv.num_blocks] = value
