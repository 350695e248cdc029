"""The tensors of a graph that somebody else wrote: do they have the bytes that their shapes ask for, and where?

ONNX Runtime allocates what a shape says. Here every shape is held against the bytes that are there, in the graph's
own file or in files of the model's directory, so that a small file cannot ask for much. No data are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import prod
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from nanovllm.errors import ModelError
from nanovllm_models.files import find_file

if TYPE_CHECKING:
    from onnx import TensorProto

MAX_SHARING = 2  # bytes of tensors per byte of the files they lie in: tied weights may be named twice
MAX_RANK = 100
DOWNLOAD = "the file is damaged or not what its name says: download or export it again"
DATA_KEYS = {"location", "offset", "length", "checksum"}
NAMES = {"float": "float32", "double": "float64"}  # the others' names are NumPy's


def check_tensors(path: Path, root: Path, tensors: Sequence[TensorProto]) -> tuple[int, dict[str, int]]:
    """(bytes of all tensors, name -> size of the files in `root` that hold some of them) of the graph at `path`.

    Raises ModelError for a tensor whose bytes are not there, or lie where they must not.
    """
    total, files, external = 0, {}, Counter[str]()
    for tensor in tensors:
        where = f"{path}: tensor {tensor.name!r:.100}"
        num_bytes = _check_size(tensor, where)
        total += num_bytes
        if tensor.data_location == tensor.EXTERNAL:
            name, size = _check_external(tensor, num_bytes, where, path, root)
            files[name] = size
            external[name] += num_bytes
    for name, num_bytes in external.items():
        if num_bytes > MAX_SHARING * files[name]:
            raise ModelError(
                f"{path} takes {num_bytes:,} bytes of tensors from {name!r:.100}, which has {files[name]:,}",
                hint=DOWNLOAD,
            )
    return total, files


def _check_size(tensor: TensorProto, where: str) -> int:
    """Bytes of the tensor by type and shape; those that lie in the graph's own file must be exactly as many."""
    if len(tensor.dims) > MAX_RANK:  # the product of very many would take hours
        raise ModelError(f"{where} has {len(tensor.dims):,} dimensions", hint=DOWNLOAD)
    dims = tuple(tensor.dims)
    if any(d < 0 for d in dims) or prod(d or 1 for d in dims) >= 2**63:
        raise ModelError(f"{where} has the impossible shape {list(dims)!s:.100}", hint=DOWNLOAD)
    count, dtype = prod(dims), dtype_name(tensor.data_type)
    if dtype == "string":
        num_bytes, have, wanted = sum(map(len, tensor.string_data)), len(tensor.string_data), count
    elif match := re.match(r"(?:bool|u?int|b?float|complex)(\d*)", dtype):
        bits = int(match[1] or 8)
        num_bytes = -(-count * bits // 8)
        if tensor.HasField("raw_data"):
            have, wanted = len(tensor.raw_data), num_bytes
        else:  # one number each, but of those smaller than a byte as many as fit
            fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data, tensor.uint64_data)
            have, wanted = sum(map(len, fields)), count if bits >= 8 else num_bytes
    else:
        raise ModelError(f"{where} has the unknown type {dtype}", hint="try: pip install --upgrade onnx")
    if tensor.data_location != tensor.EXTERNAL and have != wanted:
        raise ModelError(f"{where} of shape {list(dims)} has {have:,} of {wanted:,} values or bytes", hint=DOWNLOAD)
    return num_bytes


def _check_external(tensor: TensorProto, num_bytes: int, where: str, path: Path, root: Path) -> tuple[str, int]:
    """(name, size) of the file in the model directory that holds the tensor."""
    entries = {e.key: e.value for e in tensor.external_data}
    if len(entries) < len(tensor.external_data) or not entries.keys() <= DATA_KEYS or "location" not in entries:
        keys = ", ".join(e.key for e in tensor.external_data)
        raise ModelError(
            f"{where} says where its data are by {keys or 'nothing'!s:.100}; understood are a location and, once each, "
            "offset, length and checksum",
            hint=DOWNLOAD,
        )
    location = entries["location"]
    # The last is how ONNX Runtime writes an address in its own memory.
    if PurePath(location).is_absolute() or ".." in re.split(r"[/\\]", location) or "_ORT_MEM_ADDR_" in location:
        raise ModelError(
            f"{where} lies outside of the model directory, in {location!r:.100}",
            hint="do not use this model; if you trust it, export it again",
        )
    name = (path.parent.relative_to(root) / location).as_posix()
    file = find_file(root, name)
    if file is None:
        raise ModelError(f"{where} lies in {name!r:.100}, which is not there", hint=f"put it beside {path.name}")
    status = file.stat()
    # A hub's cache may share the files of its blobs/, the one place outside of the directory that find_file allows.
    if status.st_nlink > 1 and file.resolve().is_relative_to(root.resolve()):
        raise ModelError(
            f"{where} lies in {name!r:.100}, which is also the file of another name (a hard link), perhaps outside",
            hint="replace it by a copy of its own if you trust it",
        )
    numbers = (entries.get("offset") or "0", entries.get("length") or str(num_bytes))
    if not all(re.fullmatch(r"[0-9]{1,19}", number) for number in numbers) or int(numbers[1]) != num_bytes:
        raise ModelError(
            f"{where} has offset {numbers[0]!r:.30} and length {numbers[1]!r:.30} in {name!r:.100}, but its shape "
            f"{list(tensor.dims)} needs {num_bytes:,} bytes",
            hint=DOWNLOAD,
        )
    end = int(numbers[0]) + num_bytes
    if end > status.st_size:
        raise ModelError(
            f"{where} ends at byte {end:,} of {name!r:.100}, which has {status.st_size:,}",
            hint="the file is truncated: download or export it again",
        )
    return name, status.st_size


def dtype_name(code: int) -> str:
    """NumPy's name of a tensor's type, where NumPy has it; ONNX's in small letters otherwise."""
    from onnx import TensorProto

    if code not in TensorProto.DataType.values():
        return f"number {code}"
    name = TensorProto.DataType.Name(code).lower()
    return NAMES.get(name, name)
