"""NVIDIA's GPUs, as the driver's own program tells them. Knows no library that would compute on them."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    capability: float  # 7.0 = Volta, 8.0 = Ampere, 9.0 = Hopper
    driver: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability}, driver {self.driver})"


def nvidia_gpus() -> list[Gpu]:
    """Empty where there is none, or no driver."""
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    query = (program, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader")
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        rows = [line.split(", ") for line in told.splitlines()]
        return [Gpu(name, float(capability), driver) for name, capability, driver in rows]
    except (OSError, ValueError, subprocess.SubprocessError):  # the driver does not answer, or says something else
        return []
