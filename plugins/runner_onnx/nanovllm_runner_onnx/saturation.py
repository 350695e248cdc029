"""Does this processor add 8-bit products up exactly? x86 processors before VNNI may not. Knows no model.

ONNX Runtime's products of 8-bit integers add pairs of them in 16 bits there, and what does not fit is cut off
in silence. The session entry that REMEDY names takes other kernels, which are exact but take up to twice the
time even where nothing was wrong, so it is for the processors that need it.
https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html#when-and-why-do-i-need-to-try-u8u8
"""

from __future__ import annotations

from typing import Any

import numpy as np

REMEDY = ("session.x64quantprecision", "1")


def saturates(ort: Any) -> bool:
    """Tried out, with the largest numbers there are. `ort`: the module."""
    from .graph import Graph  # imports onnx

    g = Graph()
    size = 64  # enough for any kernel to have its normal course
    x = g.input("x", np.uint8, [1, size])
    g.output(g.op("MatMulInteger", x, g.constant(np.full((size, size), 127), np.int8), name="y"), np.int32, [1, size])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(g.model(), options, providers=["CPUExecutionProvider"])
    [y] = session.run(None, {"x": np.full((1, size), 255, np.uint8)})
    return bool((y != size * 255 * 127).any())
