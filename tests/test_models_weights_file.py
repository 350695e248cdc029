"""Our safetensors reader: equal to the library on good files, a ModelError on every bad one."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from nanovllm.errors import ModelError
from nanovllm_models import open_weights

GOOD = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}


def raw_file(path: Path, header: object, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(start: int = 0, stop: int = 4, shape: object = (1,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "?"])
def test_every_dtype_equals_the_library(tmp_path, dtype):
    rng = np.random.default_rng(0)
    tensors = {
        "matrix": rng.integers(0, 2, (5, 7)).astype(dtype),
        "scalar": np.array(1, dtype),
        "empty": np.zeros((0, 3), dtype),
        "cube": rng.integers(0, 100, (2, 3, 4)).astype(dtype),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    ours, theirs = open_weights(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(tensor.array, theirs[name])
        assert not tensor.array.flags.writeable
        assert not tensor.array.flags.owndata  # a view of the memory map


@pytest.mark.parametrize("shape", [(3,), (700, 300), (300, 700), (1, 1), (0, 4), (2, 3, 4)])
def test_bfloat16_widens_exactly_in_every_layout(tmp_path, shape):
    torch = pytest.importorskip("torch", reason="the oracle for bfloat16: pip install torch")
    from safetensors.torch import save_file as save_torch

    original = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    save_torch({"x": original}, tmp_path / "x.safetensors")
    tensor, wanted = open_weights(tmp_path / "x.safetensors")["x"], original.float().numpy()
    assert tensor.dtype == "BF16"
    np.testing.assert_array_equal(tensor.to_float32(), wanted)
    np.testing.assert_array_equal(tensor.T.to_float32(), wanted.T)
    transposed = np.empty(shape[::-1], np.float32)
    tensor.to_float32(transposed.T)
    np.testing.assert_array_equal(transposed, wanted.T)
    np.testing.assert_array_equal(tensor.rows(1, 2).to_float32(), wanted[1:2])


def test_widening_into_a_slice_leaves_the_rest(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors")
    out = np.zeros((3, 4), np.float32)
    open_weights(tmp_path / "x.safetensors")["a"].to_float32(out[:, 1:3].T)
    np.testing.assert_array_equal(out[:, 1:3], GOOD["a"].T)
    assert not out[:, [0, 3]].any()


def test_a_tensor_outlives_its_file_name(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors")
    tensor = open_weights(tmp_path / "x.safetensors")["a"]
    (tmp_path / "x.safetensors").unlink()
    np.testing.assert_array_equal(tensor.array, GOOD["a"])


@pytest.mark.skipif(sys.platform == "win32", reason="a mapped file cannot be cut there")
@pytest.mark.parametrize("shape", [(700, 300), (3000,)])
def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path, shape):
    """Reading it through the map would be a signal that ends the process."""
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    save_file({"x": values}, tmp_path / "x.safetensors")
    tensor = open_weights(tmp_path / "x.safetensors")["x"]
    bands = tensor.bands(256)
    np.testing.assert_array_equal(next(bands)[1], values[:256])
    os.truncate(tmp_path / "x.safetensors", 2000)
    with pytest.raises(ModelError, match=r"x\.safetensors was cut short while it was loaded"):
        list(bands)
    with pytest.raises(ModelError, match=r"x\.safetensors was cut short while it was loaded"):
        tensor.T.to_float32()


def test_a_disk_that_fails_is_named(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors")
    tensor = open_weights(tmp_path / "x.safetensors")["a"]

    class Broken(io.BytesIO):
        def readinto(self, buffer):
            raise OSError(errno.EIO, "Input/output error")

    tensor.file._file = Broken()
    with pytest.raises(ModelError, match=r"x\.safetensors cannot be read: Input/output error; check the disk"):
        tensor.to_float32()


def test_a_file_is_closed_when_its_last_tensor_is_gone(tmp_path):
    save_file(GOOD, tmp_path / "x.safetensors")
    tensor = open_weights(tmp_path / "x.safetensors")["a"].rows(0, 1)
    file = tensor.file._file
    assert not file.closed
    del tensor
    gc.collect()
    assert file.closed


BAD_HEADERS = {
    "not an object": ([1], b"", "object is expected"),
    "not JSON": (b"{'a': 1}", b"", "not usable JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not usable JSON"),
    "too deep": (b"[" * 100_000, b"", "not usable JSON"),
    "an endless number": (b'{"a": ' + b"9" * 5000 + b"}", b"", "not usable JSON"),
    "NaN": (b'{"a": NaN}', b"", "NaN"),
    "duplicate keys": (b'{"a": {}, "a": {}}', b"", "appears twice"),
    "entry is no object": ({"a": 3}, b"", "lacks dtype"),
    "entry lacks shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4), "lacks dtype"),
    "unknown dtype": ({"a": entry(dtype="F8_E4M3")}, bytes(4), "F8_E4M3"),
    "dtype is no text": ({"a": entry(dtype=["F32"])}, bytes(4), "dtype"),
    "shape is no list": ({"a": entry(shape=1)}, bytes(4), "shape"),
    "negative size": ({"a": entry(shape=[-1])}, bytes(4), "shape"),
    "boolean size": ({"a": entry(shape=[True])}, bytes(4), "shape"),
    "fractional size": ({"a": entry(shape=[1.0])}, bytes(4), "shape"),
    "too many sizes": ({"a": entry(shape=[1] * 65)}, bytes(4), "shape"),
    "overflowing product": ({"a": entry(shape=[2**62, 2**62])}, bytes(4), "does not take"),
    "one offset": ({"a": entry() | {"data_offsets": [0]}}, bytes(4), "data_offsets"),
    "boolean offset": ({"a": entry() | {"data_offsets": [False, 4]}}, bytes(4), "data_offsets"),
    "negative offset": ({"a": entry(-4, 0)}, bytes(4), "data_offsets"),
    "backward offsets": ({"a": entry(4, 0)}, bytes(4), "does not take"),
    "shape times dtype": ({"a": entry(0, 8)}, bytes(8), "does not take"),
    "data cut short": ({"a": entry()}, bytes(3), "cut short"),
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6), "overlaps"),
    "twice the same bytes": ({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4), "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "hole"),
    "hole at the start": ({"a": entry(4, 8)}, bytes(8), "hole"),
    "bytes left over": ({"a": entry()}, bytes(9), "belong to none"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "metadata is a list": ({"__metadata__": [1]}, b"", "__metadata__"),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header_is_named(tmp_path, name):
    header, data, cause = BAD_HEADERS[name]
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(ModelError) as error:
        open_weights(path)
    assert cause in str(error.value)
    assert "bad.safetensors" in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize("content", [b"", b"\x00", bytes(7)])
def test_too_short_for_a_header(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ModelError, match="cut short"):
        open_weights(tmp_path / "x")


@pytest.mark.parametrize(("size", "cause"), [(100, "cut short"), (100_000_001, "allowed"), (2**64 - 1, "allowed")])
def test_lying_header_length(tmp_path, size, cause):
    path = raw_file(tmp_path / "x", {}, b"", size)
    with pytest.raises(ModelError, match=cause):
        open_weights(path)


def test_missing_file(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        open_weights(tmp_path / "none.safetensors")


@given(data=st.data())
def test_mutated_files_raise_model_error_or_load(tmp_path_factory, data):
    raw = bytearray(save(GOOD, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "digit"]))
        if kind == "set":
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            raw = raw[: max(at, 1)]
        elif kind == "insert":
            raw[at:at] = data.draw(st.binary(max_size=3))
        else:
            digits = [i for i, b in enumerate(raw) if chr(b).isdigit()]
            if digits:
                raw[data.draw(st.sampled_from(digits))] = data.draw(st.sampled_from(list(b"0123456789-.e")))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(bytes(raw))
    try:
        tensors = open_weights(path)
    except ModelError as e:
        error, tensors = str(e), {}
    else:
        error = None
    assert error is None or str(path) in error
    assert sum(t.nbytes for t in tensors.values()) <= len(raw)
    for tensor in tensors.values():
        assert len(tensor.array.tobytes()) == tensor.nbytes  # every claimed byte can be read


@given(raw=st.binary(max_size=200))
def test_random_bytes_raise_model_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(raw)
    if raw[8:] == b"{}":
        return
    with pytest.raises(ModelError):
        open_weights(path)
