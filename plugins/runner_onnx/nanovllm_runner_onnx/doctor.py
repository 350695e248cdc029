"""`examine`: ONNX Runtime for `nanovllm doctor`: which is installed, and who computes a product on each device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nanovllm.doctor import Case, Finding, keep_busy, tell_threads
from nanovllm.doctor.gpus import nvidia_gpus
from nanovllm.errors import NanoVLLMError

from .install import OVERWRITTEN, import_onnxruntime, installed_distributions, pip_line, require_onnx
from .options import LONG_NAMES, Device, OnnxOptions
from .session import open_session, settings_of

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

SIZE = 512  # of the matrices: a product takes some milliseconds
OLDEST_GPU = 7.0  # compute capability; ONNX Runtime has no kernels for older ones


def examine(case: Case) -> Iterator[Finding]:
    """Where the onnx runner is not chosen, what is absent is a note."""
    is_chosen = case.is_chosen("runner", "onnx")
    options = case.options("runner", "onnx", OnnxOptions) or OnnxOptions()
    if len(installed := installed_distributions()) > 1:
        yield Finding("error", f"{' and '.join(installed)} {OVERWRITTEN}", pip_line(options.device))
    try:
        ort = import_onnxruntime()
        require_onnx()
    except NanoVLLMError as e:
        yield Finding("error" if is_chosen or installed else "note", e.message, e.hint)
        return
    yield from _library(ort, installed)
    offered = [LONG_NAMES[name] for name in ort.get_available_providers() if name in LONG_NAMES]
    wanted = [options.device] if is_chosen else offered
    for device in wanted:
        threads = None if case.loaded is None else case.loaded.config.runner.threads
        yield from _device(options, device, threads, is_chosen)
    yield from _unused_gpus([*offered, *wanted])


def _library(ort: ort, installed: list[str]) -> Iterator[Finding]:
    from onnxruntime.capi import onnxruntime_pybind11_state as native

    about = f"ONNX Runtime {ort.__version__} in {Path(native.__file__).parent}"
    versions = {name: metadata.version(name) for name in installed}
    if versions and ort.__version__ not in versions.values():
        listed = " and ".join(f"{name} {version}" for name, version in versions.items())
        yield Finding("error", f"{about}, but what is installed is {listed}", pip_line("cpu"))
    else:
        cuda = getattr(ort, "cuda_version", "")
        yield Finding("ok", f"{about}{f', built for CUDA {cuda}' if cuda else ''}")


def _device(options: OnnxOptions, device: Device, threads: int | None, is_chosen: bool) -> Iterator[Finding]:
    """A matrix product on the device, by a session as the runner opens it, and who computed it."""
    if device == "directml" and (build := getattr(sys, "getwindowsversion", lambda: None)()) and build.build < 18362:
        yield Finding("warning", f"DirectML needs Windows 10 build 18362 or later, and this is {build.build}")
    try:
        strict = options.model_copy(update={"device": device, "fallback": []})
        settings = settings_of(strict, threads)
        session = open_session(_product(), settings)
        x = np.ones((SIZE, SIZE), np.float32)
        busy = keep_busy(lambda: session.run(None, {"x": x}))
        [y] = session.run(None, {"x": x})
    except NanoVLLMError as e:
        is_allowed = not is_chosen or "cpu" in options.fallback
        yield Finding("warning" if is_allowed else "error", e.message, e.hint)
        return
    if not (y == SIZE).all():
        yield Finding("error", f"a product of ones on {device} is {y[0, 0]} instead of {SIZE}", pip_line(device))
        return
    computed = f"a matrix product on {device} was computed by {_computed_by(session, device)}"
    yield tell_threads(computed, busy, settings.threads) if device == "cpu" else Finding("ok", computed)


def _product() -> bytes:
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [SIZE, SIZE]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "x"], ["y"])], "product", [x], [y])
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def _computed_by(session: ort.InferenceSession, device: Device) -> str:
    """The provider of the session's one node; of several providers, ONNX Runtime tells which one has it."""
    if device == "cpu":
        [provider] = session.get_providers()
        return str(provider)
    [part] = [part for part in session.get_provider_graph_assignment_info() if list(part.get_nodes())]
    return str(part.ep_name)


def _unused_gpus(devices: list[Device]) -> Iterator[Finding]:
    for gpu in nvidia_gpus():
        if gpu.capability < OLDEST_GPU:
            yield Finding("note", f"{gpu} is older than any that ONNX Runtime computes on ({OLDEST_GPU} and later)")
        elif "cuda" not in devices:
            yield Finding("note", f"this ONNX Runtime does not use {gpu}", pip_line("cuda"))
