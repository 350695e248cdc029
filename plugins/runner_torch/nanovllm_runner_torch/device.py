"""Where the model computes, in which number type, on how many threads. Every wish is met or refused.

Knows no model. `auto` is the only word that chooses; whatever was named is never replaced by another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray

from nanovllm.errors import ConfigError, NanoVLLMError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NO_MEMORY = ("can't allocate memory", "bad_alloc")  # torch's allocator for a CPU; oneDNN's and everybody else's


def find_device(name: str) -> torch.device:
    """`name` as in TorchOptions. Raises ConfigError for one that is absent, or too old for this torch."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        cause = "finds no GPU that it can use" if torch.version.cuda else "was built for the CPU only"
        raise ConfigError(
            f"runner.device is {name!r}, but torch {torch.__version__} {cause}",
            hint="set runner.device to cpu, or install a torch for your GPU (https://pytorch.org)",
        )
    device = torch.device("cuda:0" if name in ("auto", "cuda") else name)
    count = torch.cuda.device_count()
    if device.index >= count:
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise ConfigError(
            f"runner.device is {name!r}, but torch finds {count} GPU{'s' * (count > 1)}: {there}",
            hint=f"set runner.device to one of cpu, {there}",
        )
    capability = torch.cuda.get_device_capability(device)
    built_for = [int(number) for arch in torch.cuda.get_arch_list() for number in re.findall(r"^sm_(\d+)", arch)]
    if built_for and capability[0] * 10 + capability[1] < min(built_for):
        raise ConfigError(
            f"{device} ({torch.cuda.get_device_name(device)}) has compute capability {capability[0]}.{capability[1]}, "
            f"older than any that torch {torch.__version__} was built for (sm_{min(built_for)} on)",
            hint="set runner.device to cpu, or install an older torch",
        )
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """`name` as in TorchOptions. Raises ConfigError for a type that the device has no kernels for."""
    if device.type == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
        able = {"fp32": True, "bf16": is_native, "fp16": True}
    else:
        is_native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        able = {
            "fp32": True,
            "bf16": has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
            "fp16": has_onednn() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
        }
    if name == "auto":
        return torch.bfloat16 if is_native and able["bf16"] else torch.float32
    if not able[name]:
        raise ConfigError(
            f"runner.dtype is {name!r}, in which {device} does not compute",
            hint=f"set runner.dtype to auto or one of {', '.join(other for other, is_able in able.items() if is_able)}",
        )
    return DTYPES[name]


def check_int8(device: torch.device) -> None:
    if device.type != "cpu" or not has_onednn():
        raise ConfigError(
            f"runner.weights is 'int8', which needs oneDNN on a CPU, and the model runs on {device}",
            hint="set runner.weights to auto, or runner.device to cpu",
        )


def has_onednn() -> bool:
    """oneDNN's kernels are the fast ones on a CPU; builds for some platforms lack them."""
    return torch.backends.mkldnn.is_available()


def use_threads(num_threads: int) -> None:
    """Before every step: torch has one number for the process, which another runner in it may have changed."""
    if torch.get_num_threads() != num_threads:
        torch.set_num_threads(num_threads)


def send(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device, or itself as a tensor on a CPU.

    Does not wait for what a GPU has still to compute: CUDA takes its own copy of memory that is not pinned.
    """
    return torch.from_numpy(array).to(device, non_blocking=True)


@contextmanager
def memory_for(what: str, hint: str, kind: type[NanoVLLMError] = ConfigError) -> Iterator[None]:
    """Turns "out of memory" into an error that says for what, and what the allocator says."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not _is_out_of_memory(e):
            raise
        cause = (str(e).splitlines() or ["MemoryError"])[0]
        raise kind(f"{what} does not fit in memory: {cause}", hint=hint) from e


def _is_out_of_memory(e: Exception) -> bool:
    """NumPy has one type for it, torch another on a GPU and none on a CPU."""
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or any(words in str(e) for words in _NO_MEMORY)
