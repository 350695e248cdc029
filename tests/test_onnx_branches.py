"""Graphs that take another branch beyond some length: up to which one they compute the same function."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from nanovllm_runner_onnx.onnx_file import read_header
from onnx_files import branch, external, graph_model, save, tensor

pytest.importorskip("onnxruntime", reason="the runtime: pip install 'nanovllm[onnx]'")

COMPARE = {
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
}


def found(tmp_path: Path, model: ModelProto) -> int | None:
    return read_header(save(tmp_path, model), tmp_path).same_until


def graph(*nodes: NodeProto, limit: TensorProto) -> ModelProto:
    """`length` is that of x; `nodes` make `c` of it, by which an If chooses."""
    length = helper.make_node("Shape", ["x"], ["length"])
    return graph_model([limit], [length, *nodes, branch()])


@pytest.mark.parametrize("kind", COMPARE)
@pytest.mark.parametrize("is_right", [True, False])
def test_the_branch_is_the_same_up_to_that_length(kind, is_right, tmp_path):
    limit = tensor("limit", [5], "int64")
    sides = ["length", "limit"] if is_right else ["limit", "length"]
    until = found(tmp_path, graph(helper.make_node(kind, sides, ["c"]), limit=limit))
    taken = [COMPARE[kind](n, 5) if is_right else COMPARE[kind](5, n) for n in range(1, 10)]
    assert until == next(i for i, t in enumerate(taken) if t != taken[0])


def test_what_is_between_comparison_and_branch_does_not_hide_it(tmp_path):
    limit = tensor("", 4096, "int64")
    nodes = [
        helper.make_node("Constant", [], ["limit"], value=limit),
        helper.make_node("Greater", ["length", "limit"], ["g"]),
        helper.make_node("Not", ["g"], ["n"]),
        helper.make_node("Squeeze", ["n"], ["c"]),
    ]
    assert found(tmp_path, graph(*nodes, limit=tensor("unused"))) == 4096


@pytest.mark.parametrize("limit", [tensor("limit", [1.5]), tensor("limit", [1, 2], "int64"), external((1,), "limit")])
def test_a_limit_that_cannot_be_read_is_none_at_all(limit, tmp_path):
    (tmp_path / "model.onnx.data").write_bytes(bytes(4))
    assert found(tmp_path, graph(helper.make_node("Greater", ["length", "limit"], ["c"]), limit=limit)) == 0


def test_other_branches_do_not_depend_on_a_length(tmp_path):
    """A switch that is an input, and what tracing makes of squeeze(): is a size one?"""
    limit = tensor("limit", [5], "int64")
    assert found(tmp_path, graph_model([limit], [branch()])) is None
    is_one = helper.make_node("Equal", ["length", "limit"], ["c"])
    assert found(tmp_path, graph(is_one, limit=limit)) is None
    causal = [helper.make_node("Greater", ["length", "limit"], ["mask"]), helper.make_node("Shape", ["mask"], ["s"])]
    is_one = helper.make_node("Equal", ["s", "limit"], ["c"])
    assert found(tmp_path, graph(*causal, is_one, limit=limit)) is None
