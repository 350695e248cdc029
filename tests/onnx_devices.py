"""Devices that are not here, played by the CPU: DirectML's graphs by ONNX Runtime's own kernels, CUDA's by ONNX's
reference evaluator with the contributed operators written from the text of their schemas."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from nanovllm_runner_onnx import paged_model, session
from nanovllm_runner_onnx.options import OnnxOptions
from nanovllm_runner_onnx.runner import OnnxRunner
from onnx_support import make_runner

Arrays = Mapping[str, NDArray[Any]]


class PagedAttention(OpRun):
    op_domain = "com.microsoft"

    def _run(
        self, query, key, value, key_cache, value_cache, starts, past_lens, tables, cos, sin, slots, sink, q_norm,
        k_norm, k_scale, v_scale, bounds, num_heads=None, kv_num_heads=None, scale=None, softcap=None,
        local_window_size=None,
    ):  # fmt: skip
        assert all(x is None for x in (cos, sin, sink, q_norm, k_norm, k_scale, v_scale))
        num_blocks, _, heads, size = key_cache.shape
        assert (heads, query.dtype) == (kv_num_heads, key_cache.dtype)
        assert (np.diff(starts) > 0).all()
        assert bounds[0] >= np.diff(starts).max()
        assert bounds[1] >= (past_lens + np.diff(starts)).max()
        assert ((tables >= 0) & (tables < num_blocks)).all()
        for cache, new in ((key_cache, key), (value_cache, value)):
            cache.reshape(-1, heads, size)[slots] = new.reshape(-1, heads, size)
        output = np.empty_like(query)
        for s, (first, last) in enumerate(itertools.pairwise(starts)):
            length = past_lens[s] + last - first
            k, v = (
                np.repeat(c[tables[s]].reshape(-1, heads, size)[:length], num_heads // heads, axis=1).astype(np.float32)
                for c in (key_cache, value_cache)
            )  # (length, num_heads, size)
            for t in range(first, last):
                position = past_lens[s] + t - first
                begin = 0 if local_window_size < 0 else max(0, position + 1 - local_window_size)
                q = query[t].reshape(num_heads, size).astype(np.float32)
                scores = np.einsum("hd,lhd->hl", q, k[begin : position + 1]) * scale
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                p = np.exp(scores - scores.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                output[t] = np.einsum("hl,lhd->hd", p, v[begin : position + 1]).reshape(-1)
        return output, key_cache, value_cache


class RotaryEmbedding(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, positions, cos, sin, interleaved=None, num_heads=None, rotary_embedding_dim=None):
        dim = 2 * cos.shape[1]
        assert (rotary_embedding_dim or dim) == dim
        assert not interleaved
        heads = x.reshape(*x.shape[:2], num_heads or x.shape[2] // dim, -1)
        a, b, rest = heads[..., : dim // 2], heads[..., dim // 2 : dim], heads[..., dim:]
        c, s = (table[positions][:, :, None] for table in (cos, sin))
        return (np.concatenate([a * c - b * s, b * c + a * s, rest], axis=-1).reshape(x.shape),)


class QuickGelu(OpRun):
    op_domain = "com.microsoft"

    def _run(self, x, alpha=None):
        wide = x.astype(np.float32)
        return ((wide / (1 + np.exp(-alpha * wide))).astype(x.dtype),)


class SimplifiedLayerNormalization(OpRun):
    op_domain = ""

    def _run(self, x, scale, axis=None, epsilon=None):
        wide = x.astype(np.float32)
        assert axis == -1
        return ((wide / np.sqrt((wide**2).mean(-1, keepdims=True) + epsilon)).astype(x.dtype) * scale,)


def numbers(values: NDArray[np.uint8], scales: NDArray[Any], block_size: int) -> NDArray[Any]:
    """(rows, columns) of 4-bit blocks without zero points, which are 8."""
    nibbles = np.stack([values & 15, values >> 4], axis=-1).reshape(len(values), -1).astype(np.float32) - 8
    return nibbles * np.repeat(scales.reshape(len(values), -1), block_size, axis=1)


class MatMulNBits(OpRun):
    op_domain = "com.microsoft"

    def _run(self, a, b, scales, K=None, N=None, bits=None, block_size=None, accuracy_level=None):
        assert (bits, scales.dtype, b.shape[0]) == (4, a.dtype, N)
        return ((a.astype(np.float32) @ numbers(b, scales, block_size)[:, :K].T).astype(a.dtype),)


class GatherBlockQuantized(OpRun):
    op_domain = "com.microsoft"

    def _run(self, data, indices, scales, bits=None, block_size=None, gather_axis=None, quantize_axis=None):
        assert (bits, gather_axis, quantize_axis) == (4, 0, 1)
        return (numbers(data, scales, block_size)[indices].astype(scales.dtype),)


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.outputs[name] = value

    def bind_cpu_input(self, name: str, array: NDArray[Any]) -> None:
        self.inputs[name] = array

    def bind_output(self, name, device, device_id, dtype, shape, pointer) -> None:
        assert (device, dtype) == ("cpu", np.float32)
        self.outputs[name] = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(shape))).from_address(pointer))


class CudaSession:
    """Takes the place of an InferenceSession on CUDA."""

    def __init__(self, model: bytes, weights: Arrays, memory: Mapping[int, NDArray[Any]]) -> None:
        proto = onnx.ModelProto.FromString(model)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(weights[tensor.name]), tensor.name))
        ops = [
            PagedAttention, RotaryEmbedding, QuickGelu, SimplifiedLayerNormalization, MatMulNBits, GatherBlockQuantized,
        ]  # fmt: skip
        self._evaluator = ReferenceEvaluator(proto, new_ops=ops)
        self._memory = memory

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding) -> None:
        def array(value: Any) -> NDArray[Any]:
            return value if isinstance(value, np.ndarray) else self._memory[value.data_ptr()]

        feeds = {name: array(value) for name, value in binding.inputs.items()}
        for name, value in zip(self._evaluator.output_names, self._evaluator.run(None, feeds), strict=True):
            target = array(binding.outputs[name])
            if name.endswith(".after"):  # the operator insists on its own input
                assert target is feeds[name.removesuffix(".after")]
            target[...] = value.reshape(target.shape)


def make_device_runner(monkeypatch, path: Path, device: str, **options) -> tuple[OnnxRunner, list[NDArray[Any]]]:
    """A runner on a device that is played, and the arrays of its pool. Block size 16."""
    import onnxruntime as ort

    memory: dict[int, NDArray[Any]] = {}
    real = ort.OrtValue.ortvalue_from_numpy

    def in_memory(array, name="cpu", device_id=0):
        if name == "cpu":
            return real(array)
        assert (name, device_id) == ({"cuda": "cuda", "directml": "dml"}[device], 0)
        own = array.copy()
        memory[own.ctypes.data] = own
        return real(own)

    def opened(model, settings, weights):
        assert settings.device == device
        if device == "cuda":
            return CudaSession(model, weights, memory)
        return session.open_session(model, session.replace(settings, device="cpu"), weights)

    with monkeypatch.context() as m:
        m.setattr(session, "_try_device", lambda settings: None)
        m.setattr(paged_model, "open_session", opened)
        m.setattr(ort.OrtValue, "ortvalue_from_numpy", in_memory)
        runner = make_runner(path, options=OnnxOptions(device=device, **options), block_size=16, num_blocks=32)
    return runner, list(memory.values())
