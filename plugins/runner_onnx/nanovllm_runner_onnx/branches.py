"""`same_until`: up to how many tokens a graph that branches by length computes one and the same function.

Models whose rotary embedding has two ranges (longrope, as in Phi-3 of 128k) are exported with an `If` that compares
the length of the whole run with a constant. Beyond it, a long sequence changes what a short one in the same run gets,
and what the past holds was computed by the other branch. Texts short enough to try do not show it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def same_until(nodes: Iterable[NodeProto], initializers: Iterable[TensorProto]) -> int | None:
    """Tokens; 0 if that cannot be read from the graph; None if no branch depends on a comparison.

    `nodes`: of all graphs in the file.
    """
    nodes = list(nodes)
    producers = {name: node for node in nodes for name in node.output}
    constants = {t.name: t for t in initializers}
    constants |= {n.output[0]: a.t for n in nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"}
    waiting = [node.input[0] for node in nodes if node.op_type == "If" and node.input]
    limits, seen = [], set(waiting)
    while waiting:
        node = producers.get(waiting.pop())
        if node is None or node.op_type in ("Shape", "Size"):  # what a size is does not depend on any comparison
            continue
        if node.op_type in COMPARISONS:
            limits.append(_limit(node, constants))
        new = set(node.input) - seen
        seen |= new
        waiting += new
    return min(limits, default=None)


def _limit(node: NodeProto, constants: dict[str, TensorProto]) -> int:
    """The largest length on the same side of the comparison as 0; 0 if nothing is compared with a constant."""
    from onnx import numpy_helper

    for i, name in enumerate(node.input):
        tensor = constants.get(name)
        if tensor is not None and tensor.data_location != tensor.EXTERNAL:
            array = numpy_helper.to_array(tensor)
            if array.size == 1 and array.dtype.kind in "iu":
                # x > 5 and x <= 5 hold on one side of 5 | 6, x >= 5 and x < 5 on one side of 4 | 5.
                inclusive = (node.op_type in ("Greater", "LessOrEqual")) == (i == 1)
                return max(0, int(array.item()) - (not inclusive))
    return 0
