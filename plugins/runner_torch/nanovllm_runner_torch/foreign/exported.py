"""`open_exported`: the decoder of a torch.export program, from what it says of its inputs. Runs nothing.

A program checks the sizes of its inputs before it computes. Its upper bounds are kept; of the lower ones those are
dropped that torch assumes of every size while it records.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.export.graph_signature import ConstantArgument, InputKind

from nanovllm.errors import UnsupportedModelError
from nanovllm_models.config import MAX_INT
from nanovllm_models.lanes import NUMBER_TYPES, Past

from .decoder import TorchDecoder, name_of
from .signature import UNDERSTOOD, Input, Signature, role_of


class Limits(NamedTuple):
    """Of one run; None = unknown, or none at all."""

    rows: int | None  # sequences
    columns: int | None  # tokens, those of the past included


def open_exported(
    program: torch.export.ExportedProgram, path: Path, device: torch.device, dtype: torch.dtype
) -> tuple[TorchDecoder, Limits]:
    """Raises UnsupportedModelError for a program that is no decoder of the kinds in `UNDERSTOOD`, naming the input."""
    values: dict[str, Any] = {n.name: n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder"}
    rows: list[int] = []  # upper bounds
    columns: list[int] = []
    inputs: list[Input] = []
    past: list[Past] = []
    for spec in program.graph_signature.input_specs:
        if spec.kind != InputKind.USER_INPUT:
            continue
        if isinstance(spec.arg, ConstantArgument):
            inputs.append(Input(spec.arg.name, "constant", value=spec.arg.value))
            continue
        name, value = spec.arg.name, values.get(spec.arg.name)
        shown = f"{path} has an input {name!r}, {_shown(value)}"
        role = role_of(name, is_first=not inputs)
        if role is None or role in {i.role for i in inputs if i.role != "past"}:
            raise UnsupportedModelError(f"{shown}, that nobody here knows", hint=UNDERSTOOD)
        if not isinstance(value, torch.Tensor) or (role != "past" and (value.ndim != 2 or value.is_floating_point())):
            raise UnsupportedModelError(f"{shown}, where {role} are understood as (batch, tokens)", hint=UNDERSTOOD)
        inputs.append(Input(name, role, value.dtype))
        if role == "past":
            past.append(_past(path, name, value))
        for axis, bounds_of in ((0, rows), (past[-1].time_axis if role == "past" else 1, columns)):
            size: Any = value.shape[axis]
            known = None if isinstance(size, int) else program.range_constraints.get(size.node.expr)
            if known is not None and known.upper < MAX_INT:
                bounds_of.append(int(known.upper))
    if not inputs:
        raise UnsupportedModelError(f"{path} has no inputs", hint=UNDERSTOOD)
    for size, bounds in program.range_constraints.items():
        # At least 2, and a sum of two sizes at least 4. What the model does with one sequence, one token and no past
        # is for the probe to find out.
        if bounds.lower <= 2 * len(size.free_symbols):
            program.range_constraints[size] = type(bounds)(0, bounds.upper)
    signature = Signature(tuple(inputs), program.call_spec.in_spec, tuple(past))
    limits = Limits(min(rows, default=None), min(columns, default=None))
    return TorchDecoder(program.module(), signature, device, dtype), limits


def _past(path: Path, name: str, value: torch.Tensor) -> Past:
    varying = [i for i, size in enumerate(value.shape) if i and not isinstance(size, int)]
    if value.ndim != 4 or name_of(value.dtype) not in NUMBER_TYPES or len(varying) != 1:
        raise UnsupportedModelError(
            f"{path}: the input {name!r} is {_shown(value)}; understood are {', '.join(NUMBER_TYPES)} of four sizes, "
            "of which exactly one, the number of tokens, varies beside the batch",
            hint="export it with dynamic lengths and a fixed number and size of heads",
        )
    sizes = tuple(size if i and isinstance(size, int) else 1 for i, size in enumerate(value.shape))
    return Past(name, f"present of {name}", name_of(value.dtype), sizes, 0, varying[0])


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{name_of(value.dtype)} ({', '.join(str(n) if isinstance(n, int) else '?' for n in value.shape)})"
