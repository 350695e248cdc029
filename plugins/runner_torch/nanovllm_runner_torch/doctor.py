"""`examine`: torch for `nanovllm doctor`: its build, where it computes a product, and in which number types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanovllm.doctor import Case, Finding, keep_busy, tell_threads
from nanovllm.doctor.gpus import nvidia_gpus
from nanovllm.errors import ConfigError
from nanovllm.threads import available_threads

from .options import TorchOptions

if TYPE_CHECKING:
    import torch

SIZE = 512  # of the matrices: a product takes some milliseconds
ROWS = 4
TOLERANCE = 0.05  # of the largest number of a product, where 8 bits are the fewest of a number


def examine(case: Case) -> Iterator[Finding]:
    is_chosen = case.is_chosen("runner", "torch")
    options = case.options("runner", "torch", TorchOptions) or TorchOptions()
    try:
        import torch
    except (ImportError, OSError) as e:  # OSError: a library of its own cannot be loaded
        told = f"torch cannot be imported ({e}), and the torch runner needs it"
        yield Finding("error" if is_chosen else "note", told, "pip install 'nanovllm[torch]'")
        return
    from .device import find_device

    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for the CPU only"
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", f"torch {torch.__version__}, built {built}; its kernels for this processor: {capability}")
    if not torch.version.cuda:
        for gpu in nvidia_gpus():
            yield Finding(
                "warning" if is_chosen else "note", f"{gpu} is not used: this torch was built for the CPU only",
                "pip uninstall -y torch && pip install torch, with the index that https://pytorch.org names for it",
            )  # fmt: skip
    try:
        device = find_device(options.device)
    except ConfigError as e:
        yield Finding("error", e.message, e.hint)
        return
    threads = None if case.loaded is None else case.loaded.config.runner.threads
    yield _product(device, threads or available_threads())
    yield from _kernels(device)


def _product(device: torch.device, threads: int) -> Finding:
    import torch

    from .device import use_threads

    use_threads(threads)
    x = torch.ones(SIZE, SIZE, device=device)
    busy = keep_busy(lambda: float((x @ x)[0, 0]))  # float waits for a GPU
    product = x @ x
    computed = f"a matrix product was computed on {product.device}"
    if not bool((product == SIZE).all()):
        return Finding("error", f"{computed} and is wrong: {float(product[0, 0])} instead of {SIZE}")
    if device.type != "cpu":
        return Finding("ok", f"{computed}, {torch.cuda.get_device_name(device)}")
    return tell_threads(computed, busy, threads)


def _kernels(device: torch.device) -> Iterator[Finding]:
    """A product in each number type by the layers that the runner uses, against the same in fp32."""
    import torch

    from .device import DTYPES, check_int8, find_dtype
    from .linear import FloatLinear, Int8Linear, Linear, quantised

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, SIZE, generator=generator) for n in (SIZE, ROWS))
    exact = x @ weight.T
    run, lacks = [], []
    for name in (*DTYPES, "int8"):
        try:
            if name == "int8":
                check_int8(device)
                integers, scales = quantised(weight)
                linear: Linear = Int8Linear(integers, scales, None)
            else:
                linear = FloatLinear(weight.to(device, find_dtype(name, device)), None)
        except ConfigError:
            lacks.append(name)
            continue
        off = float((linear(x.to(device)).float().cpu() - exact).abs().max() / exact.abs().max())
        if off > TOLERANCE:
            yield Finding("error", f"a product in {name} on {device} is wrong by {off:.0%}", "set runner.dtype: fp32")
        else:
            run.append(name)
    fast = next(name for name, dtype in DTYPES.items() if dtype == find_dtype("auto", device))
    text = f"products on {device} run in {', '.join(run)}; `dtype: auto` takes {fast}"
    if lacks:
        text += f"; there are no kernels for {', '.join(lacks)}"
    if fast == "fp32" and "bf16" in run:
        text += "; bf16 works and is not this processor's own, so it is no faster"
    yield Finding("ok", text)
