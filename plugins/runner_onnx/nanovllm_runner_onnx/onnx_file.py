"""`read_header`: an .onnx file that somebody else wrote, judged before ONNX Runtime sees it.

What is checked: that it is a whole ONNX model, that the installed ONNX Runtime knows its operator sets, that
every tensor of it (of subgraphs, functions and attributes too) has exactly the bytes that its shape asks for,
and that what lies in other files lies in the model's directory and inside those files. So what ONNX Runtime
allocates for weights is bounded by the size of the files. Memory that a graph asks for while it runs
(ConstantOfShape, Expand, Tile, Range of a large number) cannot be known from the file: for models of strangers
set a limit on the process (`ulimit -v`).

A directory at rest is judged. ONNX Runtime opens the files again by their names, so who can write to the directory
between these two moments can exchange what was judged; that is not covered.

The graph is parsed with the protobuf library: one that holds its weights takes twice its size for a moment, no more
than ONNX Runtime takes after it. Data in other files are not read. This file knows no decoder.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm.errors import ModelError, UnsupportedModelError

from .branches import same_until
from .install import import_onnxruntime
from .onnx_tensors import DOWNLOAD, check_tensors, dtype_name

if TYPE_CHECKING:
    from onnx import ModelProto

MAX_BYTES = 2**31 - 1  # of a protobuf message; larger models keep their weights in other files


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of the graph."""

    name: str
    dtype: str  # float32, float16, int64, ...; NumPy's name where it has the type
    shape: tuple[int | str | None, ...]  # a text names a size that varies, None is one without a name


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the file says of itself, without its weights."""

    path: Path
    ir_version: int
    opsets: Mapping[str, int]  # domain -> version; "" is ai.onnx
    producer: str  # "pytorch 2.13.0"; "" if it does not say
    metadata: Mapping[str, str]
    ops: frozenset[tuple[str, str]]  # (domain, operator), without the functions that the file itself defines
    inputs: tuple[Value, ...]  # what a run must be given
    outputs: tuple[Value, ...]
    same_until: int | None  # tokens beyond which the graph takes another branch (branches.py); None: never
    weight_bytes: int  # of all tensors, in the file's own types
    data_files: Mapping[str, int]  # name -> size of the files beside it that hold tensors

    @property
    def op_types(self) -> frozenset[str]:
        """The operators without their domains."""
        return frozenset(op for _, op in self.ops)

    @property
    def float16(self) -> tuple[str, ...]:
        """The inputs and outputs of a 16-bit float type."""
        return tuple(v.name for v in (*self.inputs, *self.outputs) if v.dtype in ("float16", "bfloat16"))

    @property
    def has_float16(self) -> bool:
        return bool(self.float16)

    @property
    def custom_domains(self) -> list[str]:
        """The domains of operators that neither ONNX nor ONNX Runtime has."""
        return sorted(
            {domain for domain, _ in self.ops if not re.fullmatch(r"(ai\.onnx|com\.microsoft)(\..*)?|", domain)}
        )


def read_header(path: Path, root: Path) -> Header:
    """The header of the graph at `path`, which lies in the model directory `root`.

    Raises ModelError for whatever is wrong with the file, UnsupportedModelError for what is right but too new,
    PluginError without ONNX Runtime.
    """
    model = _parse(path)
    opsets = {_domain(o.domain): o.version for o in model.opset_import}
    if not opsets:
        raise ModelError(f"{path} does not say its operator sets", hint=DOWNLOAD)
    _check_runtime(path, model, opsets)
    contents = _by_type(model)
    if contents["SparseTensorProto"]:
        raise UnsupportedModelError(f"{path} holds sparse tensors", hint="export it with dense ones")
    weight_bytes, data_files = check_tensors(path, root, contents["TensorProto"])
    own = {(_domain(f.domain), f.name) for f in model.functions}
    given = {t.name for t in model.graph.initializer}  # files of old versions list weights among the inputs
    return Header(
        path=path,
        ir_version=model.ir_version,
        opsets=opsets,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata={p.key: p.value for p in model.metadata_props},
        ops=frozenset((_domain(n.domain), n.op_type) for n in contents["NodeProto"]) - own,
        inputs=tuple(_value(v) for v in model.graph.input if v.name not in given),
        outputs=tuple(_value(v) for v in model.graph.output),
        same_until=same_until(contents["NodeProto"], contents["TensorProto"]),
        weight_bytes=weight_bytes,
        data_files=data_files,
    )


def check_runnable(header: Header, device: str, *, has_custom_ops: bool = False) -> None:
    """Can `device` (cpu, cuda, directml) compute it? Raises UnsupportedModelError that names the fix.

    A graph whose inputs or outputs are 16-bit floats was made for another device than the CPU. There ONNX Runtime
    would convert numbers around every operator: slower than float32, and with its memory. 16-bit weights inside of
    a graph are widened once, and are fine.
    """
    if (domains := header.custom_domains) and not has_custom_ops:
        names = sorted(f"{domain}.{op}" for domain, op in header.ops if domain in domains)
        raise UnsupportedModelError(
            f"{header.path} uses operators that ONNX Runtime does not have: {', '.join(names[:5])}",
            hint="name the library that brings them in runner.custom_ops, if you trust it",
        )
    if device == "cpu" and header.has_float16:
        raise UnsupportedModelError(
            f"{header.path} is a graph in 16-bit floats ({', '.join(header.float16[:3])}), which is not for the CPU",
            hint="set runner.device to cuda or directml, or export it for the CPU in fp32, int8 or int4",
        )


# ------------------------------------------------------------------------------------------- its steps


def _parse(path: Path) -> ModelProto:
    from google.protobuf.message import DecodeError
    from onnx import ModelProto

    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}", hint="check its permissions") from e
    if size > MAX_BYTES:
        raise ModelError(f"{path} has {size:,} bytes, but an ONNX file has at most {MAX_BYTES:,}", hint=DOWNLOAD)
    if raw.startswith(b"version https://git-lfs"):
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself", hint="run `git lfs pull` where it came from"
        )
    try:
        model = ModelProto.FromString(raw)
    except DecodeError as e:
        # The first field of an ONNX file is its version, a small number.
        is_onnx = raw[:1] == b"\x08" and raw[1:2] < b"\x40"
        what = "is cut short or damaged" if is_onnx else "is not an ONNX model"
        raise ModelError(f"{path} {what} ({size:,} bytes)", hint=DOWNLOAD) from e
    if not model.HasField("graph"):
        raise ModelError(f"{path} is not an ONNX model: it holds no graph", hint=DOWNLOAD)
    return model


def _check_runtime(path: Path, model: ModelProto, opsets: Mapping[str, int]) -> None:
    """Ask ONNX Runtime itself, with a graph of one node that says the same versions."""
    from onnx import TensorProto, helper

    ort = import_onnxruntime()
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    imports = [helper.make_opsetid(*o) for o in {"": 13, **opsets}.items()]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "versions", [x], [y])
    question = helper.make_model(graph, opset_imports=imports, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    try:
        ort.InferenceSession(question.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # its exceptions share no base class of their own
        text = " ".join(str(e).split())
        if match := re.search(r"Opset (\d+) is .* support for domain (\S+) is till opset (\d+)", text):
            found, known = f"version {match[1]} of the operators of {match[2]}", f"up to {match[3]}"
        elif match := re.search(r"IR version: (\d+), max supported IR version: (\d+)", text):
            found, known = f"version {match[1]} of the ONNX format", f"up to {match[2]}"
        else:
            found, known = "versions of format or operators that are refused", text
        raise UnsupportedModelError(
            f"{path} needs {found}, but ONNX Runtime {ort.__version__} knows {known}",
            hint="try: pip install --upgrade onnxruntime, or export it with an older opset",
        ) from e


def _by_type(model: ModelProto) -> dict[str, list[Any]]:
    """All messages in the model, wherever they are, by the name of their type: NodeProto, TensorProto, ..."""
    found: dict[str, list[Any]] = defaultdict(list)
    waiting: list[Any] = [model]
    while waiting:
        for field, value in waiting.pop().ListFields():
            if field.message_type is not None:  # else a number, a text, or several
                items = (value,) if hasattr(value, "ListFields") else value
                found[field.message_type.name] += items
                waiting += items
    return found


def _value(value: Any) -> Value:
    tensor = value.type.tensor_type  # of something else than a tensor: empty
    sizes = (getattr(d, d.WhichOneof("value") or "", None) for d in tensor.shape.dim)
    # Some exporters write -1 for a size that varies.
    shape = tuple(None if isinstance(size, int) and size < 0 else size for size in sizes)
    return Value(value.name, dtype_name(tensor.elem_type), shape)


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
