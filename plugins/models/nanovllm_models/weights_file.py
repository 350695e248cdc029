"""Our own reader of safetensors files: memory-mapped, zero-copy, and strict about every number.

Layout: 8 bytes little-endian N; N bytes of JSON, `{name: {dtype, shape, data_offsets: [from, to)}}`
plus an optional `__metadata__` of texts; then the data, which the tensors must cover exactly, in
any order, without overlap or hole. https://github.com/huggingface/safetensors#format

Nothing is read until a tensor is used. bfloat16, which NumPy lacks, is a uint16 view of its bits. Widening reads
the file and not the map: where a file was cut short since it was opened, a read is an error that can be told, while
touching the map kills the process. This file knows no model; a name means nothing to it.
"""

from __future__ import annotations

import errno
import mmap
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nanovllm.errors import ModelError

from .files import MAX_JSON_BYTES, parse_json

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32's bits
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_DIMS = 8
TILE = 256  # rows that are read at once


class WeightsFile:
    """An open file, by whatever name it goes now. For one thread at a time."""

    def __init__(self, path: Path, file: BufferedReader, mapped: NDArray[np.uint8]) -> None:
        """Owns `file`, which is closed when the last tensor is gone."""
        self._path, self._file, self._address = path, file, _address(mapped)
        weakref.finalize(self, file.close)

    def read(self, part: NDArray[Any]) -> NDArray[Any]:
        """What the file holds for `part`, a view into its map: an array of the same dtype, shape and strides.

        Raises ModelError if the file is shorter now, or cannot be read.
        """
        num_bytes = part.itemsize + sum((n - 1) * stride for n, stride in zip(part.shape, part.strides, strict=True))
        buffer = np.empty(num_bytes, np.uint8)
        try:
            self._file.seek(_address(part) - self._address)
            num_read = self._file.readinto(buffer.data)
        except OSError as e:
            raise ModelError(f"{self._path} cannot be read: {e.strerror or e}", hint="check the disk") from e
        if num_read < num_bytes:
            raise ModelError(
                f"{self._path} was cut short while it was loaded", hint="wait until whatever writes it is done"
            )
        return np.ndarray(part.shape, part.dtype, buffer, strides=part.strides)


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file, or a part of it: a read-only view into the memory map."""

    name: str  # in the file
    dtype: str  # as the file spells it: F32, F16, BF16, ...
    array: NDArray[Any]  # any strides; BF16 as uint16
    file: WeightsFile  # where it lies
    is_grouped: bool = False  # the array's first two axes together are the tensor's rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Its own, whatever the array's axes are."""
        if self.is_grouped:
            groups, rows, *rest = self.array.shape
            return (groups * rows, *rest)
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """As stored in the file."""
        return self.array.nbytes

    @property
    def T(self) -> Tensor:
        """Its axes in the opposite order, without a copy."""
        return Tensor(self.name, self.dtype, self.array.T, self.file)

    def rows(self, start: int, stop: int, groups: int = 1) -> Tensor:
        """Rows [start, stop), or of each of `groups` equal runs of rows that part of it which they are of the whole."""
        if groups == 1:
            return Tensor(self.name, self.dtype, self.array[start:stop], self.file)
        runs = self.array.reshape(groups, -1, *self.shape[1:])
        return Tensor(self.name, self.dtype, runs[:, start // groups : stop // groups], self.file, is_grouped=True)

    def bands(self, num_rows: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """The rows in float32, `num_rows` at a time: (first row, rows). Grouped rows lie in runs and come at once."""
        step = self.shape[0] if self.is_grouped else num_rows
        for first in range(0, self.shape[0], step):
            part = self if self.is_grouped else self.rows(first, min(first + step, self.shape[0]))
            yield first, part.to_float32()

    def flat(self, num_axes: int) -> Tensor:
        """Its last axes, the leading ones merged into the first of them."""
        shape = self.shape
        array = self.array.reshape(-1, *shape[len(shape) - num_axes + 1 :])
        return Tensor(self.name, self.dtype, array, self.file)

    def to_float32(self, out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Widened into `out` (same shape, any strides), or into a new array.

        Reads bands of TILE rows, so that loading a model costs the memory of the copy and not of the file as well.
        Raises ModelError if the file is not what it was when it was opened.
        """
        if out is None:
            out = np.empty(self.shape, np.float32)
        if out.shape != self.shape:
            raise ValueError(f"out has shape {out.shape}, the tensor {self.shape}")
        if self.is_grouped:
            for group, target in zip(self.array, out.reshape(self.array.shape), strict=True):
                Tensor(self.name, self.dtype, group, self.file).to_float32(target)
            return out
        if not self.array.size:
            return out
        if self.array.ndim != 2:
            _widen(self.dtype, self.file.read(self.array), out)
            return out
        # Bands of rows as they lie in the file; in tiles where `out` lies the other way round, because a
        # transposing copy that strides through whole rows misses the cache on every element (5 times slower).
        source, target = (self.array.T, out.T) if self.array.strides[0] < self.array.strides[1] else (self.array, out)
        rows, columns = source.shape
        width = TILE if target.strides[0] < target.strides[1] else max(columns, 1)
        for i in range(0, rows, TILE):
            band = self.file.read(source[i : i + TILE])
            for j in range(0, columns, width):
                _widen(self.dtype, band[:, j : j + width], target[i : i + TILE, j : j + width])
        return out


def _widen(dtype: str, source: NDArray[Any], out: NDArray[np.float32]) -> None:
    if dtype == "BF16":
        np.left_shift(source, np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, as in every cast
            np.copyto(out, source, casting="same_kind")


def open_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file, by name.

    Raises ModelError naming the file and the tensor if anything in the header is not as the format says.
    """
    try:
        with ExitStack() as undo:
            opened = undo.enter_context(path.open("rb"))
            size = opened.seek(0, 2)
            if size < 8:
                raise _bad(path, f"the file has {size} bytes and is cut short")
            data = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            undo.pop_all()
    except OSError as e:
        hint = "check its permissions"
        if e.errno == errno.ENOMEM:  # as much of the address space is mapped, none of it copied
            hint = "its size must fit in the process's address space: raise the limit (ulimit -v)"
        raise ModelError(f"{path} cannot be read: {e.strerror or e}", hint=hint) from e
    file = WeightsFile(path, opened, data)
    header_size = int.from_bytes(file.read(data[:8]).tobytes(), "little")
    if header_size > MAX_JSON_BYTES:
        raise _bad(path, f"it claims a header of {header_size:,} bytes, more than the {MAX_JSON_BYTES:,} allowed")
    begin = 8 + header_size
    if begin > size:
        raise _bad(path, f"it claims a header of {header_size:,} bytes but the file has {size:,}: it is cut short")
    header = parse_json(file.read(data[8:begin]).tobytes(), f"the header of {path}")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad(path, "__metadata__ is not an object of texts")
    spans: list[tuple[int, int, str]] = []
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        dtype, shape, start, stop = _entry(path, name, entry)
        if stop > size - begin:
            raise _bad(path, f"tensor {name!r} ends at byte {stop:,} of {size - begin:,}: the file is cut short")
        spans.append((start, stop, name))
        array = np.frombuffer(data, DTYPES[dtype], prod(shape), begin + start).reshape(shape)
        tensors[name] = Tensor(name, dtype, array, file)
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise _bad(path, f"tensor {name!r} {'overlaps another' if start < end else 'leaves a hole before it'}")
        end = stop
    if end != size - begin:
        raise _bad(path, f"{size - begin - end:,} bytes after the last tensor belong to none")
    return tensors


def _entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and data_offsets of one header entry, checked against each other."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _bad(path, f"tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _bad(path, f"tensor {name!r} has dtype {dtype!r:.40}, not one of {', '.join(DTYPES)}")
    if not _naturals(shape) or len(shape) > MAX_DIMS:
        raise _bad(path, f"tensor {name!r} has shape {shape!r:.80}, not at most {MAX_DIMS} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise _bad(path, f"tensor {name!r} has data_offsets {offsets!r:.80}, not two positions")
    start, stop = offsets
    if stop - start != prod(shape) * DTYPES[dtype].itemsize:
        raise _bad(path, f"tensor {name!r} has {stop - start:,} bytes, which {dtype} {shape!r:.80} does not take")
    return dtype, tuple(shape), start, stop


def _naturals(value: object) -> bool:
    """A list of whole numbers from 0 to 2**63; True is no number here."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _bad(path: Path, cause: str) -> ModelError:
    return ModelError(f"{path} is not a valid safetensors file: {cause}", hint="download it again")
