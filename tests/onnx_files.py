"""Small ONNX models, whole and broken, for the tests that judge files. None is a language model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

DATA = "model.onnx.data"


def graph_model(
    initializers: Iterable[TensorProto] = (),
    nodes: Iterable[NodeProto] = (),
    *,
    opsets: dict[str, int] | None = None,
    ir_version: int = 10,
    dtype: int = TensorProto.FLOAT,
    functions: Sequence[Any] = (),
) -> ModelProto:
    """y = Identity(x), with whatever is given beside it."""
    inputs, outputs = ([helper.make_tensor_value_info(name, dtype, ["n"])] for name in "xy")
    nodes = [*nodes, helper.make_node("Identity", ["x"], ["y"])]
    return helper.make_model(
        helper.make_graph(nodes, "test", inputs, outputs, list(initializers)),
        opset_imports=[helper.make_opsetid(*o) for o in (opsets or {"": 21}).items()],
        ir_version=ir_version,
        functions=functions,
        producer_name="tests",
    )


def tensor(name: str = "w", values: Any = (1.0, 2.0, 3.0, 4.0), dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def claimed(
    dims: Sequence[int], data: bytes = b"\0" * 4, dtype: int = TensorProto.FLOAT, name: str = "w"
) -> TensorProto:
    """A tensor that says to have `dims`, whatever its data."""
    return TensorProto(name=name, data_type=dtype, dims=dims, raw_data=data)


def external(dims: Sequence[int] = (4,), name: str = "w", **entries: object) -> TensorProto:
    """A float32 tensor in another file; `entries`: location, offset, length, ..."""
    proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": DATA, **entries}.items():
        proto.external_data.add(key=key, value=str(value))
    return proto


def branch(*initializers: TensorProto) -> NodeProto:
    """An If whose branch holds initializers of its own."""

    def half(name: str, own: Iterable[TensorProto]) -> GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        constant = helper.make_node("Constant", [], [name], value=tensor(values=[1.0]))
        return helper.make_graph([constant], name, [], [out], list(own))

    return helper.make_node("If", ["c"], ["z"], then_branch=half("a", initializers), else_branch=half("b", ()))


def save(directory: Path, model: ModelProto, data: bytes | None = None, name: str = "model.onnx") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if data is not None:
        (directory / DATA).write_bytes(data)
    (directory / name).write_bytes(model.SerializeToString())
    return directory / name
