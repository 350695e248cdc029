"""`read_header`: what is let through to ONNX Runtime, and what is refused before it. ONNX Runtime is asked too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from nanovllm.errors import ModelError, NanoVLLMError, UnsupportedModelError
from nanovllm_runner_onnx.onnx_file import Header, Value, check_runnable, read_header
from onnx_files import DATA, branch, claimed, external, graph_model, save, tensor
from support import DATA as SHARED
from support import needs_data

ort = pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

FOUR = bytes(16)  # of four float32


def header_of(directory: Path, model: onnx.ModelProto, data: bytes | None = None) -> Header:
    return read_header(save(directory, model, data), directory)


def refusal(directory: Path, model: onnx.ModelProto, data: bytes | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        header_of(directory, model, data)
    assert caught.value.hint
    return str(caught.value)


# ------------------------------------------------------------------------------------------- what it reads


def test_the_header_says_what_the_file_says(tmp_path):
    function = helper.make_function(
        "my.functions",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 21)],
    )
    nodes = [
        helper.make_node("Twice", ["x"], ["twice"], domain="my.functions"),
        helper.make_node("FastGelu", ["twice"], ["gelu"], domain="com.microsoft"),
        helper.make_node("Equal", ["x", "x"], ["e"]),
        branch(tensor("inner")),
    ]
    model = graph_model([tensor()], nodes, opsets={"": 21, "com.microsoft": 1, "my.functions": 1}, functions=[function])
    model.producer_version = "7"
    model.metadata_props.add(key="k", value="v")
    header = header_of(tmp_path, model)
    assert header.opsets == {"": 21, "com.microsoft": 1, "my.functions": 1}
    assert (header.ir_version, header.producer, dict(header.metadata)) == (10, "tests 7", {"k": "v"})
    assert header.ops == {("", op) for op in ("Add", "Constant", "Equal", "If", "Identity")} | {
        ("com.microsoft", "FastGelu")
    }
    assert header.inputs == (Value("x", "float32", ("n",)),)
    assert header.outputs == (Value("y", "float32", ("n",)),)
    assert header.weight_bytes == 16 + 16 + 2 * 4  # w, the branch's own, and two constants of one number
    assert header.data_files == {}
    assert not header.custom_domains


def test_weights_that_old_files_list_among_the_inputs_are_none(tmp_path):
    model = graph_model([tensor()], ir_version=3)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    assert [value.name for value in header_of(tmp_path, model).inputs] == ["x"]


def test_an_open_size_and_an_unnamed_one(tmp_path):
    model = graph_model()
    del model.graph.input[0].type.tensor_type.shape.dim[:]
    model.graph.input[0].type.tensor_type.shape.dim.add()
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=3)
    model.graph.input[0].type.tensor_type.shape.dim.add(dim_value=-1)
    assert header_of(tmp_path, model).inputs[0].shape == (None, 3, None)


@needs_data
@pytest.mark.parametrize("name", ["stories260k-optimum/model.onnx", "tiny-random-gpt2-fp32/past.onnx"])
def test_inputs_and_outputs_are_those_of_onnx_runtime(name):
    path = SHARED / "onnx" / name
    header = read_header(path, path.parent)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": "float32", "tensor(int64)": "int64", "tensor(int32)": "int32"}
    for ours, theirs in ((header.inputs, session.get_inputs()), (header.outputs, session.get_outputs())):
        assert [(v.name, v.dtype, list(v.shape)) for v in ours] == [(v.name, types[v.type], v.shape) for v in theirs]


COMPLEX = (TensorProto.COMPLEX64, TensorProto.COMPLEX128)  # ONNX Runtime has none
NUMBERS = [t for t in TensorProto.DataType.values() if t not in (TensorProto.UNDEFINED, TensorProto.STRING, *COMPLEX)]


@pytest.mark.parametrize("dtype", NUMBERS, ids=TensorProto.DataType.Name)
def test_every_type_has_the_size_that_onnx_writes(dtype, tmp_path):
    one_by_one = helper.make_tensor("w", dtype, [3], [1.0, 0.0, 1.0])
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(one_by_one), "w")
    assert (raw.data_type, raw.HasField("raw_data"), one_by_one.HasField("raw_data")) == (dtype, True, False)
    for proto in (one_by_one, raw):
        assert header_of(tmp_path, graph_model([proto])).weight_bytes == len(raw.raw_data)


def test_strings_and_empty_tensors_are_tensors(tmp_path):
    words = helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"bcd"])
    assert header_of(tmp_path, graph_model([words, claimed([3, 0], b"")])).weight_bytes == 4


# --------------------------------------------------------------------------------- what is no model at all


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is not an ONNX model: it holds no graph"),
        (b'{"architectures": []}', r"is not an ONNX model \(21 bytes\)"),
        (b"\x08\x0a", "holds no graph"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer.*git lfs pull"),
        (bytes(1000), "is not an ONNX model"),
    ],
)
def test_files_that_are_no_model(raw, reason, tmp_path):
    (tmp_path / "model.onnx").write_bytes(raw)
    with pytest.raises(ModelError, match=reason):
        read_header(tmp_path / "model.onnx", tmp_path)


def test_every_beginning_of_a_model_is_refused(tmp_path):
    raw = graph_model([tensor()]).SerializeToString()
    accepted = []
    for size in range(len(raw)):
        (tmp_path / "model.onnx").write_bytes(raw[:size])
        try:
            read_header(tmp_path / "model.onnx", tmp_path)
            accepted.append(size)
        except ModelError:
            pass
    assert accepted == []


@given(st.data())
def test_no_damage_is_anything_but_a_model_error(tmp_path_factory, data):
    raw = bytearray(graph_model([tensor(), external(length=16)], [branch(tensor("inner"))]).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    directory = tmp_path_factory.mktemp("damaged")
    (directory / DATA).write_bytes(FOUR)
    (directory / "model.onnx").write_bytes(raw)
    try:
        header = read_header(directory / "model.onnx", directory)
    except NanoVLLMError:
        return
    assert header.weight_bytes < 2 * (len(raw) + len(FOUR))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (graph_model(opsets={"": 99}), r"needs version 99 of the operators of ai.onnx.*knows up to \d+.*pip install"),
        (graph_model(opsets={"": 21, "com.microsoft": 9}), "version 9 of the operators of com.microsoft.*up to 1;"),
        (graph_model(ir_version=99), r"needs version 99 of the ONNX format.*knows up to \d+"),
    ],
)
def test_what_is_newer_than_the_runtime_says_both_numbers(model, reason, tmp_path):
    path = save(tmp_path, model)
    with pytest.raises(UnsupportedModelError, match=reason):
        read_header(path, tmp_path)
    with pytest.raises(Exception, match=r"pset|IR"):  # ONNX Runtime's own opinion
        ort.InferenceSession(path, providers=["CPUExecutionProvider"])


# --------------------------------------------------------------------------------- sizes that are not there


@pytest.mark.parametrize("place", ["initializer", "branch", "constant", "constants", "function"])
@pytest.mark.parametrize(
    ("dims", "reason"),
    [
        ([2**31, 2**10], r"has 4 of 8,796,093,022,208 values"),
        ([2**62, 2**62], "impossible shape"),
        ([2**62, 0, 4], "impossible shape"),
        ([-1], "impossible shape"),
        ([2], "has 4 of 8 values"),
        ([0], "has 4 of 0 values"),
    ],
)
def test_a_shape_needs_its_bytes_wherever_the_tensor_is(place, dims, reason, tmp_path):
    bomb = claimed(dims, name="bomb")
    constant = helper.make_node("Constant", [], ["k"], value=bomb)
    several = helper.make_node("Constant", [], ["k"])
    several.attribute.add(name="values", type=onnx.AttributeProto.TENSORS).tensors.append(bomb)
    function = helper.make_function("my.functions", "F", [], ["k"], [constant], [helper.make_opsetid("", 21)])
    model = {
        "initializer": graph_model([bomb]),
        "branch": graph_model(nodes=[branch(bomb)]),
        "constant": graph_model(nodes=[constant]),
        "constants": graph_model(nodes=[several]),
        "function": graph_model(functions=[function]),
    }[place]
    assert len(model.SerializeToString()) < 500
    with pytest.raises(ModelError, match=f"'bomb'.*{reason}"):
        header_of(tmp_path, model)


def test_a_million_dimensions_are_refused_before_they_are_multiplied(tmp_path):
    model = graph_model([claimed([2**62] * 1_000_000, name="bomb")])
    assert "'bomb' has 1,000,000 dimensions" in refusal(tmp_path, model)


def test_numbers_written_one_by_one_are_counted(tmp_path):
    proto = helper.make_tensor("w", TensorProto.INT64, [3], [1, 2, 3])
    proto.dims[0] = 4
    assert "has 3 of 4 values" in refusal(tmp_path, graph_model([proto]))


def test_an_unknown_type_and_a_sparse_tensor(tmp_path):
    assert "unknown type number 99" in refusal(tmp_path, graph_model([claimed([1], dtype=99)]))
    model = graph_model()
    model.graph.sparse_initializer.add(dims=[2**20, 2**20]).values.CopyFrom(tensor())
    assert "holds sparse tensors" in refusal(tmp_path, model)


# ---------------------------------------------------------------------------------------- data outside


def test_data_in_another_file_are_found_and_counted(tmp_path):
    model = graph_model([external(length=16), external(name="v", offset=16), external([0], name="none", offset=32)])
    header = header_of(tmp_path, model, FOUR * 2)
    assert header.data_files == {DATA: 32}
    assert header.weight_bytes == 32
    assert ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"offset": 1}, "ends at byte 17 of 'model.onnx.data', which has 16"),
        ({"offset": 2**62, "length": 16}, "which has 16; the file is truncated"),
        ({"length": 8}, r"length '8' in 'model\.onnx\.data', but its shape \[4\] needs 16"),
        ({"length": 2**63}, "needs 16 bytes"),
        ({"offset": -4}, "offset '-4'"),
        ({"offset": "four"}, "offset 'four'"),
        ({"offset": "1_6"}, "offset '1_6'"),
        ({"offset": "9" * 5000}, "offset '9999"),
        ({"location": "other.data"}, "lies in 'other.data', which is not there; put it beside model.onnx"),
        ({"location": "."}, "not a regular file"),
        ({"location": ""}, "not a regular file"),
        ({"location": "a\0b"}, "not there"),
        ({"prepacked_0": "w|k|0;4;x|"}, "prepacked_0"),
        ({"basepath": "/"}, "basepath"),
    ],
)
def test_what_a_tensor_says_of_its_data_must_be_true(entries, reason, tmp_path):
    with pytest.raises(ModelError, match=reason):
        header_of(tmp_path, graph_model([external(**entries)]), FOUR)


def test_data_that_end_too_early_are_named_for_every_length(tmp_path):
    path = save(tmp_path, graph_model([external()]))
    for size in range(16):
        (tmp_path / DATA).write_bytes(bytes(size))
        with pytest.raises(
            ModelError, match=f"ends at byte 16 of 'model.onnx.data', which has {size}; the file is trunc"
        ):
            read_header(path, tmp_path)


def test_an_entry_said_twice_is_refused(tmp_path):
    proto = external()
    proto.external_data.add(key="location", value="other")
    assert "by location, location; understood are" in refusal(tmp_path, graph_model([proto]), FOUR)


def test_a_file_may_be_shared_by_two_tensors_but_not_by_a_thousand(tmp_path):
    tied = [external(name=name, length=16) for name in "ab"]
    assert header_of(tmp_path, graph_model(tied), FOUR).weight_bytes == 32
    many = [external(name=f"w{i}", length=16) for i in range(1000)]
    assert "takes 16,000 bytes of tensors from 'model.onnx.data', which has 16" in refusal(
        tmp_path, graph_model(many), FOUR
    )


@pytest.fixture
def outside(tmp_path) -> Path:
    """A file that the model must not reach, and an empty model directory beside it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "secret").write_bytes(FOUR)
    return tmp_path / "secret"


@pytest.mark.parametrize(
    "location",
    ["../secret", "a/../../secret", "a/..\\..\\secret", "./.././secret", "{absolute}", "*/_ORT_MEM_ADDR_/*"],
)
def test_a_location_that_leads_outside_is_refused(location, outside):
    location = location.format(absolute=outside)
    directory = outside.parent / "model"
    (directory / "a").mkdir()
    (directory / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)  # ONNX Runtime reads an address into this name
    (directory / "*" / "_ORT_MEM_ADDR_" / "*").write_bytes(FOUR)
    model = graph_model([external(location=location, offset=0, length=16)])
    assert "lies outside of the model directory" in refusal(directory, model)


@pytest.mark.parametrize(
    "kind", ["symlink", "symlinked parent", "chain", "hard link", "link to a hard link", "dangling", "loop"]
)
def test_a_link_that_leads_outside_is_refused(kind, outside):
    directory, location = outside.parent / "model", DATA
    match kind:
        case "symlink":
            (directory / DATA).symlink_to(outside)
        case "symlinked parent":
            (directory / "data").symlink_to(outside.parent)
            location = "data/secret"
        case "chain":
            (directory / "one").symlink_to("two")
            (directory / "two").symlink_to("../secret")
            location = "one"
        case "hard link":
            os.link(outside, directory / DATA)
        case "link to a hard link":
            os.link(outside, directory / "w")
            (directory / DATA).symlink_to("w")
        case "dangling":
            (directory / DATA).symlink_to(outside.parent / "gone")
        case "loop":
            (directory / DATA).symlink_to(DATA)
    message = refusal(directory, graph_model([external(location=location, length=16)]))
    wanted = (
        "(a hard link)" if "hard" in kind else "cannot be opened" if kind in ("dangling", "loop") else "leads outside"
    )
    assert wanted in message


def test_a_link_inside_the_directory_is_followed(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_bytes(FOUR)
    (tmp_path / DATA).symlink_to("weights/w")
    assert header_of(tmp_path, graph_model([external()])).data_files == {DATA: 16}


def test_a_hub_cache_keeps_files_as_links_into_its_blobs(tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    (snapshot / "onnx").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "one").write_bytes(graph_model([external()]).SerializeToString())
    (blobs / "two").write_bytes(FOUR)
    (snapshot / "onnx" / "model.onnx").symlink_to("../../../blobs/one")
    (snapshot / "onnx" / DATA).symlink_to("../../../blobs/two")
    os.link(blobs / "two", tmp_path / "another name")  # caches of several users may share files
    assert read_header(snapshot / "onnx" / "model.onnx", snapshot).data_files == {f"onnx/{DATA}": 16}
    (snapshot / "onnx" / DATA).unlink()
    (snapshot / "onnx" / DATA).symlink_to(tmp_path / "another name")
    with pytest.raises(ModelError, match="leads outside"):
        read_header(snapshot / "onnx" / "model.onnx", snapshot)


# --------------------------------------------------------------------------------- what a device can run


def test_operators_that_nobody_here_has_are_refused_by_name(tmp_path):
    node = helper.make_node("Magic", ["x"], ["z"], domain="com.other")
    header = header_of(tmp_path, graph_model(nodes=[node], opsets={"": 21, "com.other": 1}))
    with pytest.raises(UnsupportedModelError, match=r"does not have: com\.other\.Magic; .*runner\.custom_ops"):
        check_runnable(header, "cpu")
    check_runnable(header, "cpu", has_custom_ops=True)


@pytest.mark.parametrize("domain", ["", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"])
def test_operators_of_onnx_and_of_its_runtime_are_not(domain, tmp_path):
    header = header_of(tmp_path, graph_model(nodes=[helper.make_node("Thing", ["x"], ["z"], domain=domain)]))
    check_runnable(header, "cpu")


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_graph_in_16_bit_floats_is_not_for_the_cpu(dtype, tmp_path):
    header = header_of(tmp_path, graph_model(dtype=dtype))
    with pytest.raises(UnsupportedModelError, match=r"16-bit floats \(x, y\).*set runner\.device to cuda or directml"):
        check_runnable(header, "cpu")
    check_runnable(header, "cuda")


def test_16_bit_weights_inside_of_a_graph_are_fine(tmp_path):
    header = header_of(tmp_path, graph_model([tensor(dtype=np.float16)]))
    assert not header.has_float16
    check_runnable(header, "cpu")
