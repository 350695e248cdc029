"""An ONNX Runtime session over a model and its weights: providers, threads, memory. Knows no decoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ConfigError, ModelError, PluginError

if TYPE_CHECKING:
    import onnxruntime as ort  # type: ignore[import-untyped]

    from .graph import Graph

PROVIDERS = {"cpu": "CPUExecutionProvider"}  # those for which we build a graph


def check_providers(wanted: Sequence[str]) -> list[str]:
    """ONNX Runtime's names of the providers. Raises ConfigError for one that cannot be had, never drops it."""
    installed = import_onnxruntime().get_available_providers()
    available = [name for name, long_name in PROVIDERS.items() if long_name in installed]
    for name in wanted:
        if name not in available:
            raise ConfigError(
                f"runner.providers names {name!r:.40}, which is not available; available: {', '.join(available)}",
                hint=f"set runner.providers to [{', '.join(available)}]",
            )
    return [PROVIDERS[name] for name in dict.fromkeys(wanted)]


def open_session(graph: Graph, providers: list[str], threads: int) -> ort.InferenceSession:
    """The weights are copied (into the kernels' own layout where that is faster), so that `graph` may go."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # fatal ones: errors come back as exceptions, which say the same
    # Plans of memory are kept for every combination of input shapes, of which we have no end.
    options.enable_mem_pattern = False
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in graph.weights.values()]
    options.add_external_initializers(list(graph.weights), values)
    try:
        session = ort.InferenceSession(graph.model(), options, providers=providers)
    except Exception as e:  # its exceptions share no base class of their own
        raise ModelError(f"ONNX Runtime {ort.__version__} refuses the graph: {e}") from e
    if session.get_providers() != providers:
        raise ConfigError(
            f"ONNX Runtime runs on {', '.join(session.get_providers())} where {', '.join(providers)} was asked for",
            hint="correct runner.providers",
        )
    return session


def import_onnxruntime() -> Any:
    """The module. Raises PluginError with the remedy if there is none."""
    try:
        import onnxruntime
    except ImportError as e:
        raise PluginError(
            f"the onnx runner needs ONNX Runtime, which cannot be imported ({e})",
            hint="try: pip install 'nanovllm[onnx]'",
        ) from e
    return onnxruntime


def available_threads(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Processors that this process may use: by its affinity, and by the quota of its container (Linux)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cpu_max.read_text(encoding="ascii").split()  # microseconds, or "max"
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, int(quota) // int(period)))
