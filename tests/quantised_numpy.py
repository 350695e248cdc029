"""The NumPy runner made to compute as int8 and int4 are defined to: the oracle of the ONNX runner's precisions.

Written from the definitions, in the plainest way: every matrix becomes the numbers that its quantised form stands
for, and so does whatever is multiplied with it. Routers, norms, biases and positions stay as they are.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import numpy_support
from nanovllm_runner_numpy.linear import LinearWeights
from nanovllm_runner_numpy.runner import NumpyRunner


def to_grid(x: np.ndarray, peak: np.ndarray, steps: int, low: int, high: int) -> np.ndarray:
    """x rounded to whole multiples of peak / steps, which are held between `low` and `high`."""
    step = peak / np.float32(steps)
    with np.errstate(invalid="ignore"):
        return np.where(peak == 0, 0, np.clip(np.rint(x / step), low, high) * step)


def in_blocks(x: np.ndarray, block: int) -> np.ndarray:
    """(rows, n) -> (rows, blocks, block), padded with zeros."""
    return np.pad(x, ((0, 0), (0, -x.shape[1] % block))).reshape(len(x), -1, block)


def weights_of(w: np.ndarray, weights: str, block: int) -> np.ndarray:
    """What (out, in) becomes: int8 has a scale for every output; int4 one for every block, whose peak becomes -8."""
    if weights == "int8":
        return to_grid(w, np.abs(w).max(1, keepdims=True), 127, -127, 127)
    blocks = in_blocks(w, block)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    return to_grid(blocks, peak, -8, -8, 7).reshape(len(w), -1)[:, : w.shape[1]]


def inputs_of(x: np.ndarray, weights: str, block: int) -> np.ndarray:
    """What (n, in) becomes: int8 has a scale for every row, int4's operator one for every block of a row.

    Numbers that lie between two whole ones are common after an int4 embedding, so where they are rounded to depends
    on the order of the operations, which is that of the graph and of the operator.
    """
    if weights == "int8":
        peak = np.abs(x).max(1, keepdims=True)
        return np.rint(x / peak / np.float32(1 / 127)) * (peak / 127)
    blocks = in_blocks(x, block)
    peak = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(peak == 0, np.float32(0), np.float32(127) / peak)
    return (np.rint(blocks * inverse) * (peak / 127)).reshape(len(x), -1)[:, : x.shape[1]]


def make_quantised(path: Path, weights: str, block: int, monkeypatch: pytest.MonkeyPatch, **options) -> NumpyRunner:
    class Quantised(LinearWeights):
        def __call__(self, x, out=None):
            return LinearWeights.__call__(self, inputs_of(x, weights, block), out)

    load = LinearWeights.load

    def load_quantised(tensors, *names):
        loaded = load(tensors, *names)
        if names[0].endswith(("router", "shared_gate")):
            return loaded
        return Quantised(np.ascontiguousarray(weights_of(loaded.weight.T, weights, block).T), loaded.bias)

    with monkeypatch.context() as patch:
        patch.setattr(LinearWeights, "load", load_quantised)
        runner = numpy_support.make_runner(path, **options)
    model = runner._model
    model._tokens, model._lm_head = (weights_of(w, weights, block) for w in (model._tokens, model._lm_head))
    final_norm = model._final_norm
    model._final_norm = lambda x: inputs_of(final_norm(x), weights, block)  # the output matrix reads it, nobody else
    return runner
