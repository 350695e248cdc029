"""Checkpoints that the conformance suite makes: random weights, and numbers that are all different. Needs no library.

This file knows no family; what a file of one holds, `layout.py` says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .checkpoint import SINGLE
from .layout import stored_weights
from .registry import Family
from .spec import DecoderSpec

Tensors: TypeAlias = dict[str, NDArray[np.float32]]  # by their names in the file


def random_tensors(family: Family, spec: DecoderSpec) -> Tensors:
    """Weights of about the size that real ones have; those of norms around 1."""
    rng = np.random.default_rng(0)

    def values(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        if len(shape) == 1:
            return np.float32(0.2) * rng.standard_normal(shape, np.float32) + np.float32("norm" in name)
        return rng.standard_normal(shape, np.float32) / np.float32(spec.hidden_size**0.5)

    return {name: values(names[0], shape) for name, names, shape in _stored(family, spec)}


def counting_tensors(family: Family, spec: DecoderSpec) -> Tensors:
    """0, 1, 2, ... through the whole file: no two numbers are equal."""
    tensors, start = {}, 0
    for name, _, shape in _stored(family, spec):
        size = prod(shape)
        tensors[name] = np.arange(start, start + size, dtype=np.float32).reshape(shape)
        start += size
    return tensors


def _stored(family: Family, spec: DecoderSpec) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """(name in the file, canonical names, shape); of several names for the same weights, the first."""
    seen = set()
    for stored in stored_weights(family, spec):
        if stored.names not in seen:
            seen.add(stored.names)
            yield stored.file_name, stored.names, stored.shape


def write_checkpoint(directory: Path, config: Mapping[str, Any], tensors: Tensors) -> None:
    """config.json and safetensors (https://github.com/huggingface/safetensors#format), without that library."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config)), "utf-8")
    header, offset = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (directory / SINGLE).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor, "<f4").tobytes())
