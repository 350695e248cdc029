"""Our own runners pass every level that they declare."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import foreign_graphs
from model_cases import PHI
from models_support import file_tensors, write_checkpoint
from nanovllm.builtin.mock import chain_logits, chain_states
from nanovllm.components import Components, build
from nanovllm.config import load
from nanovllm.testing import RunnerConformance
from nanovllm.testing.runner_suite import Reference

needs_onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")

POISON = 60  # a token whose embedding is NaN, and which is hardly ever drawn
CONFIG = PHI | {"model_type": "phi", "vocab_size": 125, "max_position_embeddings": 128}  # as many as tokenizer `simple`


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("phi"), CONFIG)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = file_tensors(CONFIG)
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    tensors["lm_head.bias"][POISON] = -20
    return write_checkpoint(tmp_path_factory.mktemp("poisoned"), CONFIG, tensors)


# ----------------------------------------------------------------------------------------------- the mock runner


class Mock(RunnerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls) -> Reference:
        return lambda tokens: chain_logits(chain_states(tokens), 125).astype(np.float64)


class TestMockPaged(Mock):
    poison_tokens = (125,)  # behind the vocabulary's end, so that it is never drawn

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        return {"model": "mock", "runner": {"type": "mock", "script": {"nan_token": 125}}}


class TestMockLanes(Mock):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Any:
        return {"model": "mock", "runner": {"type": "mock", "layout": "lanes"}, "max_model_len": 64}


# ------------------------------------------------------------------------------------- runners of checkpoints


class OfCheckpoint(RunnerConformance):
    runner: ClassVar[Any]  # as YAML says it

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, checkpoint: Path) -> Any:
        return {"model": str(checkpoint), "runner": cls.runner, "tokenizer": "simple"}


class Poisoned(OfCheckpoint):
    poison_tokens = (POISON,)

    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, poisoned: Path) -> Path:
        return poisoned


class TestNumpy(Poisoned):
    runner = "numpy"


@needs_onnx
class TestOnnx(Poisoned):
    runner: ClassVar = {"type": "onnx", "threads": 1}


@needs_onnx
class TestOnnxInt8(OfCheckpoint):
    atol = 0.5
    runner: ClassVar = {"type": "onnx", "threads": 1, "weights": "int8"}


@needs_torch
class TestTorch(Poisoned):
    runner: ClassVar = {"type": "torch", "threads": 1, "device": "cpu", "dtype": "fp32"}


@needs_torch
class TestTorchBf16(Poisoned):
    atol = rounding = 0.25  # two steps of a bfloat16 between 16 and 32
    runner: ClassVar = {"type": "torch", "threads": 1, "device": "cpu", "dtype": "bf16"}


@needs_torch
class TestTorchInt8(OfCheckpoint):
    atol = 0.5
    runner: ClassVar = {"type": "torch", "threads": 1, "device": "cpu", "dtype": "fp32", "weights": "int8"}


# ------------------------------------------------------------------------------------- somebody else's graph


@needs_onnx
class TestOnnxGraph(RunnerConformance):
    expected_failures: ClassVar = {
        "test_end_tokens_are_the_references": "the checkpoint that the graph was written from names none"
    }

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls, tmp_path_factory: pytest.TempPathFactory) -> Any:
        root = tmp_path_factory.mktemp("graph")
        graph = foreign_graphs.write(root / "optimum", write_checkpoint(root / "checkpoint", foreign_graphs.CONFIG))
        return {"model": str(graph), "runner": {"type": "onnx", "threads": 1}, "tokenizer": "simple"}

    @pytest.fixture(scope="class")
    @classmethod
    def numpy_parts(cls, config: Any) -> Iterator[Components]:
        """On the checkpoint that the graph was written from."""
        checkpoint = Path(config["model"]).with_name("checkpoint")
        parts = build(load(overrides={"model": str(checkpoint), "runner": "numpy", "tokenizer": "simple"}))
        yield parts
        parts.runner.close()


# ------------------------------------------------------------------------------------------ servers elsewhere


@contextmanager
def server(command: str) -> Iterator[str]:
    """The url of a process with the mock runner. Nobody reads what it logs."""
    program = [sys.executable, "-c", "from nanovllm.cli import main; main()", command, "--runner=mock", "--port=0"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield next(line for line in process.stdout if line.startswith("serving ")).split()[-1]
        process.terminate()


class TestHttpStep(RunnerConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Iterator[Any]:
        with server("runner-serve") as url:
            yield {"model": "mock", "runner": {"type": "http", "url": url}, "tokenizer": "simple"}


class TestHttpCompletion(RunnerConformance):
    """In front of a server that takes text and gives text."""

    @pytest.fixture(scope="class")
    @classmethod
    def config(cls) -> Iterator[Any]:
        with server("serve") as url:
            yield {"model": "mock", "runner": {"type": "http", "url": url, "dialect": "openai"}}
