"""`Graph`: writes an ONNX graph node by node. Knows the format, and nothing of decoders.

Small constants lie inside the model. Weights do not: the model only declares them as external, and
`weights` holds their arrays, which the session is given beside the model (`session.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

OPSET = 21  # of the standard operators: the newest that every provider we aim at has
IR_VERSION = 10  # the file format that belongs to it
MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
NOWHERE = "given to the session"  # stands for the file of an external weight


class Graph:
    def __init__(self) -> None:
        self.weights: dict[str, NDArray[Any]] = {}
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
        return self.constant(value, np.float32)

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Declare an array that stays outside of the model. The same name again is the same weight."""
        if name not in self.weights:
            self.weights[name] = array
            proto = onnx.TensorProto(name=name, data_type=_code(array.dtype), dims=array.shape)
            proto.data_location = onnx.TensorProto.EXTERNAL
            proto.external_data.add(key="location", value=NOWHERE)
            self._initializers.append(proto)
        return name

    def model(self) -> bytes:
        """The finished model, serialised."""
        graph = helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="nanovllm")
        return bytes(model.SerializeToString(deterministic=True))


def _code(dtype: Any) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
