"""`convert`: pickled weights -> safetensors, read by torch's restricted unpickler and only where the user allowed it.

The restricted unpickler takes tensors alone, but it has been got round before (CVE-2025-32434, CVE-2026-24747, both
mended in the torch that this package needs), hence the allowance. One file becomes one file: its tensors are mapped,
written one at a time, and read again and compared. Knows no model family: names stay what they are.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nanovllm.errors import ModelError, UnsupportedModelError
from nanovllm_models.checkpoint import INDEX, SINGLE
from nanovllm_models.export_files import copy_companions, directory_for, find_free_place
from nanovllm_models.files import find_file, read_json
from nanovllm_models.torch_files import KINDS, PICKLED, look_into
from nanovllm_models.weights_file import open_weights

from .archive import check_allowed

PICKLED_INDEX = "pytorch_model.bin.index.json"
USUAL = "pytorch_model.bin"
METADATA = "__metadata__"  # a name that the format keeps for itself
# torch's name of a type -> the format's.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def convert(
    model: str | Path,
    output: str | Path,
    allow_code_in: Sequence[Path],
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write the directory `output`, whole or not at all, and return its path.

    `model` is a directory with pickled weights, or a file of them. A tensor with several names is written under each
    of them. `tell` gets a line for each file that was converted.

    Raises ConfigError for a file in none of the places `allow_code_in` and a place that cannot be written,
    ModelError for files that hold anything but tensors by name.
    """
    path = Path(model).expanduser()
    directory = path if path.is_dir() else path.parent
    files = _pickled_files(path)
    why = "torch reads it with everything but tensors forbidden, and that has been got round before"
    real = [check_allowed(file, allow_code_in, "a pickle", why, option="--allow-code-in") for file in files]
    target = find_free_place(output)
    with directory_for(target) as part:
        copy_companions(directory, part)
        weight_map: dict[str, str] = {}
        for i, file in enumerate(files):
            name = SINGLE if len(files) == 1 else f"model-{i + 1:05}-of-{len(files):05}.safetensors"
            tensors = _read(real[i])
            if twice := tensors.keys() & weight_map.keys():
                raise ModelError(f"{file} holds {min(twice)!r:.100}, as another file does", hint="download it again")
            _write(part / name, tensors)
            _compare(part / name, tensors)
            weight_map |= dict.fromkeys(tensors, name)
            tell(f"{file.name} -> {name}")
        if len(files) > 1:
            size = sum((part / name).stat().st_size for name in set(weight_map.values()))
            index = {"metadata": {"total_size": size}, "weight_map": weight_map}
            (part / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return target


def _pickled_files(path: Path) -> list[Path]:
    """The file, or those of the directory that its index or their usual name says; else the only one there."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelError(f"Model directory not found: {path}", hint="give a directory with pickled weights, or a file")
    if (index_path := find_file(path, PICKLED_INDEX)) is not None:
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index_path}: weight_map does not map tensors to files", hint="download it again")
        names = sorted(set(weight_map.values()))
    elif find_file(path, USUAL) is not None:
        names = [USUAL]
    else:
        names = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
        if len(names) > 1:
            raise ModelError(
                f"{path} has {len(names)} files of weights: {', '.join(names[:5])}", hint="give one of them"
            )
    if not names:
        raise ModelError(f"{path} has no pickled weights (no {' or '.join('*' + suffix for suffix in PICKLED)})")
    found = {name: find_file(path, name) for name in names}
    if lacking := [name for name, file in found.items() if file is None]:
        raise ModelError(f"{path} lacks {lacking[0]!r:.100}, which its index names", hint="download it again")
    return [file for file in found.values() if file is not None]


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors by name, mapped where the file's format allows it."""
    if (kind := look_into(path)[0]) != "pickle":
        hint = "`runner: torch` runs it as it is" if kind in KINDS else "give a file of weights"
        raise UnsupportedModelError(f"{path} is {KINDS.get(kind, kind)}, not pickled weights", hint=hint)
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # torch's format since 1.6
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)  # an error says it, if need be
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as e:  # whatever is wrong inside: torch has no type of error for that
        if called := re.search(r"\bGLOBAL (\S+)", str(e)):
            raise UnsupportedModelError(
                f"{path} holds more than tensors: to read it would call {called[1]:.100}",
                hint="do not trust it, or have its maker save a state_dict()",
            ) from e
        # The restricted unpickler's own words come after advice to do without it.
        own_words = re.search(r"WeightsUnpickler error:\s*(.+)", str(e))
        cause = own_words[1] if own_words else (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ModelError(f"torch {torch.__version__} cannot read {path}: {cause:.200}", hint="download it again") from e
    if not isinstance(held, Mapping):
        raise UnsupportedModelError(
            f"{path} holds a {type(held).__name__}, not tensors by name", hint="save a state_dict()"
        )
    for name, tensor in held.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or name == METADATA:
            raise UnsupportedModelError(
                f"{path} holds {name!r:.100}, a {type(tensor).__name__}, beside tensors by name",
                hint="save only the state_dict() of the model",
            )
        is_plain = tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_neg()
        if not is_plain or tensor.dtype not in DTYPES or tensor.device.type != "cpu":
            raise UnsupportedModelError(
                f"{path}: {name!r:.100} is a tensor of {tensor.dtype}, {tensor.layout} on {tensor.device}",
                hint=f"have its maker save plain numbers of one of {', '.join(DTYPES.values())}",
            )
        held_bytes, claimed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        if claimed > held_bytes:  # a few bytes that claim to be terabytes, by strides of 0
            raise UnsupportedModelError(
                f"{path}: {name!r:.100} claims {claimed:,} bytes and holds {held_bytes:,}",
                hint="do not trust it, or have its maker save contiguous tensors",
            )
    if not held:
        raise ModelError(f"{path} holds no tensors", hint="download it again")
    return {name: tensor.detach() for name, tensor in held.items()}


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """https://github.com/huggingface/safetensors#format: the header's size, the header, the numbers."""
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes(tensor).data)


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read again by the reader that will use it."""
    written = open_weights(path)
    for name, tensor in tensors.items():
        found = np.ascontiguousarray(written[name].array).reshape(-1).view(np.uint8)
        if not np.array_equal(found, _bytes(tensor)):
            raise ModelError(f"{name!r} was not written as it was read", hint="check the disk, then run this again")


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """Its numbers in the order of its axes, little-endian as on every machine that torch runs on."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
