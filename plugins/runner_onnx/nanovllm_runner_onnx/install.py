"""Which ONNX Runtime is installed, and whether it will do. Knows no session.

Several distributions bring the one import name `onnxruntime`. Installed together, they overwrite each
other's files, and what is left runs on the CPU whatever the configuration says.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib import metadata
from typing import Any

from packaging.version import Version

from nanovllm.errors import PluginError

from .options import Device

log = logging.getLogger(__name__)

DISTRIBUTIONS = (
    "onnxruntime", "onnxruntime-gpu", "onnxruntime-directml",
    "onnxruntime-openvino", "onnxruntime-qnn", "onnxruntime-rocm", "onnxruntime-training",
)  # fmt: skip
OVERWRITTEN = "are installed together and overwrite each other's files"
EXTRAS: dict[Device, str] = {"cpu": "onnx", "cuda": "onnx-cuda", "directml": "onnx-directml"}
# The oldest that run our graphs. cpu: int4's quantised tables; every precision was run on 1.23.2, 1.24.4 and 1.31.1.
# cuda: slots and bounds of PagedAttention. directml: who computes what is told from there on (and it is the last).
OLDEST: dict[Device, Version] = {"cpu": Version("1.23"), "cuda": Version("1.29"), "directml": Version("1.24")}


def import_onnxruntime(device: Device = "cpu") -> Any:
    """The module. Raises PluginError with the pip line if there is none, it is too old, or there are several."""
    installed = installed_distributions()
    if len(installed) > 1:
        message = f"{' and '.join(installed)} {OVERWRITTEN}"
        if device != "cpu":
            raise PluginError(message, hint=f"keep one: {pip_line(device)}")
        log.warning("%s; keep one: %s", message, pip_line(device))
    try:
        import onnxruntime
    except ImportError as e:
        problem = f"onnxruntime cannot be imported ({e})" if installed else "onnxruntime not installed"
        raise PluginError(f"{problem}, and the onnx runner needs ONNX Runtime", hint=f"try: {pip_line(device)}") from e
    if Version(onnxruntime.__version__) < OLDEST[device]:
        raise PluginError(
            f"ONNX Runtime {onnxruntime.__version__} is too old for device: {device}, which needs {OLDEST[device]}",
            hint=f"try: pip install --upgrade 'nanovllm[{EXTRAS[device]}]'",
        )
    return onnxruntime


def require_onnx() -> None:
    """Raises PluginError if the package that reads and writes graphs cannot be imported."""
    try:
        import onnx  # noqa: F401
    except ImportError as e:
        raise PluginError(
            f"the onnx runner needs the package onnx, which cannot be imported ({e})",
            hint="try: pip install 'nanovllm[onnx]'",
        ) from e


def pip_line(device: Device) -> str:
    """The command after which exactly the distribution for the device is installed."""
    others = installed_distributions()
    install = f"pip install 'nanovllm[{EXTRAS[device]}]'"
    return f"pip uninstall -y {' '.join(others)} && {install}" if others else install


def installed_distributions() -> list[str]:
    """Those of DISTRIBUTIONS; more than one is a mistake."""
    found = []
    for name in DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            found.append(name)
    return found
