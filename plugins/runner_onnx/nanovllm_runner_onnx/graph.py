"""`Graph`: writes an ONNX graph node by node. Knows the format, and nothing of decoders.

Small constants lie inside the model. Weights do not: the model only declares them as external. Either
`Graph.weights` keeps their arrays, which the session is given beside the model (`session.py`), or a
`DataFile` takes each as it is declared and keeps none, so that a model of any size can be written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from nanovllm.errors import ModelError

OPSET = 21  # of the standard operators: the newest that every provider we aim at has
IR_VERSION = 10  # the file format that belongs to it
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
ALIGNMENT = 4096  # bytes: a weight begins on a page of its own, so that it can be mapped


class DataFile:
    """Weights in a file beside the model, in the order in which they come."""

    def __init__(self, file: BinaryIO, name: str, tell: Callable[[str], None]) -> None:
        """`name`: the file's, as the model is to say; `tell` gets the name of each weight before it is written."""
        self.name = name
        self._file, self._tell = file, tell

    def append(self, name: str, array: NDArray[Any]) -> tuple[int, int]:
        """Write the array; offset and length, in bytes."""
        self._tell(name)
        self._file.write(bytes(-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return offset, array.nbytes


class Graph:
    def __init__(
        self, float_type: type[np.floating[Any]] = np.float32, data: DataFile | None = None, opset: int = OPSET
    ) -> None:
        """`float_type` of what flows through the graph; `data` takes the weights, which are else kept."""
        self.float_type = float_type
        self.weights: dict[str, NDArray[Any]] = {}  # empty where `data` took them
        self.weight_bytes = 0  # of all that were declared
        self.metadata: dict[str, str] = {}  # travels with the model
        self._data, self._opset = data, opset
        self._declared: set[str] = set()
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        """Sizes that vary from step to step are named by a text."""
        self._inputs.append(helper.make_tensor_value_info(name, _code(dtype), shape))
        return name

    def output(self, name: str, dtype: type[np.generic], shape: Sequence[int | str]) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, _code(dtype), shape))
        return name

    def op(self, kind: str, *inputs: str, domain: str = "", name: str | None = None, **attributes: Any) -> str:
        """Append a node with one output, called `name` or by its number; what it is called."""
        return self.ops(kind, *inputs, domain=domain, names=[name or f"{kind}.{len(self._nodes)}"], **attributes)[0]

    def ops(self, kind: str, *inputs: str, domain: str = "", names: list[str], **attributes: Any) -> list[str]:
        """A node with several outputs."""
        self._nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names

    def constant(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """A small number, vector or table; equal ones are stored once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = f"constant.{len(self._constants)}"
            self._initializers.append(onnx.numpy_helper.from_array(array, self._constants[key]))
        return self._constants[key]

    def cast(self, x: str, dtype: type[np.generic]) -> str:
        return self.op("Cast", x, to=_code(dtype))

    def scalar(self, value: float) -> str:
        """A number of the graph's float type."""
        return self.constant(value, self.float_type)

    def has_weight(self, name: str) -> bool:
        return name in self._declared

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Declare an array that stays outside of the model. The same name again is the same weight."""
        if name in self._declared:
            return name
        self._declared.add(name)
        if array.dtype == np.float32:
            array = self._as_float_type(name, array)
        self.weight_bytes += array.nbytes
        proto = onnx.TensorProto(name=name, data_type=_code(array.dtype), dims=array.shape)
        proto.data_location = onnx.TensorProto.EXTERNAL
        if self._data is None:
            self.weights[name] = array
            proto.external_data.add(key="location", value=name)  # no file: `session.py` gives the array by this name
        else:
            offset, length = self._data.append(name, array)
            for key, value in (("location", self._data.name), ("offset", offset), ("length", length)):
                proto.external_data.add(key=key, value=str(value))
        self._initializers.append(proto)
        return name

    def _as_float_type(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        with np.errstate(over="ignore"):
            converted = array.astype(self.float_type, copy=False)
        if converted is not array and not np.isfinite(converted).all():
            raise ModelError(f"{name} has numbers beyond {np.dtype(self.float_type)}", hint="choose device: cpu")
        return converted

    def model(self) -> bytes:
        """The finished model, serialised: equal graphs give equal bytes."""
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", self._opset), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nanovllm")
        for key, value in sorted(self.metadata.items()):
            model.metadata_props.add(key=key, value=value)
        return bytes(model.SerializeToString(deterministic=True))


def _code(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
